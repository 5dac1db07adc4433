"""Figures of runs for notebooks, exports and papers: the drawing step over `History`."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, MaxNLocator

from collie_lab.view.comparison import labelled
from collie_lab.view.curves import Array, value_range
from collie_lab.view.facts import STATUS_WORDS, facts, metric_text, peak_memory, progress_text, speed
from collie_lab.view.history import History
from collie_lab.view.live import Watched
from collie_lab.view.style import COLORS, MUTED, STATUS_COLORS, style
from collie_lab.view.units import bytes_text, count_text, duration_text, number_text

__all__ = ["Picture", "compare", "draw_comparison", "draw_history", "figure", "png"]

_LINE_STYLES = ("-", "--", ":", "-.")


class Picture(Figure):
    """A figure that a notebook shows by itself. pyplot would do so too, but keep it open, and show it twice."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(picture: Figure, dpi: int = 150) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    with style():
        picture.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def figure(run: Watched) -> Figure:
    """The static picture of a run, finished or not: loss, speed, memory and learning rate over the steps."""
    history = History(run.folder)
    history.update(run.alive)
    return draw_history(history)


def draw_history(history: History) -> Figure:
    """The drawing step of `figure`."""
    with style(formulas=False):
        words = _subtitle(history)
        top = 0.935 - 0.036 * len(words)
        picture = Picture(figsize=(7.4, 4.6), layout=ConstrainedLayoutEngine(rect=(0, 0, 1, top)))
        grid = picture.add_gridspec(2, 3, height_ratios=(2.1, 1))
        loss = picture.add_subplot(grid[0, :])
        _draw_loss(loss, history)
        for place, (name, title, ticks) in enumerate((
            ("tokens_per_second", "tokens per second", EngFormatter(sep="")),
            ("memory_allocated", "peak memory of a step", EngFormatter("B")),
            ("lr", "learning rate", FuncFormatter(lambda value, _: number_text(value, 2))),
        )):
            _draw_small(picture.add_subplot(grid[1, place]), history, name, title, ticks)
        picture.text(0.012, 0.965, history.folder.id, weight="bold", size=10.5, va="center")
        picture.text(0.988, 0.965, STATUS_WORDS.get(history.status, history.status), weight="bold", size=9.5,
                     va="center", ha="right", color=STATUS_COLORS.get(history.status, MUTED))
        picture.text(0.012, 0.938, "\n".join(words), color=MUTED, size=7.5, va="top", linespacing=1.5)
        return picture


def _subtitle(history: History) -> list[str]:
    """The numbers of the run, broken into lines that fit."""
    time = history.elapsed()
    lines = [progress_text(history) + (f" in {duration_text(time)}" if time is not None else "")]
    for label, value in facts(history).items():
        word = f"{label} {value}"
        if len(lines[-1]) + len(word) > 142:
            lines.append(word)
        else:
            lines[-1] += f"  ·  {word}"
    return lines


def _step_axis(axes: Axes, first: float, last: float, count: int) -> None:
    margin = 0.015 * (last - first)
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(count, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _draw_loss(axes: Axes, history: History) -> None:
    curve = history.curve("loss")
    steps, perplexity = history.evaluated("perplexity")
    with np.errstate(all="ignore"):
        held_out = np.log(perplexity)
    axes.set_title("loss")
    axes.set_xlabel("step")
    _step_axis(axes, history.span[0], max(history.step, history.span[0] + 1), 8)
    if curve.is_smoothed:
        axes.plot(curve.x, curve.raw, color=COLORS[0], alpha=0.28, linewidth=0.8, label="of each step")
        axes.plot(curve.smooth_x, curve.smooth, color=COLORS[0], label="smoothed")
    else:
        axes.plot(curve.x, curve.raw, color=COLORS[0], marker="o", markersize=3, label="of each step")
    if len(steps):
        axes.plot(steps, held_out, "o", color=COLORS[1], label="held out (log perplexity)")
    if not np.isfinite(curve.raw).any():
        note = "no finite loss" if len(history) else history.phase or "no step was recorded"
        axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center", color=MUTED)
        axes.set_yticks([])
        return
    low, high = value_range(curve.raw, curve.smooth, held_out)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.985), ncols=3)  # beside the title, clear of the curve


def _draw_small(axes: Axes, history: History, name: str, title: str, ticks: Formatter) -> None:
    curve = history.curve(name, points=300)
    axes.set_title(title)
    _step_axis(axes, history.span[0], max(history.step, history.span[0] + 1), 3)
    known = curve.raw[np.isfinite(curve.raw)]
    if not len(known):
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=MUTED)
        axes.set_yticks([])
        return
    axes.plot(curve.x, curve.raw, color=COLORS[0], linewidth=1.2, marker="o" if len(known) == 1 else "", markersize=3)
    axes.set_ylim(0, float(known.max()) * 1.15 or 1)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(ticks)


def compare(runs: Sequence[Watched], labels: Sequence[str] | None = None) -> Picture:
    """Several runs in one figure: their loss curves, and what each reached and needed.

    `labels` names them in the same order; by default their ids.
    """
    names = labelled(runs, labels, "compare", "a list of runs, compare([a, b])")
    histories = [History(run.folder) for run in runs]
    for history, run in zip(histories, runs, strict=True):
        history.update(run.alive)
    return draw_comparison(histories, names)


def draw_comparison(histories: list[History], names: list[str]) -> Picture:
    """The drawing step of `compare`."""
    columns = {title: values for title, values in _outcomes(histories).items() if any(v is not None for v in values)}
    with style(formulas=False):
        bars_height = 0.5 + 0.21 * len(names) if columns else 0.0
        picture = Picture(figsize=(7.4, 3.3 + bars_height))
        grid = picture.add_gridspec(2, max(len(columns), 1), height_ratios=(3.3, max(bars_height, 0.01)))
        _draw_losses(picture.add_subplot(grid[0, :]), histories, names)
        for place, (title, values) in enumerate(columns.items()):
            _draw_bars(picture.add_subplot(grid[1, place]), title, values, names if place == 0 else None)
        return picture


def _draw_losses(axes: Axes, histories: list[History], names: list[str]) -> None:
    parts: list[Array] = []
    drawn: list[Line2D] = []
    for index, (history, name) in enumerate(zip(histories, names, strict=True)):
        curve = history.curve("loss")
        color, line_style = COLORS[index % len(COLORS)], _LINE_STYLES[index // len(COLORS) % 4]
        x, y = (curve.smooth_x, curve.smooth) if curve.is_smoothed else (curve.x, curve.raw)
        if curve.is_smoothed:
            axes.plot(curve.x, curve.raw, color=color, alpha=0.15, linewidth=0.7)
        drawn += axes.plot(x, y, label=name, color=color, linestyle=line_style, marker="o" if len(x) == 1 else "")
        known = np.isfinite(y)
        if history.status == "diverged" and known.any():
            axes.plot(x[known][-1], y[known][-1], "x", color=color, markersize=7, markeredgewidth=2)
        parts.append(y)
    axes.set_title("training loss")
    axes.set_xlabel("step")
    _step_axis(axes, min(history.span[0] for history in histories), max(history.step for history in histories) or 1, 8)
    low, high = value_range(*parts)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))
    # Handed over: of its own accord a legend leaves out what begins with `_`. Some losses rise, so no corner is free.
    axes.legend(drawn, names, loc="best", ncols=1 + (len(names) > 6))


def _outcomes(histories: list[History]) -> dict[str, list[float | None]]:
    """What each run reached and needed, by the title of its column. Of one that has ended its result alone counts, as
    in tables: what it had halfway is no figure of its end."""
    def reached(history: History, metric: str) -> float | None:
        if history.alive and len(values := history.evaluated(metric)[1]):
            return float(values[-1])
        return history.result.get(metric)

    return {
        "held-out perplexity": [reached(history, "perplexity") for history in histories],
        "exact match": [reached(history, "exact_match") for history in histories],
        "peak memory": [peak_memory(history) for history in histories],
        "tokens per second": [speed(history) for history in histories],
    }


def _outcome_text(title: str, value: float | None) -> str:
    if title == "peak memory":
        return bytes_text(value)
    if title == "tokens per second":
        return count_text(value)
    return metric_text(title.replace(" ", "_"), value)


def _draw_bars(axes: Axes, title: str, values: list[float | None], names: list[str] | None) -> None:
    """Bars from zero with their values beside them, the first run at the top."""
    lengths = [value if value is not None and np.isfinite(value) else 0.0 for value in values]
    rows = range(len(values))
    axes.barh(rows, lengths, height=0.62, color=[COLORS[row % len(COLORS)] for row in rows])
    longest = max(lengths) or 1.0
    for row, value in zip(rows, values, strict=True):
        axes.text(lengths[row] + 0.03 * longest, row, _outcome_text(title, value), va="center", size=8, color=MUTED)
    axes.set_title(title)
    axes.set_xlim(0, 1.5 * longest)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xticks([])
    axes.set_yticks(list(rows), names if names is not None else [""] * len(values))
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
