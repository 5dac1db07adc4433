"""Arms put together: those that differ in their seed alone are one group, whose figures are means with a spread."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from collie_lab.study.columns import Column, column
from collie_lab.study.outcomes import FINISHED, SEED, seedless
from collie_lab.view.units import NOTHING

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Group", "Value", "alike_means", "best_of", "chosen_arms", "group_arms", "known_axes", "label_text", "ordered",
]

_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Value:
    """One figure of a group, in base units.

    Attributes:
        samples: what each finished arm has, by its seed.
        failed: the statuses of arms without figures, and how many have each.
    """

    samples: Mapping[Any, float]
    failed: Mapping[str, int] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Over how many seeds."""
        return len(self.samples)

    @property
    def mean(self) -> float:
        """NaN where no arm has the figure."""
        return statistics.fmean(self.samples.values()) if self.samples else math.nan

    @property
    def std(self) -> float:
        """The sample standard deviation (n − 1); NaN below two seeds."""
        return statistics.stdev(self.samples.values()) if self.n > 1 else math.nan

    @property
    def word(self) -> str | None:
        """How the arms ended, where none has figures: `cuda oom`, `diverged`; the most frequent status."""
        if self.n or not self.failed:
            return None
        return max(self.failed, key=lambda status: self.failed[status]).replace("_", " ")


@dataclass(frozen=True)
class Group:
    """Arms with the same labels, a row of the frame each."""

    labels: Mapping[str, Any]
    arms: pd.DataFrame
    decided: bool = True
    """Whether they are of one setting: of several that were tried, and none of them the best yet, no figure counts."""

    @property
    def names(self) -> list[str]:
        """Of its arms."""
        return [str(name) for name in self.arms.index]

    @property
    def statuses(self) -> Mapping[str, int]:
        """How many of its arms have each."""
        return Counter(map(str, self.arms["status"]))

    def value(self, key: str) -> Value:
        """A figure over the seeds."""
        statuses = self.arms["status"]
        failed = Counter(str(status) for status in statuses if status not in FINISHED)
        samples: dict[Any, float] = {}
        if key in self.arms and self.decided:
            seeds = self.arms.get(SEED, self.arms.index)
            for seed, status, number in zip(seeds, statuses, self.arms[key], strict=True):
                if status in FINISHED and number is not None and math.isfinite(number):
                    samples[seed] = float(number)
        return Value(samples, failed)


def ordered(values: Iterable[Any]) -> list[Any]:
    """Each value once, in the order of the grid."""
    return list(dict.fromkeys(values))


def label_text(label: Any) -> str:
    """A label of an axis as it is written."""
    if label is None:
        return NOTHING
    return f"{label:g}" if isinstance(label, float) else str(label)


def known_axes(names: Iterable[str], axes: Sequence[str], what: str) -> list[str]:
    """The names, all of them axes.

    Raises:
        ValueError: one is no axis.
    """
    names = list(names)
    if unknown := [name for name in names if name not in axes]:
        raise ValueError(f"{what}: no axis is called {unknown[0]!r}; there are: {', '.join(axes) or 'none'}")
    return names


def chosen_arms(arms: pd.DataFrame, axes: Sequence[str], where: Mapping[str, Any] | None) -> pd.DataFrame:
    """The arms with these labels: `{"model": "llama-5m"}`, or one of several: `{"model": ["a", "b"]}`.

    Raises:
        ValueError: an unknown axis; no arm is left.
    """
    known_axes(where or {}, [*axes, SEED], "where")
    for axis, wanted in (where or {}).items():
        chosen = arms[arms[axis].isin(list(wanted) if isinstance(wanted, (list, tuple, set)) else [wanted])]
        if chosen.empty:
            raise ValueError(f"where: no arm has {axis} = {wanted!r}; there are: "
                             + ", ".join(map(str, ordered(arms[axis]))))
        arms = chosen
    return arms


def group_arms(
    arms: pd.DataFrame, axes: Sequence[str], by: Sequence[str], *, where: Mapping[str, Any] | None = None,
    tuned: Mapping[str, str | Column] | None = None, free: Collection[str] = (),
) -> list[Group]:
    """The arms by their labels on the axes `by`, in the order of the grid.

    Args:
        arms: what `arm_frame` gives.
        axes: all axes of the arms.
        where: see `chosen_arms`.
        tuned: axes that were tuned, each with the metric that chooses its value: a group keeps the arms at its best.
        free: axes in which the arms of a group may differ.

    Raises:
        ValueError: an unknown axis; no arm is left; the arms of a group differ in an axis that nobody has named.
    """
    known_axes(by, [*axes, SEED], "group")
    arms = chosen_arms(arms, axes, where)
    keys = list(zip(*(arms[axis] for axis in by), strict=True)) if by else [()] * len(arms)
    groups = []
    for key in ordered(keys):
        labels = dict(zip(by, key, strict=True))
        members = arms[[each == key for each in keys]]
        chosen = {axis: metric for axis, metric in (tuned or {}).items() if axis in axes and axis not in by}
        members = best_of(members, chosen)
        groups.append(Group(labels, members, len(ordered(_settings(members, chosen))) == 1))
        for axis in seedless(axes):
            if axis not in [*by, *free, *(tuned or {})] and len(ordered(members[axis])) > 1:
                raise ValueError(
                    f"arms that differ in {axis!r} would be averaged ({', '.join(map(str, ordered(members[axis])))}): "
                    f"put it into rows, columns or panels, or choose a value with where={{{axis!r}: ...}}")
    return groups


def _settings(arms: pd.DataFrame, tuned: Collection[str]) -> list[tuple[Any, ...]]:
    """Of each arm its labels on the axes that were tuned."""
    return list(zip(*(arms[axis] for axis in tuned), strict=True)) if tuned else [()] * len(arms)


def alike_means(values: Mapping[_Key, Value]) -> dict[_Key, float]:
    """The means over the seeds that all have (where there is no such seed, each over its own) of those with a figure:
    what was tried with more seeds than others is compared by the same ones."""
    samples = {key: value.samples for key, value in values.items() if value.n}
    common = set.intersection(*map(set, samples.values())) if samples else set()
    return {key: statistics.fmean(each[seed] for seed in common or each) for key, each in samples.items()}


def best_of(arms: pd.DataFrame, tuned: Mapping[str, str | Column]) -> pd.DataFrame:
    """The arms of the setting that has the best metric, over the seeds with which all were tried. Of several axes each
    takes its value from the best setting, by its own metric, of those that the axes before it have left."""
    for place, metric in enumerate(tuned.values()):
        shown = column(metric)
        if shown.better is None:
            raise ValueError(f"tuned: is less or more of {shown.key!r} better? A Column in its place can say so")
        settings = _settings(arms, tuned)
        tried = {setting: Group({}, arms[[each == setting for each in settings]]) for setting in ordered(settings)}
        means = alike_means({setting: group.value(shown.key) for setting, group in tried.items()})
        if not means:
            continue  # none of them has the metric: none is the best
        best = (min if shown.better == "min" else max)(means, key=means.__getitem__)
        arms = arms[[each[place] == best[place] for each in settings]]
    return arms
