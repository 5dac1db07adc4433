"""The figures of a study, each by its kind: data from `series`, drawn by `_drawing` in the one look of `view.style`.

Every figure takes `by` (the axis whose labels are told apart; default: what is compared), `panels` (an axis spread over
panels side by side), `where` (only arms with these labels) and `tuned` (axes that were tuned, with the metric that
chooses; default: those of the outcomes), as `tabulate` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from collie_lab.planning._figure import ROLE_COLORS
from collie_lab.study import _drawing as drawing
from collie_lab.study._canvas import Canvas, StudyFigure, fitted, mark
from collie_lab.study.columns import Column, column
from collie_lab.study.fairness import compared_axis
from collie_lab.study.groups import Value, label_text, ordered
from collie_lab.study.outcomes import Outcomes, arm_frame, seedless, tuned_axes
from collie_lab.study.series import Fit, Line, Panel, Point, bands, fit, lines, points_frame
from collie_lab.view.style import INK, MUTED, style

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["KINDS", "StudyFigure", "bars", "components", "curves", "draw", "pareto", "size", "size_fits", "sweep"]

Where = Mapping[str, Any] | None
Tuned = Mapping[str, str | Column] | None


def draw(outcomes: Outcomes, kind: str, **options: Any) -> StudyFigure:
    """The figure of a kind of `KINDS`; `options` are that function's.

    Raises:
        ValueError: an unknown kind, axis or metric; arms that differ in an axis that is named nowhere.
    """
    if kind not in KINDS:
        raise ValueError(f"figure: no kind is called {kind!r}; there are: {', '.join(KINDS)}")
    with style(formulas=False):  # labels are anybody's
        return KINDS[kind](outcomes, **options)


def size(
    outcomes: Outcomes, metric: str | Column = "peak_bytes", *, against: str = "parameters", by: str | None = None,
    panels: str | None = None, where: Where = None, tuned: Tuned = None, planned: str | None = "planned_bytes",
    reference: Mapping[Any, float] | None = None, log: bool | None = None, title: str = "",
) -> StudyFigure:
    """A figure against a size, with a line fitted to each label: GB per billion parameters.

    Args:
        planned: the forecast's column, drawn as hollow marks where the metric is bytes; None: not drawn.
        reference: published slopes by label, in base units of the metric per unit of size (bytes a parameter are GB
            per billion parameters): dashed lines through the origin.
        log: both axes logarithmic; default: where sizes differ by more than a factor of 20.
    """
    by, shown = by or compared_axis(outcomes.axes), column(metric)
    forecast = planned if shown.key.endswith("bytes") and planned in arm_frame(outcomes) else None
    over = [axis for axis in seedless(outcomes.axes) if axis not in (by, panels, *_tuned(outcomes, tuned))]
    found = lines(outcomes, against, shown, by, panels=panels, where=where, tuned=tuned, over=over)
    shown, canvas, words = fitted(shown, found), Canvas(outcomes, found, panels, title), {}
    sizes = [point.x for point in canvas.points if point.x == point.x]
    log = max(sizes) > 20 * min(sizes) if log is None and sizes else bool(log)
    for axes, panel in zip(canvas.axes, found, strict=True):
        fits = _fits(panel)
        drawing.draw_size(axes, panel, shown, canvas.looks, fits, _forecast(panel, forecast) if forecast else {},
                          reference or {}, log)
        axes.set_xlabel(column(against).title.lower())
        if shown.key.endswith("bytes") and len(found) == 1:
            words = {label: f"{label_text(label)}: {each.slope:.1f} GB per billion" for label, each in fits.items()}
    marks = drawing.handles(canvas, words)
    if forecast:
        marks.append(mark("planned", marker="o", markerfacecolor="none", markeredgecolor=MUTED, linestyle="",
                          markersize=8))
    if reference:
        marks.append(mark("published", color=MUTED, linestyle=(0, (4, 3)), linewidth=1))
    return canvas.finish(shown.heading, marks, points_frame(found, against, shown.key, by, panels),
                         note=_without_place(canvas.points, column(against)))


def _without_place(points: Sequence[Point], against: Column) -> str:
    """Which points are not drawn, as no arm has told its size: those that failed early, or have not run."""
    lost = [", ".join(map(label_text, point.group.labels.values()))
            + (f" ({point.value.word})" if point.value.word else "") for point in points if point.x != point.x]
    return f"Not drawn, {against.title.lower()} unknown: {'; '.join(lost)}" if lost else ""


def size_fits(
    outcomes: Outcomes, metric: str = "peak_bytes", *, against: str = "parameters", by: str | None = None,
    where: Where = None, tuned: Tuned = None,
) -> pd.DataFrame:
    """The fitted lines of `size`, a row a label: `slope` (bytes a parameter are GB per billion), `intercept` (base
    unit), `r2`, `n` (sizes)."""
    import pandas as pd

    by = by or compared_axis(outcomes.axes)
    over = [axis for axis in seedless(outcomes.axes) if axis not in (by, *_tuned(outcomes, tuned))]
    panel, = lines(outcomes, against, metric, by, where=where, tuned=tuned, over=over)
    rows = {label: {"slope": each.slope, "intercept": each.intercept, "r2": each.r2, "n": each.n}
            for label, each in _fits(panel).items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["slope", "intercept", "r2", "n"]).rename_axis(by)


def _fits(panel: Panel) -> dict[Any, Fit]:
    made = {line.label: fit([point.x for point in line.measured], [point.value.mean for point in line.measured])
            for line in panel.lines}
    return {label: each for label, each in made.items() if each is not None}


def _forecast(panel: Panel, key: str) -> dict[Any, dict[float, float]]:
    """The planned figure by label and size; also of arms that failed."""
    made: dict[Any, dict[float, float]] = {}
    for line in panel.lines:
        for point in line.points:
            numbers = point.group.arms[key].dropna()
            if len(numbers) and point.x == point.x:
                made.setdefault(line.label, {})[point.x] = float(numbers.astype(float).mean())
    return made


def bars(
    outcomes: Outcomes, metric: str | Column = "tgs", *, x: str | None = None, by: str | None = None,
    panels: str | None = None, where: Where = None, tuned: Tuned = None,
    reference: Mapping[Any, Mapping[Any, float]] | None = None, title: str = "",
) -> StudyFigure:
    """Grouped bars with the deviation over seeds: a group for each label on the axis `x`, a bar for each on `by`.

    Args:
        x: default: the first axis that is left.
        reference: published figures, by label and place: `{"ZeRO-3": {"llama-7b": 1763}}`; strokes across the bars.
    """
    by, shown = by or compared_axis(outcomes.axes), column(metric)
    left = [axis for axis in seedless(outcomes.axes) if axis not in (by, panels, *_tuned(outcomes, tuned))]
    x = x or (left[0] if left else by)
    found = lines(outcomes, x, shown, by, panels=panels, where=where, tuned=tuned)
    shown, canvas = fitted(shown, found), Canvas(outcomes, found, panels, title)
    places = ordered(point.x for point in canvas.points)
    for axes, panel in zip(canvas.axes, found, strict=True):
        drawing.draw_bars(axes, panel, shown, canvas.looks, places, reference or {}, grouped=x != by)
    marks = drawing.handles(canvas, shape="bar") if x != by else []
    if reference:
        marks.append(mark("published", color=INK, linewidth=1.6))
    return canvas.finish(shown.heading, marks, points_frame(found, x, shown.key, by, panels))


def components(
    outcomes: Outcomes, metric: str | Column = "peak_bytes", *, planned: pd.DataFrame | None = None,
    by: str | None = None, panels: str | None = None, where: Where = None, tuned: Tuned = None, title: str = "",
) -> StudyFigure:
    """What the planned memory is made of, stacked, and the measured total beside it.

    Args:
        planned: bytes, a row an arm (by its name), a column a component of a plan (`weights`, `optimizer`, ...);
            default: the columns `planned_weights`, ... of the frame.

    Raises:
        ValueError: no components are known.
    """
    import pandas as pd

    by, shown = by or compared_axis(outcomes.axes), column(metric)
    parts = _parts(outcomes, planned)
    found = lines(outcomes, by, shown, by, panels=panels, where=where, tuned=tuned)
    canvas = Canvas(outcomes, found, panels, title)
    stacks = [{line.label: _stack(parts, line) for line in panel.lines} for panel in found]
    shown = shown.fitted([*(sum(stack.values()) for each in stacks for stack in each.values()),
                          *(point.value.mean for point in canvas.points)])
    for axes, panel, each in zip(canvas.axes, found, stacks, strict=True):
        measured = {line.label: line.points[0].value.mean for line in panel.lines if line.measured}
        words = {line.label: line.points[0].value.word or "" for line in panel.lines if line.failed}
        drawing.draw_stacks(axes, each, measured, words, shown, ROLE_COLORS)
    seen = {role for each in stacks for stack in each.values() for role in stack}
    marks = [mark(role, marker="s", color=ROLE_COLORS[role], linestyle="", markersize=7)
             for role in ROLE_COLORS if role in seen]
    marks.append(mark("measured", marker="s", markerfacecolor="#E5E7EB", markeredgecolor=MUTED, linestyle="",
                      markersize=7))
    rows = [{**({panels: panel.label} if panels else {}), by: line.label, shown.key: line.points[0].value.mean,
             **each[line.label]} for panel, each in zip(found, stacks, strict=True) for line in panel.lines]
    return canvas.finish(shown.heading, marks, pd.DataFrame(rows))


def _stack(parts: pd.DataFrame, line: Line) -> dict[str, float]:
    """Bytes by component of the arms of a label."""
    values = parts.reindex(line.points[0].group.names).mean()
    return {role: float(values[role]) for role in parts.columns if values[role] > 0}


def _parts(outcomes: Outcomes, planned: pd.DataFrame | None) -> pd.DataFrame:
    """Bytes by arm and component."""
    import pandas as pd

    if planned is None:
        frame = outcomes.frame
        planned = pd.DataFrame({role: frame[f"planned_{role}"] for role in ROLE_COLORS if f"planned_{role}" in frame},
                               index=frame.index).astype(float)
    known = [role for role in ROLE_COLORS if role in planned]
    if not known:
        raise ValueError("figure: no arm tells what its planned memory is made of: give planned=, bytes a row an arm "
                         f"with columns of {', '.join(ROLE_COLORS)}")
    return planned[known]


@dataclass(frozen=True)
class ParetoPoint:
    """A group of arms by two figures; `best`: none is at least as good in both and better in one."""

    label: Any
    name: Any
    x: Value
    y: Value
    area: float
    best: bool
    arms: tuple[str, ...]


def pareto(
    outcomes: Outcomes, x: str | Column = "peak_bytes", y: str | Column = "perplexity", *, by: str | None = None,
    panels: str | None = None, where: Where = None, tuned: Tuned = None, area: str | None = None, title: str = "",
) -> StudyFigure:
    """Two figures against each other, a point a label; a line joins those that no other beats in both, where less or
    more of both is better.

    Args:
        area: a third figure as the marks' area.
    """
    import pandas as pd

    by, across, up = by or compared_axis(outcomes.axes), column(x), column(y)
    found = lines(outcomes, by, up, by, panels=panels, where=where, tuned=tuned)
    canvas = Canvas(outcomes, found, panels, title)
    points = [_pareto_points(panel, across, up, area) for panel in found]
    across, up = across.fitted(point.x.mean for each in points for point in each), fitted(up, found)
    for axes, each in zip(canvas.axes, points, strict=True):
        drawing.draw_pareto(axes, each, across, up, canvas.looks)
        axes.set_xlabel(across.heading + _way(across))
    data = pd.DataFrame([{**({panels: panel.label} if panels else {}), by: point.label, across.key: point.x.mean,
                          f"{across.key}_std": point.x.std, up.key: point.y.mean, f"{up.key}_std": point.y.std,
                          "n": point.y.n, "pareto": point.best, "arms": ", ".join(point.arms)}
                         for panel, each in zip(found, points, strict=True) for point in each])
    marks = [mark("no other beats it in both", color=MUTED, linestyle=(0, (4, 3)), linewidth=1)] \
        if any(point.best for each in points for point in each) else []
    if area:
        marks.append(mark(f"area: {column(area).title.lower()}", marker="o", color=MUTED, linestyle="", markersize=6))
    return canvas.finish(up.heading + _way(up), marks, data)


def _way(shown: Column) -> str:
    """Which way is better, beside a heading."""
    return {"min": "  (less is better)", "max": "  (more is better)", None: ""}[shown.better]


def _pareto_points(panel: Panel, x: Column, y: Column, area: str | None) -> list[ParetoPoint]:
    known = [(line.label, point.group, point.group.value(x.key), point.value)
             for line in panel.lines for point in line.points if point.value.n and point.group.value(x.key).n]
    signs = [1 if shown.better != "max" else -1 for shown in (x, y)]
    costs = [(signs[0] * across.mean, signs[1] * up.mean) for _, _, across, up in known]
    areas = [group.value(area).mean if area else 1.0 for _, group, _, _ in known]
    largest = max((each for each in areas if each == each), default=1.0)
    return [ParetoPoint(label, label, across, up, 20 + 160 * (each / largest) if area and each == each else 45.0,
                        None not in (x.better, y.better)
                        and not any(other[0] <= cost[0] and other[1] <= cost[1] and other != cost for other in costs),
                        tuple(group.names))
            for (label, group, across, up), cost, each in zip(known, costs, areas, strict=True)]


def curves(
    outcomes: Outcomes, metric: str | Column = "loss", *, by: str | None = None, panels: str | None = None,
    where: Where = None, tuned: Tuned = None, log: bool = False, title: str = "",
) -> StudyFigure:
    """Courses over the steps: the mean over seeds, with a band of one standard deviation.

    `metric` is a column of `run.metrics` (smoothed from 20 steps on) or of `run.evaluations`.
    """
    import pandas as pd

    by, shown = by or compared_axis(outcomes.axes), column(metric)
    found = bands(outcomes, shown.key, by, panels=panels, where=where, tuned=tuned)
    shells = [Panel(label, tuple(Line(band.label, ()) for band in each)) for label, each, _ in found]
    canvas = Canvas(outcomes, shells, panels, title)
    for axes, (_, each, _) in zip(canvas.axes, found, strict=True):
        drawing.draw_bands(axes, each, shown, canvas.looks, log)
    rows = [pd.DataFrame({**({panels: label} if panels else {}), by: [band.label] * len(band.x), "step": band.x,
                          shown.key: band.mean, f"{shown.key}_std": band.std, "n": band.seeds})
            for label, each, _ in found for band in each]
    return canvas.finish(shown.heading, drawing.handles(canvas, shape="line"), pd.concat(rows),
                         arms=[name for _, _, names in found for name in names])


def sweep(
    outcomes: Outcomes, metric: str | Column | None = None, *, axis: str | None = None, by: str | None = None,
    panels: str | None = None, where: Where = None, tuned: Tuned = None, title: str = "",
) -> StudyFigure:
    """A figure along an axis that was tuned, a line a label, its best ringed; crosses: arms without the figure.

    `axis` and `metric` default to the first of `tuned`.
    """
    tuned = _tuned(outcomes, tuned)
    axis = axis or next(iter(tuned), None)
    if axis is None:
        raise ValueError("figure: nothing was tuned here: name the axis of the sweep, axis=")
    shown = column(metric or tuned.get(axis, "loss"))
    by = by or compared_axis([each for each in outcomes.axes if each != axis] or [axis])
    found = lines(outcomes, axis, shown, by, panels=panels, where=where, tuned=tuned)
    shown, canvas = fitted(shown, found), Canvas(outcomes, found, panels, title)
    places = ordered(point.x for point in canvas.points)
    for axes, panel in zip(canvas.axes, found, strict=True):
        drawing.draw_sweep(axes, panel, shown, canvas.looks, places)
        axes.set_xlabel(axis.rpartition(".")[2])
    return canvas.finish(shown.heading, drawing.handles(canvas), points_frame(found, axis, shown.key, by, panels))


def _tuned(outcomes: Outcomes, tuned: Tuned) -> Mapping[str, str | Column]:
    """Those that were given, else those of the outcomes."""
    return tuned_axes(outcomes) if tuned is None else tuned


#: Every kind of figure.
KINDS: Final[Mapping[str, Callable[..., StudyFigure]]] = {
    "size": size, "bars": bars, "components": components, "pareto": pareto, "curves": curves, "sweep": sweep,
}
