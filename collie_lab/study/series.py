"""The data of a study's figures: from arms to points and curves. The drawing step is `_drawing`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from collie_lab.study.columns import Column, column
from collie_lab.study.groups import Group, Value, group_arms, known_axes, ordered
from collie_lab.study.outcomes import FINISHED, UNDER_WAY, Outcomes, arm_frame, attempts, tuned_axes
from collie_lab.view.curves import Array, smooth

if TYPE_CHECKING:
    import pandas as pd

    from collie_lab.launch import Run

__all__ = ["Band", "Fit", "Line", "Panel", "Point", "bands", "fit", "lines", "points_frame"]


@dataclass(frozen=True)
class Point:
    """A group of arms in a figure, in base units."""

    x: Any
    """A label of an axis, or the mean of a figure; NaN where it is not known."""
    value: Value
    group: Group


@dataclass(frozen=True)
class Line:
    """The points of one label, in the order of the grid."""

    label: Any
    points: tuple[Point, ...]

    @property
    def measured(self) -> list[Point]:
        """Those with a figure and a place."""
        return [point for point in self.points if point.value.n and not _is_nan(point.x)]

    @property
    def failed(self) -> list[Point]:
        """Those whose arms all came to no figure."""
        return [point for point in self.points if point.value.word]


@dataclass(frozen=True)
class Panel:
    """One pair of axes; `label` is that of the axis which the panels are spread over, None where there is one alone."""

    label: Any
    lines: tuple[Line, ...]


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def lines(
    outcomes: Outcomes, x: str, y: str | Column, by: str, *, panels: str | None = None,
    where: Mapping[str, Any] | None = None, tuned: Mapping[str, str | Column] | None = None, over: Sequence[str] = (),
) -> list[Panel]:
    """The figure `y` against `x`, a line for each label on the axis `by`.

    Args:
        x: an axis, whose labels are the places; or a figure, whose mean is.
        panels: an axis spread over several panels.
        tuned: axes that were tuned, each with the metric that chooses its value; default: those of the outcomes.
        over: further axes along which the points of a line lie.

    Raises:
        ValueError: an unknown axis or figure; arms that differ in an axis that is named nowhere.
    """
    arms, axes, shown = arm_frame(outcomes), list(outcomes.axes), column(y)
    known_axes([by, *over, *([panels] if panels else [])], axes, "figure")
    for key in (shown.key, *([] if x in axes else [x])):
        if key not in arms:
            raise ValueError(f"figure: no arm has {key!r}; there are: {', '.join(map(str, arms.columns))}")
    spread = list(dict.fromkeys([*([panels] if panels else []), by, *([x] if x in axes else []), *over]))
    groups = group_arms(arms, axes, spread, where=where, tuned=tuned_axes(outcomes) if tuned is None else tuned)
    found = []
    for panel in ordered(group.labels[panels] for group in groups) if panels else [None]:
        here = [group for group in groups if panels is None or group.labels[panels] == panel]
        found.append(Panel(panel, tuple(
            Line(label, tuple(Point(_place(group, x, here, by), group.value(shown.key), group)
                              for group in here if group.labels[by] == label))
            for label in ordered(group.labels[by] for group in here))))
    return found


def _place(group: Group, x: str, groups: Sequence[Group], by: str) -> Any:
    """Where a group stands. Arms that failed may not know their own figure: then it is that of arms alike."""
    if x in group.labels:
        return group.labels[x]
    numbers = group.arms[x].dropna()
    if len(numbers):
        return float(numbers.astype(float).mean())
    alike = [other.arms[x].dropna().astype(float).mean() for other in groups
             if all(other.labels[axis] == label for axis, label in group.labels.items() if axis != by)]
    known = [float(value) for value in alike if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def points_frame(panels: Sequence[Panel], x: str, y: str, by: str, spread: str | None) -> pd.DataFrame:
    """What is drawn, a row a point, unrounded."""
    import pandas as pd

    rows = [{**({spread: panel.label} if spread else {}), by: line.label, x: point.x, y: point.value.mean,
             f"{y}_std": point.value.std, "n": point.value.n, "failed": point.value.word,
             "arms": ", ".join(point.group.names)}
            for panel in panels for line in panel.lines for point in line.points]
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Fit:
    """The straight line y = slope · x + intercept of least squares, and how well it fits."""

    slope: float
    intercept: float
    r2: float
    n: int


def fit(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """The line through points; None through fewer than two places."""
    if len(set(x)) < 2:
        return None
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (slope * np.asarray(x) + intercept)
    whole = float(np.sum((np.asarray(y) - np.mean(y)) ** 2))
    return Fit(float(slope), float(intercept), 1 - float(np.sum(residual**2)) / whole if whole else 1.0, len(x))


@dataclass(frozen=True)
class Band:
    """A curve over steps: the mean over seeds, and the standard deviation (NaN below two seeds)."""

    label: Any
    x: Array
    mean: Array
    std: Array
    seeds: int
    failed: bool
    """Whether all arms of the label have failed."""


def bands(
    outcomes: Outcomes, metric: str, by: str, *, panels: str | None = None, where: Mapping[str, Any] | None = None,
    tuned: Mapping[str, str | Column] | None = None,
) -> list[tuple[Any, list[Band], list[str]]]:
    """Curves of a column of `run.metrics` (smoothed, from 20 steps on) or of `run.evaluations`, over the seeds. Where
    it is open which value of a tuned axis is the best, there is none.

    A list of panels, each with its label, its bands, and the names of its arms.

    Raises:
        ValueError: an unknown axis; no run has the metric; no curve is there yet.
    """
    axes, runs = list(outcomes.axes), outcomes.runs
    known_axes([by, *([panels] if panels else [])], axes, "figure")
    groups = group_arms(arm_frame(outcomes), axes, [*([panels] if panels else []), by], where=where,
                        tuned=tuned_axes(outcomes) if tuned is None else tuned)
    found: list[tuple[Any, list[Band], list[str]]] = []
    for panel in ordered(group.labels[panels] for group in groups) if panels else [None]:
        here = [group for group in groups if panels is None or group.labels[panels] == panel]
        made = [band for group in here if group.decided and (band := _band(group, runs, metric, by)) is not None]
        found.append((panel, made, [name for group in here for name in group.names if name in runs]))
    if not any(made for _, made, _ in found):
        raise ValueError(f"figure: no run has recorded {metric!r}" if any(group.decided for group in groups) else
                         "figure: of the values that are tuned none is the best yet")
    return found


def _course(run: Run, metric: str) -> pd.Series[float] | None:
    """A metric by its step, over all attempts; of a step that was repeated, the later account."""
    import pandas as pd

    parts = []
    for each, until in attempts(run):
        frame = each.metrics if metric in each.metrics else each.evaluations
        if metric in frame:
            parts.append(frame[frame["step"] <= until].set_index("step")[metric].astype(float).dropna())
    if not parts:
        return None
    whole = pd.concat(parts)
    return whole[~whole.index.duplicated(keep="last")].sort_index()


def _band(group: Group, runs: Mapping[str, Run], metric: str, by: str) -> Band | None:
    import pandas as pd

    found = {name: _course(runs[name], metric) for name in group.names if name in runs}
    courses = {name: course for name, course in found.items() if course is not None and len(course)}
    if not courses:
        return None
    table = pd.DataFrame(courses).sort_index()
    x = table.index.to_numpy(dtype=np.float64)
    values = table.to_numpy(dtype=np.float64)
    if len(x) >= 20:
        values = np.column_stack([smooth(each, max(len(x) / 60, 1.0)) for each in values.T])
    known = np.isfinite(values)
    count = known.sum(axis=1)
    with np.errstate(all="ignore"):
        mean = np.where(count > 0, np.nansum(values, axis=1) / count, np.nan)
        std = np.sqrt(np.nansum((values - mean[:, None]) ** 2, axis=1) / (count - 1))
    failed = not group.arms["status"].isin([*FINISHED, *UNDER_WAY]).any()
    return Band(group.labels[by], x, mean, np.where(count > 1, std, np.nan), len(courses), failed)
