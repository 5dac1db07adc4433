"""One look for every matplotlib figure of the project. A context: global settings stay as they are."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Final

__all__ = ["COLORS", "DARK_COLORS", "INK", "MUTED", "STATUS_COLORS", "STYLE", "style"]

#: Okabe & Ito's colours, told apart with any colour vision; the order keeps neighbours far apart, and
#: yellow, weak on white, is left out.
COLORS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: The same on dark pages: brighter, and white for black.
DARK_COLORS: Final = ("#56B4E9", "#F0954B", "#37C69A", "#E79FCB", "#F2C14E", "#B5DDF7", "#E5E7EB")
INK: Final = "#222222"
MUTED: Final = "#6B7280"
_FAINT: Final = "#E5E7EB"

#: Dark enough for white letters on them.
STATUS_COLORS: Final = {
    "starting": "#5B6470", "running": "#0067A3", "ok": "#00795A", "stopped": "#8A6100", "diverged": "#B3360B",
    "cuda_oom": "#B3261E", "host_oom": "#B3261E", "timeout": "#B3261E", "error": "#B3261E", "lost": "#B3261E",
}

#: matplotlib's settings; `style()` applies them. The font is the one that matplotlib brings along, so
#: that a figure looks the same everywhere.
STYLE: Final[dict[str, Any]] = {
    "figure.dpi": 100, "savefig.dpi": 200, "figure.facecolor": "white", "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans", "font.size": 8.5, "text.color": INK,
    "axes.titlesize": 9, "axes.titlelocation": "left", "axes.titlepad": 7, "axes.titlecolor": INK,
    "axes.labelsize": 8.5, "axes.labelcolor": MUTED, "axes.edgecolor": "#9CA3AF", "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": _FAINT, "grid.linewidth": 0.8,
    "xtick.color": "#9CA3AF", "ytick.color": "#9CA3AF", "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "xtick.major.size": 3, "ytick.major.size": 0,
    "lines.linewidth": 1.6, "lines.solid_capstyle": "round", "lines.markersize": 5,
    "legend.frameon": False, "legend.fontsize": 8, "legend.handlelength": 1.4,
    "pdf.fonttype": 42, "svg.fonttype": "none",  # text stays text in publications
    "svg.hashsalt": "collie_lab",  # the same figure gives the same file
}


def style(formulas: bool = True) -> AbstractContextManager[None]:
    """`with style(): ...` draws in the project's look; without `formulas`, text that holds two `$` is shown as it is.
    """
    import matplotlib
    from cycler import cycler

    manager: AbstractContextManager[None] = matplotlib.rc_context({
        **STYLE, "axes.prop_cycle": cycler(color=COLORS), "text.parse_math": formulas})
    return manager
