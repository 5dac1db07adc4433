"""The figure of `layouts.py`: a step under every layout, and a pipeline's idle share beside its theory."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

__all__ = ["draw"]

_INK, _FAINT, _ALONE = "#22272b", "#6b737a", "#c9ced3"
_COLOURS = {"dp2": "#0072B2", "tp2": "#009E73", "pp2": "#D55E00", "deepspeed": "#CC79A7"}
_SCHEDULES = {"gpipe": ("#D55E00", "o"), "1f1b": ("#0072B2", "s"), "interleaved": ("#009E73", "^"),
              "zero_bubble": ("#CC79A7", "D")}


def draw(results: dict[str, Any], file: Path) -> None:
    """Two panels side by side."""
    style = {"font.size": 10, "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _FAINT, "ytick.color": _INK}
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained", width_ratios=(3, 2))
        _steps(left, results["layouts"])
        _bubble(right, results)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, dpi=150, facecolor="white")
        plt.close(figure)


def _steps(axes: Axes, layouts: dict[str, list[dict[str, float]]]) -> None:
    alone = 1000 * statistics.median(run["step"] for run in layouts["one process"])
    for at, (name, runs) in enumerate(layouts.items()):
        steps = [1000 * run["step"] for run in runs]
        middle = statistics.median(steps)
        colour = _COLOURS.get(name.split()[0], _ALONE)
        axes.barh(at, middle, color=colour, height=0.66)
        axes.plot([min(steps), max(steps)], [at, at], color=_INK, linewidth=1)
        axes.text(max(steps) + 0.015 * alone, at, f"{middle:.0f} ms, {middle / alone:.2f} ×", va="center", fontsize=9)
    axes.plot([alone / 2] * 2, [-0.6, len(layouts) - 0.4], color=_FAINT, linewidth=1, linestyle="--")
    axes.text(alone / 2, -0.7, "half of one process", ha="center", fontsize=8, color=_FAINT)
    axes.set_yticks(range(len(layouts)), list(layouts))
    axes.set_ylim(len(layouts) - 0.4, -1.1)
    axes.set_xlim(0, 1.18 * max(1000 * run["step"] for runs in layouts.values() for run in runs))
    axes.set_xlabel("milliseconds a step (less is better); line: min–max")
    axes.set_title("The same step under every layout, two CPU ranks", loc="left", fontweight="bold", fontsize=11)
    axes.tick_params(axis="y", length=0)


def _bubble(axes: Axes, results: dict[str, Any]) -> None:
    for schedule, found in results["bubble"].items():
        colour, marker = _SCHEDULES[schedule]
        counts = [int(count) for count in found]
        axes.plot(counts, [100 * share for share in found.values()], marker=marker, color=colour,
                  label=schedule.replace("_", " "))
        axes.plot(counts, [100 * share for share in results["theory"][schedule].values()], color=colour,
                  linestyle=":", linewidth=1.5, clip_on=False)  # zero bubble's lies on the axis
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_ylim(0, 30)
    axes.set_xlabel("micro-batches a step")
    axes.set_ylabel("idle share of a rank (%)")
    axes.set_title("The pipeline's bubble, pp=2", loc="left", fontweight="bold", fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend([*handles, Line2D([], [], color=_FAINT, linestyle=":")], [*labels, "theory, messages free"],
                frameon=False, loc="upper right", ncols=2)
