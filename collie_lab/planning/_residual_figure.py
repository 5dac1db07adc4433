"""The picture of residuals: planned against measured, and the errors by component."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, NullLocator

from collie_lab.planning._figure import ROLE_COLORS
from collie_lab.planning.kept import COMPONENTS
from collie_lab.view.figures import Picture
from collie_lab.view.style import INK, MUTED, style

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["draw"]

_SHOWN: Final = 40  # rows of the errors; the newest runs
_FINE: Final = 0.01  # percent: below it the axis of errors is linear
_MARKERS: Final = dict(zip(COMPONENTS, "s^vDo", strict=True))


def draw(frame: pd.DataFrame) -> Figure:
    """The runs of `Residuals.frame` that were planned and measured."""
    known = frame[frame["error"].notna()]
    shown = known.tail(_SHOWN)
    with style():
        picture = Picture(figsize=(9.2, max(3.2, 1.3 + 0.19 * len(shown))), layout="constrained")
        left, right = picture.subplots(1, 2, width_ratios=(1, 1.25))
        _draw_peaks(left, known)
        _draw_errors(right, shown)
    return picture


def _draw_peaks(axes: Axes, frame: pd.DataFrame) -> None:
    low, high = frame[["planned", "measured"]].min().min() / 1.6, frame[["planned", "measured"]].max().max() * 1.6
    axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8, linestyle="--")
    for index, (gpu, group) in enumerate(frame.groupby(frame["gpu"].fillna("CPU"))):
        axes.plot(group["measured"], group["planned"], "osD^v"[index % 5], label=gpu, alpha=0.75,
                  markeredgecolor="white")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="measured", ylabel="planned",
             title="peak memory of the worst rank", box_aspect=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(EngFormatter("B", places=0, sep=" "))
        axis.set_minor_locator(NullLocator())
    axes.legend(loc="upper left")


def _draw_errors(axes: Axes, frame: pd.DataFrame) -> None:
    rows = range(len(frame))
    axes.axvline(0, color=MUTED, linewidth=0.8, linestyle="--")
    for name in COMPONENTS:
        errors = 100 * frame["error" if name == "total" else f"{name}_error"]
        color = INK if name == "total" else ROLE_COLORS["activations" if name == "rest" else name]
        axes.plot(errors, rows, _MARKERS[name], color=color, label=name, markersize=6 if name == "total" else 4.5,
                  fillstyle="none" if name == "total" else "full")
    axes.set_xscale("symlog", linthresh=_FINE)
    axes.set(title="error of the plan, in percent of the measured peak", ylim=(len(frame) - 0.5, -0.5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    axes.set_yticks(rows, frame.index, fontsize=7)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
