"""The drawing step of a study's figures: panels of points, bars and curves on matplotlib axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from collie_lab.study.columns import Column
from collie_lab.study.groups import alike_means, label_text
from collie_lab.study.series import Band, Fit, Panel, Point
from collie_lab.view.style import COLORS, INK, MUTED
from collie_lab.view.units import count_text

if TYPE_CHECKING:
    from collie_lab.study._canvas import Canvas

__all__ = ["Looks", "draw_bands", "draw_bars", "draw_pareto", "draw_size", "draw_stacks", "draw_sweep", "handles"]

_MARKERS: Final = "osD^vPX<>"  # other ones in the next round through the colours
_DASHES: Final = ("-", "--", ":", "-.")
#: Points by which a name lies above or below its mark: the nearest first.
_LIFTS: Final = ((4, -11), (15, -22), (26, -33), (37, -44))


class Looks:
    """Each label's colour, marker and dashes: the same in all panels, and told apart without colours."""

    def __init__(self, labels: Sequence[Any]):
        self.labels = list(labels)
        self._places = {label: place for place, label in enumerate(labels)}

    def color(self, label: Any) -> str:
        """One of the palette; it begins again after seven."""
        return COLORS[self._places[label] % len(COLORS)]

    def marker(self, label: Any) -> str:
        """A shape."""
        return _MARKERS[self._places[label] % len(_MARKERS)]

    def dash(self, label: Any) -> str:
        """A line style, another one in each round through the colours."""
        return _DASHES[self._places[label] // len(COLORS) % len(_DASHES)]


def _mark_failed(axes: Axes, x: float, y: float, color: str, word: str) -> None:
    """A cross where an arm came to no figure, and how it ended."""
    axes.plot([x], [y], "x", color=color, markersize=6.5, markeredgewidth=1.8, zorder=4)
    axes.annotate(word, (x, y), xytext=(0, 7), textcoords="offset points", ha="center", va="bottom", size=6.5,
                  color=MUTED)


def _strip_of_failures(axes: Axes, failed: Sequence[tuple[float, str, str]]) -> None:
    """Crosses in a strip above the data, side by side where they stand at one place; each its x, colour and word."""
    if not failed:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.16 if axes.get_yscale() == "log" else high + 0.16 * (high - low))
    for x in dict.fromkeys(place for place, _, _ in failed):
        here = [(color, word) for place, color, word in failed if place == x]
        for count, (color, _) in enumerate(here):
            axes.annotate("×", (x, 0.93), xycoords=axes.get_xaxis_transform(), size=12, weight="bold", color=color,
                          xytext=(9 * (count - (len(here) - 1) / 2), 0), textcoords="offset points", ha="center",
                          va="center")
        axes.annotate(", ".join(dict.fromkeys(word for _, word in here)), (x, 0.96), xytext=(0, 2), ha="center",
                      xycoords=axes.get_xaxis_transform(), textcoords="offset points", va="bottom", size=6.5,
                      color=MUTED)


def _reach(axes: Axes, places: Sequence[float]) -> None:
    """Have the x axis reach all places: a cross in the strip above does not see to that by itself."""
    axes.update_datalim([(place, 0.0) for place in places], updatey=False)
    axes.autoscale_view(scaley=False)


def draw_size(
    axes: Axes, panel: Panel, shown: Column, looks: Looks, fits: Mapping[Any, Fit], planned: Mapping[Any, Any],
    reference: Mapping[Any, float], log: bool,
) -> None:
    """Points against a size, a fitted line each; hollow: planned; dashed: the reference's slopes, per unit of x."""
    spans = [point.x for line in panel.lines for point in line.points if point.x == point.x]
    grid = np.geomspace(min(spans), max(spans), 60) if spans else np.array([])
    nowhere: list[tuple[float, str, str]] = []
    for line in panel.lines:
        color = looks.color(line.label)
        points = line.measured
        if line.label in fits:
            each = fits[line.label]
            axes.plot(grid, (each.slope * grid + each.intercept) * shown.factor, color=color, linewidth=1.3,
                      linestyle=looks.dash(line.label), zorder=2)
        if line.label in reference:
            axes.plot(grid, reference[line.label] * grid * shown.factor, color=color, linewidth=1,
                      linestyle=(0, (4, 3)), alpha=0.7, zorder=1)
        forecast = planned.get(line.label, {})
        axes.plot(list(forecast), [value * shown.factor for value in forecast.values()], looks.marker(line.label),
                  markerfacecolor="none", markeredgecolor=color, markersize=9, markeredgewidth=0.9, zorder=2)
        axes.errorbar([point.x for point in points], [point.value.mean * shown.factor for point in points],
                      yerr=[_or_zero(point.value.std) * shown.factor for point in points], fmt=looks.marker(line.label),
                      color=color, markersize=4.5, capsize=2, elinewidth=1, zorder=3)
        for point in line.failed:
            if point.x in forecast and point.value.word == "pending":
                continue  # nobody has run it: what is planned is all there is
            if point.x in forecast:
                _mark_failed(axes, point.x, forecast[point.x] * shown.factor, color, point.value.word or "")
            elif point.x == point.x:
                nowhere.append((point.x, color, point.value.word or ""))
    _reach(axes, spans)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yscale("log")
        _log_ticks(axes)
    else:
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        _plain_numbers(axes)
    _strip_of_failures(axes, nowhere)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))
    if 0 < len(set(spans)) <= 6:
        axes.xaxis.set_major_locator(FixedLocator(_apart(sorted(set(spans)), log)))
        axes.xaxis.set_minor_locator(NullLocator())


def _apart(places: list[float], log: bool) -> list[float]:
    """Those places that leave room for a label."""
    heights = np.log(places) if log else np.asarray(places)
    room = 0.06 * (heights[-1] - heights[0] if log else heights[-1])
    kept: list[int] = []
    for index in range(len(places)):
        if not kept or heights[index] - heights[kept[-1]] > room:
            kept.append(index)
    return [places[index] for index in kept]


def _log_ticks(axes: Axes) -> None:
    """Plain numbers at 1, 2, 5 of every decade."""
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _plain_numbers(axes)


def _plain_numbers(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _or_zero(value: float) -> float:
    return value if value == value else 0.0


def draw_bars(
    axes: Axes, panel: Panel, shown: Column, looks: Looks, places: Sequence[Any],
    reference: Mapping[Any, Mapping[Any, float]], grouped: bool,
) -> None:
    """Bars with the deviation: a group a place and a bar a label, or one bar a place. A word where a figure lacks."""
    count = len(looks.labels) if grouped else 1
    width = 0.82 / count
    texts = [shown.text(point.value.mean) for line in panel.lines for point in line.points if point.value.n]
    inches = axes.get_window_extent().width / axes.figure.dpi / (len(places) * count)
    roomy = 0.9 * inches > 0.06 * max((len(text) for text in texts), default=0)  # 0.06 inches a digit of this size
    for line in panel.lines:
        shift = (looks.labels.index(line.label) - (count - 1) / 2) * width if grouped else 0.0
        for point in line.points:
            x = places.index(point.x) + shift
            if point.value.n:
                height = point.value.mean * shown.factor
                axes.bar(x, height, width * 0.92, color=looks.color(line.label), zorder=2)
                if point.value.n > 1:
                    axes.errorbar(x, height, yerr=point.value.std * shown.factor, color=INK, capsize=1.5,
                                  elinewidth=0.8, capthick=0.8, zorder=3)
                if roomy:
                    axes.annotate(shown.text(point.value.mean), (x, height + _or_zero(point.value.std) * shown.factor),
                                  xytext=(0, 2), textcoords="offset points", ha="center", size=6.5, color=MUTED)
            elif point.value.word:
                axes.annotate(point.value.word, (x, 0), xytext=(0, 3), textcoords="offset points", rotation=90,
                              ha="center", va="bottom", size=6.5, color=looks.color(line.label))
            published = reference.get(line.label, {}).get(point.x)
            if published is not None:
                axes.plot([x - width * 0.46, x + width * 0.46], [published * shown.factor] * 2, color=INK,
                          linewidth=1.6, zorder=4, solid_capstyle="butt")
    _name_places(axes, places)


def _name_places(axes: Axes, places: Sequence[Any]) -> None:
    """A label below each group of bars, aslant where they would touch."""
    texts = [label_text(place) for place in places]
    room = axes.get_window_extent().width / axes.figure.dpi / len(places)
    aslant = 0.075 * max(map(len, texts)) > room  # inches a letter of this size
    axes.set_xticks(range(len(places)), texts)
    if aslant:
        for text in axes.get_xticklabels():
            text.set(rotation=35, horizontalalignment="right", rotation_mode="anchor")
    _plain_numbers(axes)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(places) - 0.4)


def draw_stacks(
    axes: Axes, stacks: Mapping[Any, Mapping[str, float]], measured: Mapping[Any, float], words: Mapping[Any, str],
    shown: Column, colors: Mapping[str, str],
) -> None:
    """A bar of planned components a label, and the measured total beside it."""
    labels = list(stacks)
    for place, (label, parts) in enumerate(stacks.items()):
        base = 0.0
        for part, value in parts.items():
            axes.bar(place - 0.2, value * shown.factor, 0.36, bottom=base, color=colors[part], zorder=2)
            base += value * shown.factor
        if label in measured:
            height = measured[label] * shown.factor
            axes.bar(place + 0.2, height, 0.36, facecolor=to_rgba(MUTED, 0.25), edgecolor=MUTED, linewidth=1, zorder=2)
            axes.annotate(shown.text(measured[label]), (place + 0.2, height), xytext=(0, 2), textcoords="offset points",
                          ha="center", size=6.5, color=MUTED)
        elif label in words:
            axes.annotate(words[label], (place + 0.2, 0), xytext=(0, 3), textcoords="offset points", rotation=90,
                          ha="center", va="bottom", size=6.5, color=MUTED)
    _name_places(axes, labels)


def draw_pareto(axes: Axes, points: Sequence[Any], x: Column, y: Column, looks: Looks) -> None:
    """Points of two figures with their spread, each with its name; a line joins those that no other beats in both."""
    front = sorted((point for point in points if point.best), key=lambda point: point.x.mean)
    axes.plot([point.x.mean * x.factor for point in front], [point.y.mean * y.factor for point in front], color=MUTED,
              linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for point in points:
        color = looks.color(point.label)
        axes.errorbar(point.x.mean * x.factor, point.y.mean * y.factor, xerr=_or_zero(point.x.std) * x.factor,
                      yerr=_or_zero(point.y.std) * y.factor, color=color, elinewidth=0.9, capsize=2, zorder=2)
        axes.scatter(point.x.mean * x.factor, point.y.mean * y.factor, s=point.area, color=color, zorder=3,
                     marker=looks.marker(point.label), edgecolor="white", linewidth=0.7)
    _log_if_wide(axes, [point.y.mean * y.factor for point in points])
    axes.margins(0.14)
    _name_points(axes, points, x, y)


def _name_points(axes: Axes, points: Sequence[Any], x: Column, y: Column) -> None:
    """A name beside each point, where no other name is: the first place of some around it that is free."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # where things are is known from now on
    scale = figure.dpi / 72
    floor = axes.bbox.y0 / scale
    spots = [axes.transData.transform((point.x.mean * x.factor, point.y.mean * y.factor)) / scale for point in points]
    taken = [(spot[0] - 4, spot[1] - 4, spot[0] + 4, spot[1] + 4) for spot in spots]  # by the marks
    # From the left; of those above each other first the upper one, whose name goes above.
    for place in sorted(range(len(points)), key=lambda place: (round(spots[place][0] / 12), -spots[place][1])):
        point, spot = points[place], spots[place]
        text, shift = label_text(point.name), 3 + np.sqrt(point.area) / 2
        width, height = 5.6 * len(text), 9.0  # points, of letters of this size
        below = any(abs(other[0] - spot[0]) < 12 and 0 < other[1] - spot[1] < 16 for other in spots)
        lifts = [near[::-1] if below else near for near in _LIFTS]
        for across, up in [(side * shift, lift) for near in lifts for side in (1, -1) for lift in near]:
            left, low = spot[0] + across - (width if across < 0 else 0), spot[1] + up
            box = left, low, left + width, low + height
            others = (each for at, each in enumerate(taken) if at != place)
            if low > floor and all(box[2] < other[0] or box[0] > other[2] or box[3] < other[1] or box[1] > other[3]
                                   for other in others):
                break
        taken.append(box)
        line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(text, (point.x.mean * x.factor, point.y.mean * y.factor), xytext=(across, up),
                      textcoords="offset points", size=8, color=INK, ha="left" if across > 0 else "right",
                      weight="bold" if point.best else "normal", arrowprops=line if up not in _LIFTS[0] else None)


def _log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis for what spans more than a decade: else one far away hides how the others differ."""
    known = [value for value in values if value == value]
    if known and min(known) > 0 and max(known) > 10 * min(known):
        axes.set_yscale("log")
        _log_ticks(axes)


def draw_bands(axes: Axes, bands: Sequence[Band], shown: Column, looks: Looks, log: bool) -> None:
    """Means over steps with a band of one standard deviation; a cross where a label ended whose arms all failed."""
    sparse = all(len(band.x) < 20 for band in bands)
    for band in bands:
        color, y = looks.color(band.label), band.mean * shown.factor
        axes.plot(band.x, y, color=color, linestyle=looks.dash(band.label), markersize=3.5,
                  marker=looks.marker(band.label) if sparse else "")
        spread = band.std * shown.factor
        axes.fill_between(band.x, y - spread, y + spread, color=color, alpha=0.18, linewidth=0)
        known = np.isfinite(y)
        if band.failed and known.any():
            axes.plot(band.x[known][-1], y[known][-1], "x", color=color, markersize=7, markeredgewidth=2)
    if log:
        axes.set_yscale("log")
        _log_ticks(axes)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def draw_sweep(axes: Axes, panel: Panel, shown: Column, looks: Looks, places: Sequence[Any]) -> None:
    """Points along a tuned axis, the best of each line ringed, where less or more is better; crosses above: no figure.

    `places` are all values, in the order of the grid: there they stand, side by side, where not all are numbers.
    """
    failed: list[tuple[float, str, str]] = []
    numbers = all(isinstance(place, (int, float)) and not isinstance(place, bool) for place in places)
    log = numbers and min(places) > 0 and max(places) > 4 * min(places)

    def at(point: Point) -> float:
        return float(point.x if numbers else places.index(point.x))

    _log_if_wide(axes, [point.value.mean * shown.factor for line in panel.lines for point in line.measured])
    for line in panel.lines:
        color, points = looks.color(line.label), sorted(line.measured, key=at)
        means = [point.value.mean * shown.factor for point in points]
        axes.errorbar([at(point) for point in points], means, color=color, marker=looks.marker(line.label),
                      yerr=[_or_zero(point.value.std) * shown.factor for point in points], markersize=4, linewidth=1.3,
                      linestyle=looks.dash(line.label), elinewidth=0.9, capsize=2)
        if points and shown.better is not None:
            alike = alike_means({place: point.value for place, point in enumerate(points)})
            best = (min if shown.better == "min" else max)(alike, key=alike.__getitem__)
            axes.plot(at(points[best]), means[best], "o", markersize=10, markerfacecolor="none", markeredgecolor=color)
        failed += [(at(point), color, point.value.word or "") for point in line.failed]
    _reach(axes, [x for x, _, _ in failed])
    _strip_of_failures(axes, failed)
    if not numbers:
        _name_places(axes, places)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted(places)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def handles(
    canvas: Canvas, words: Mapping[Any, str] | None = None, shape: Literal["points", "line", "bar"] = "points",
) -> list[Line2D]:
    """What the legend shows of each label, with other words than its own where there are some."""
    looks = canvas.looks
    return [Line2D([], [], color=looks.color(label), label=(words or {}).get(label, label_text(label)), linewidth=1.3,
                   marker={"points": looks.marker(label), "line": "", "bar": "s"}[shape],
                   linestyle="" if shape == "bar" else looks.dash(label), markersize=7 if shape == "bar" else 4.5)
            for label in looks.labels]
