"""The figure of `launch.py`: seconds to the first step, cold and warm."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["draw"]

_INK, _FAINT = "#22272b", "#6b737a"
_OWN, _OTHER = "#0072B2", "#c9ced3"


def draw(seconds: dict[str, list[float]], file: Path) -> None:
    """A bar a launch, with the spread of its repeats."""
    with plt.rc_context({"font.size": 10, "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _FAINT}):
        figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
        longest = max(max(values) for values in seconds.values())
        for at, (name, values) in enumerate(seconds.items()):
            middle = statistics.median(values)
            axes.barh(at, middle, color=_OWN if name.startswith("collie") else _OTHER, height=0.64)
            axes.plot([min(values), max(values)], [at, at], color=_INK, linewidth=1)
            axes.text(max(values) + 0.012 * longest, at, f"{middle:.2f} s", va="center", fontsize=9)
        axes.set_yticks(range(len(seconds)), list(seconds))
        axes.set_ylim(len(seconds) - 0.4, -0.6)
        axes.set_xlim(0, 1.1 * longest)
        axes.set_xlabel("seconds to the end of the first step, two CPU ranks (less is better); line: min–max")
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        figure.savefig(file, dpi=150, facecolor="white")
        plt.close(figure)
