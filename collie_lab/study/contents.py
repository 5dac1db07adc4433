"""What an export and a report hold unless one says otherwise: a table of all arms, and every figure that they allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from collie_lab.planning._figure import ROLE_COLORS
from collie_lab.study._canvas import StudyFigure
from collie_lab.study.fairness import compared_axis
from collie_lab.study.figures import draw
from collie_lab.study.groups import group_arms, ordered
from collie_lab.study.outcomes import Outcomes, arm_frame, seedless, tuned_axes
from collie_lab.study.table import Table, tabulate

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["default_figures", "default_tables"]

#: Panels beside each other that can still be read.
_PANELS: Final = 6


def default_tables(outcomes: Outcomes) -> dict[str, Table]:
    """By the name of their files."""
    return {"results": tabulate(outcomes)}


def default_figures(outcomes: Outcomes) -> dict[str, StudyFigure]:
    """By the name of their files."""
    return {name: draw(outcomes, kind, **options) for name, kind, options in _choices(outcomes)}


def _choices(outcomes: Outcomes) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """The figures that the axes and the columns of the outcomes allow: name, kind and options of each."""
    arms = arm_frame(outcomes)
    by = compared_axis(outcomes.axes)
    others = [axis for axis in seedless(outcomes.axes) if axis not in (by, *tuned_axes(outcomes))
              and len(ordered(arms[axis])) > 1]
    memory, sizes = _known(arms, "peak_bytes"), list(arms.get("parameters", [None]))
    sizes = [size for size in sizes if size is not None and size == size]
    if memory and len(others) == 1 and sizes and max(sizes) > 1.5 * min(sizes):
        yield "memory_vs_size", "size", {"by": by}
    if _known(arms, "tgs") and others and len(others) < 3:
        yield "throughput", "bars", {"metric": "tgs", "by": by, "x": others[0],
                                     "panels": others[1] if len(others) > 1 else None}
    if len(others) > 1 or any(len(ordered(arms[axis])) > _PANELS for axis in others):
        return
    panels = others[0] if others else None
    if any(_known(arms, f"planned_{role}") for role in ROLE_COLORS):
        yield "memory_components", "components", {"by": by, "panels": panels}
    quality = next((key for key in ("exact_match", "perplexity", "loss") if _known(arms, key)), None)
    if memory and quality and len(ordered(arms[by])) > 1:
        yield "pareto", "pareto", {"y": quality, "by": by, "panels": panels}
    if tuned_axes(outcomes):
        yield "sweep", "sweep", {"by": by, "panels": panels}
    groups = group_arms(arms, outcomes.axes, [by, *others], tuned=tuned_axes(outcomes))
    if any(name in outcomes.runs and outcomes.runs[name].steps
           for group in groups if group.decided for name in group.names):
        yield "curves", "curves", {"by": by, "panels": panels}


def _known(arms: pd.DataFrame, key: str) -> bool:
    return key in arms and bool(arms[key].notna().any())
