"""The figure of `optimizers.py`: our engine, the libraries and the floor of every rule."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

__all__ = ["draw"]

_OURS, _THEIRS, _DOT, _INK, _FAINT = "#1f6f8b", "#c9ced3", "#8a929a", "#22272b", "#6b737a"
_BAR, _OFF = 0.34, 0.19  # the height of a bar, and how far it lies from the middle of its rule


def draw(content: dict[str, Any], file: Path) -> None:
    """One panel for each type of weights; one pair of bars for each rule."""
    results, environment = content["results"], content["environment"]
    sections = results["sections"]
    height = max(len(section) for section in sections.values())
    style = {"font.size": 10, "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _FAINT, "ytick.color": _INK}
    with plt.rc_context(style):
        figure, panels = plt.subplots(1, len(sections), figsize=(9.2 * len(sections), 1.9 + 0.72 * height),
                                      squeeze=False, layout="constrained")
        for axes, (name, section) in zip(panels[0], sections.items(), strict=True):
            _panel(axes, name, section)
        threads = "" if environment["gpu"] else f", {_count(environment['threads'], 'thread')}"
        figure.suptitle(f"Optimizer step, {results['parameters'] / 1e6:,.0f} M parameters in {results['tensors']} "
                        f"tensors — {environment['gpu'] or environment['cpu']}{threads}",
                        x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.legend(handles=[
            Patch(color=_OURS, label="collie_lab, engine “auto”"), Patch(color=_THEIRS, label="best library"),
            Line2D([], [], marker="o", linestyle="", color=_DOT, markerfacecolor="none", markersize=5,
                   label="other libraries and variants (▸ beyond the edge)"),
            Line2D([], [], color=_INK, linewidth=2, label="floor: bytes ÷ bandwidth"),
            Line2D([], [], color=_INK, linewidth=1, label=f"min–max of {_count(results['rounds'], 'round')}"),
        ], loc="outside lower left", ncols=3 if len(sections) == 1 else 5, frameon=False, fontsize=9, handlelength=1.6)
        figure.savefig(file, dpi=150, facecolor="white")
        plt.close(figure)


def _panel(axes: Axes, name: str, section: dict[str, dict[str, Any]]) -> None:
    # Slow variants of libraries would push the bars together: what lies beyond the edge is said in a word.
    edge = 1.25 * max(max(_middle(found["arms"][arm]["ms"]) for arm in (found["auto"], found["best_library"]) if arm)
                      for found in section.values())
    for at, found in enumerate(section.values()):
        _rule(axes, at, found, edge)
    axes.set_yticks(range(len(section)), list(section), fontsize=11)
    axes.set_ylim(len(section) - 0.45, -0.55)
    axes.set_xlim(0, edge * 1.3)
    axes.set_xlabel("milliseconds a step (less is better)")
    axes.set_title(f"{name} weights", loc="left", fontsize=11, color=_FAINT)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e8eaec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c9ced3")


def _rule(axes: Axes, at: int, found: dict[str, Any], edge: float) -> None:
    arms, ours, best = found["arms"], found["auto"], found["best_library"]
    floor = _middle(found["floor_ms"])
    if ours:
        _bar(axes, at - _OFF, arms[ours]["ms"], _OURS,
             f"{_middle(found['over_floor']):.2f} × floor, {ours.split()[-1]}")
    if best:
        moved = _middle(arms[best]["bytes"])
        less = f", moves {moved:.0f} bytes a parameter, not {found['bytes']}" if moved < 0.95 * found["bytes"] else ""
        _bar(axes, at + _OFF, arms[best]["ms"], _THEIRS, best + less)
        others = [_middle(values["ms"]) for arm, values in arms.items()
                  if arm != best and not arm.startswith("collie_lab")]
        inside = [ms for ms in others if ms <= edge]
        below = at + _OFF + _BAR / 2 + 0.07
        axes.plot(inside, [below] * len(inside), "o", color=_DOT, markerfacecolor="none", markersize=4)
        if len(inside) < len(others):
            axes.plot(edge * 1.29, below, ">", color=_DOT, markersize=4)
    else:
        axes.annotate("no library here has this rule", (floor, at + _OFF), (6, 0), textcoords="offset points",
                      va="center", fontsize=9, color=_FAINT, style="italic")
    axes.plot([floor, floor], [at - _OFF - _BAR / 2 - 0.05, at + _OFF + _BAR / 2 + 0.02], color=_INK, linewidth=2,
              solid_capstyle="butt", zorder=2.5)


def _bar(axes: Axes, at: float, values: list[float], color: str, more: str) -> None:
    middle = _middle(values)
    label = f"{middle:.0f} ms" if middle >= 9.95 else f"{middle:.1f} ms"
    axes.barh(at, middle, _BAR, color=color, zorder=2)
    axes.plot([min(values), max(values)], [at, at], color=_INK, linewidth=1, zorder=3)
    over = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}  # the line of the floor
    written = axes.annotate(label, (max(values), at), (6, 0), textcoords="offset points", va="center", fontsize=9.5,
                            fontweight="bold" if color == _OURS else "normal", bbox=over)
    axes.annotate(more, (1, 0), (6, 0), xycoords=written, textcoords="offset points", va="bottom", fontsize=9,
                  color=_FAINT, bbox=over)


def _middle(values: list[float]) -> float:
    return statistics.median(values)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
