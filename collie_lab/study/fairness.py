"""The fairness guard: what else differs between arms that are compared.

Arms are compared along one axis, with all other labels equal. What they must share besides stands in
`conditions.ASPECTS`; what was tuned, and how well, is looked at here.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from collie_lab.study.columns import Column
from collie_lab.study.conditions import ASPECTS, Aspect, Conditions
from collie_lab.study.groups import best_of, group_arms, known_axes, label_text, ordered
from collie_lab.study.outcomes import SEED, Outcomes, arm_frame, seedless, tuned_axes

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RANGE", "TUNING", "Difference", "Fairness", "compared_axis", "fairness"]

#: The aspects that no single run knows: how many settings were tried; whether the best lies between others.
TUNING: Final = "tuning budget"
RANGE: Final = "tuning range"
_WITHIN: Final = "it lies between others"
_NAMES: Final = (*(aspect.name for aspect in ASPECTS), TUNING, RANGE)


@dataclass(frozen=True)
class Difference:
    """One condition that arms that are compared do not share.

    Attributes:
        aspect: the condition: `precision`.
        values: by the label on the compared axis, in words.
        where: the sets of arms in which it was found, each by its labels on the other axes.
    """

    aspect: str
    values: Mapping[Any, str]
    where: tuple[Mapping[str, Any], ...]

    @property
    def odd(self) -> list[Any]:
        """The labels that differ from most others; all of them, where no value is the most frequent."""
        counts = Counter(self.values.values()).most_common()
        if len(counts) > 1 and counts[0][1] == counts[1][1]:
            return list(self.values)
        return [label for label, value in self.values.items() if value != counts[0][0]]

    def __str__(self) -> str:
        sides: dict[str, list[str]] = {}
        for label, value in self.values.items():
            sides.setdefault(value, []).append(label_text(label))
        return f"{self.aspect}: " + "; ".join(f"{value} ({', '.join(labels)})" for value, labels in sides.items())


@dataclass(frozen=True)
class Fairness(Sequence[Difference]):
    """The differences that were found, the gravest first; shown in a notebook as a list.

    Attributes:
        compare: the axis along which arms are compared.
        intended: aspects that are what is compared, and so no differences.
    """

    compare: str
    differences: tuple[Difference, ...]
    intended: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.differences)

    def __getitem__(self, index: Any) -> Any:
        return self.differences[index]

    @property
    def frame(self) -> pd.DataFrame:
        """A row a difference, set of arms and label: `aspect`, `where`, `label`, `value`, `odd`."""
        import pandas as pd

        rows = [{"aspect": difference.aspect, "where": _where_words(where), "label": label, "value": value,
                 "odd": label in difference.odd}
                for difference in self for where in difference.where for label, value in difference.values.items()]
        return pd.DataFrame(rows, columns=["aspect", "where", "label", "value", "odd"])

    def lines(self) -> list[str]:
        """A sentence a difference, with where it was found, if not everywhere alike."""
        several = Counter(difference.aspect for difference in self)
        return [f"{difference} ({'; '.join(map(_where_words, difference.where))})"
                if several[difference.aspect] > 1 and difference.where[0] else str(difference) for difference in self]

    def __str__(self) -> str:
        head = f"Compared by {self.compare}" + (f" (meant to differ: {', '.join(self.intended)})"
                                                if self.intended else "")
        if not self:
            return f"{head}: no other difference was found in {', '.join(_NAMES)}."
        return "\n".join([f"{head}, but the arms also differ in", *(f"- {line}" for line in self.lines())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *lines = str(self).splitlines()
        items = "".join(f"<li>{html.escape(line.removeprefix('- '))}</li>" for line in lines)
        return f"<p>{html.escape(head)}</p>" + (f"<ul>{items}</ul>" if items else "")


def compared_axis(axes: Sequence[str], prefer: Sequence[str] = ()) -> str:
    """The axis whose labels are compared: `method` where there is one, else the last of `prefer`, else the first.

    Raises:
        ValueError: there is no axis but the seed.
    """
    candidates = seedless(axes)
    if not candidates:
        raise ValueError("there is no axis along which arms could be compared")
    preferred = [axis for axis in prefer if axis in candidates]
    return next((axis for axis in candidates if axis.lower() == "method"), (preferred or candidates[:1])[-1])


def fairness(
    outcomes: Outcomes, compare: str | None = None, *, where: Mapping[str, Any] | None = None,
    tuned: Mapping[str, str | Column] | None = None, intended: Collection[str] = (),
) -> Fairness:
    """Find what else differs between arms that differ on the axis `compare` and on no other (but the seed).

    An aspect that the axis itself sets is no difference: by `training.precision`, precisions are what is compared; by
    `method`, they are not, unless `intended=("precision",)` says so.

    Args:
        compare: default: see `compared_axis`.
        where: only arms with these labels.
        tuned: axes that were tuned, each with the metric that chooses its value: arms that differ on them belong to one
            label, their number is its budget, and a best value that is the least or the most of those tried may not
            be the best there is; default: those of the outcomes.
        intended: names of aspects that are what the study compares.

    Raises:
        ValueError: an unknown axis or aspect.
    """
    axes = list(outcomes.axes)
    compare = compare or compared_axis(axes)
    known_axes([compare], axes, "fairness")
    tuned = {axis: metric for axis, metric in (tuned_axes(outcomes) if tuned is None else tuned).items()
             if axis in axes and axis != compare}
    if unknown := [name for name in intended if name not in _NAMES]:
        raise ValueError(f"intended: no aspect is called {unknown[0]!r}; there are: {', '.join(_NAMES)}")
    meant = tuple(aspect.name for aspect in ASPECTS if aspect.name in intended or aspect.is_compared_by(compare))
    meant += tuple(name for name in (TUNING, RANGE) if name in intended)
    others = [axis for axis in seedless(axes) if axis != compare and axis not in tuned]
    conditions = {name: Conditions(run) for name, run in outcomes.runs.items()}
    found: dict[tuple[str, tuple[tuple[Any, str], ...]], list[Mapping[str, Any]]] = {}
    for group in group_arms(arm_frame(outcomes), axes, others, where=where, free=(compare, *tuned)):
        for aspect, values in _differences(group.arms, compare, tuned, conditions, meant):
            found.setdefault((aspect, tuple(values.items())), []).append(group.labels)
    differences = [Difference(aspect, dict(values), tuple(places)) for (aspect, values), places in found.items()]
    return Fairness(compare, tuple(sorted(differences, key=lambda each: _NAMES.index(each.aspect))), meant)


def _differences(
    arms: pd.DataFrame, compare: str, tuned: Mapping[str, str | Column], conditions: Mapping[str, Conditions],
    meant: Collection[str],
) -> Iterator[tuple[str, dict[Any, str]]]:
    """Of one set of arms that differ on the compared axis (those that were tuned, and the seed) alone."""
    members = {label: arms[[each == label for each in arms[compare]]] for label in ordered(arms[compare])}
    if len(members) < 2:
        return
    runs = {label: [conditions[name] for name in rows.index if name in conditions] for label, rows in members.items()}
    for aspect in ASPECTS:
        if aspect.name not in meant:
            known = {label: value for label, each in runs.items() if (value := _condition(aspect, each)) is not None}
            first = next(iter(known.values()), None)
            if any(not _alike(aspect, first, value) for value in known.values()):
                yield aspect.name, {label: _words(aspect, value) for label, value in known.items()}
    if TUNING not in meant and tuned:
        budgets = {label: len(ordered(zip(*(rows[axis] for axis in tuned), strict=True)))
                   for label, rows in members.items()}
        if len(set(budgets.values())) > 1:
            yield TUNING, {label: f"{count} setting{'s' * (count > 1)}" for label, count in budgets.items()}
    if RANGE not in meant and tuned:
        places = {label: _place(rows, tuned) for label, rows in members.items()}
        if any(place not in ("", _WITHIN) for place in places.values()):
            yield RANGE, {label: place for label, place in places.items() if place}


def _place(arms: pd.DataFrame, tuned: Mapping[str, str | Column]) -> str:
    """Where the best value of each tuned axis lies among those that were tried; nothing where there is no best."""
    best, found = best_of(arms, tuned), []
    for axis in tuned:
        tried, chosen = set(arms[axis]), set(best[axis])
        if len(tried) > 1 and len(chosen) == 1 and all(isinstance(value, (int, float)) for value in tried):
            edge = {min(tried): "least", max(tried): "most"}.get(*chosen)
            found.append(f"the best {axis.rpartition('.')[2]} is the {edge} that was tried" if edge else _WITHIN)
    return ", ".join(ordered(found))


def _condition(aspect: Aspect, runs: Sequence[Conditions]) -> Any:
    """One value of all runs of a label: the mean of numbers that are measured, else every value that there is."""
    values = [value for run in runs if (value := aspect.read(run)) is not None]
    if not values:
        return None
    return sum(values) / len(values) if aspect.tolerance else tuple(ordered(values))


def _alike(aspect: Aspect, one: Any, two: Any) -> bool:
    return aspect.equal(one, two) if aspect.tolerance else set(one) == set(two)


def _words(aspect: Aspect, value: Any) -> str:
    return aspect.text(value) if aspect.tolerance else ", ".join(sorted(map(aspect.text, value)))


def _where_words(labels: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis} {label_text(label)}" for axis, label in labels.items() if axis != SEED)
