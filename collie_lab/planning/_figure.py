"""The pictures of a plan: memory over a step, and the bar of a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from collie_lab.view.figures import Picture
from collie_lab.view.style import COLORS, INK, MUTED, style
from collie_lab.view.units import bytes_text, percent_text

if TYPE_CHECKING:
    from collie_lab.gpus import GPU
    from collie_lab.planning.plan import Plan
    from collie_lab.planning.speed import Speed

__all__ = ["ROLE_COLORS", "bar", "draw", "draw_time"]

#: Of the components of a plan.
ROLE_COLORS: Final = dict(zip(
    ("weights", "gradients", "optimizer", "activations", "loss", "communication", "temporaries", "workspace"),
    (COLORS[0], COLORS[1], COLORS[2], COLORS[4], COLORS[3], COLORS[5], "#9CA3AF", "#6B7280"), strict=True))


def draw(summary: dict[str, Any], gpu: GPU | None) -> Figure:
    """Stacked bytes over the events of one step."""
    course = {role: values for role, values in summary["course"].items() if any(values)}
    with style():
        picture = Picture(figsize=(7.4, 3.4), layout="constrained")
        axes = picture.add_subplot()
        count = len(next(iter(course.values())))
        x = [index / max(1, count - 1) for index in range(count)]
        axes.stackplot(x, *course.values(), labels=list(course), linewidth=0,
                       colors=[ROLE_COLORS[role] for role in course])
        axes.set_title(f"memory over a step of rank {summary['rank']}: at most {bytes_text(summary['peak'])}")
        axes.yaxis.set_major_formatter(EngFormatter("B"))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("share of the step's allocations")
        axes.set_xlim(0, 1)
        top = summary["peak"] * 1.12
        if gpu is not None and gpu.memory < 1.6 * top:
            top = max(top, 1.06 * gpu.memory)
            axes.axhline(gpu.memory, color=INK, linewidth=1, linestyle="--")
            axes.annotate(f"{gpu.name}: {bytes_text(gpu.memory)}", (0.01, gpu.memory), ha="left", va="bottom",
                          color=MUTED, fontsize=8)
        if summary["update"] < 0.995:
            axes.axvline(summary["update"], color=MUTED, linewidth=0.8, linestyle=":")
            axes.annotate("update", (summary["update"], top), ha="right", va="top", color=MUTED, fontsize=8,
                          xytext=(-3, -2), textcoords="offset points")
        axes.set_ylim(0, top)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)
    return picture


def draw_time(speed: Speed) -> Figure:
    """What the seconds of a step are spent on, a bar each, and the range of their sum."""
    parts, unit = {name: seconds for name, seconds in speed.parts.items() if seconds}, EngFormatter("s", places=1)
    with style():
        picture = Picture(figsize=(7.4, 0.9 + 0.3 * len(parts)), layout="constrained")
        axes = picture.add_subplot()
        axes.barh(list(parts), list(parts.values()), color=COLORS[0], height=0.65)
        for place, seconds in enumerate(parts.values()):
            axes.annotate(f"{unit(seconds)}, {percent_text(seconds / speed.seconds)}", (seconds, place),
                          xytext=(4, 0), textcoords="offset points", va="center", color=MUTED, fontsize=8)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlim(0, 1.25 * max(parts.values()))
        axes.xaxis.set_major_formatter(EngFormatter("s"))
        axes.set_title(f"a step takes {unit(speed.seconds)} ({unit(speed.low)} to {unit(speed.high)}), "
                       f"by {speed.source}")
    return picture


def bar(plan: Plan) -> str:
    """The worst rank's peak as a bar in HTML, beside the GPU's memory."""
    row = dict(plan.worst["components"], workspace=plan.gpu.workspace if plan.gpu else 0)
    whole = max(plan.peak_bytes, plan.gpu.memory if plan.gpu else 0)
    pieces = "".join(
        f"<span title='{role} {bytes_text(size)}' style='display:inline-block;height:16px;"
        f"width:{100 * size / whole:.2f}%;background:{ROLE_COLORS[role]}'></span>"
        for role, size in row.items() if size)
    key = " ".join(f"<span style='white-space:nowrap;margin-right:10px'><span style='display:inline-block;width:9px;"
                   f"height:9px;background:{ROLE_COLORS[role]};margin-right:4px'></span>"
                   f"{role} {bytes_text(size)}</span>" for role, size in row.items() if size)
    return (f"<div style='max-width:640px;border:1px solid #9CA3AF;line-height:0'>{pieces}</div>"
            f"<div style='font-size:12px;margin:4px 0'>{key}</div>")
