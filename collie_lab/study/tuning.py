"""Which value of a tuned axis is best: the others' trials, and the arms that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from collie_lab.cells import CellError, Problem
from collie_lab.check_evaluation import OF_EVERY_RUN
from collie_lab.study.arms import RUNNERS, Arm
from collie_lab.study.grid import Tune
from collie_lab.study.store import FINAL

__all__ = ["Trials", "Tuning", "direction"]


@dataclass(frozen=True)
class Trials:
    """What tuning has found for one group of arms.

    Attributes:
        arms: the arms at the first seed, in the order of their values.
        figures: the metric of those that have one, by their name.
        best: the best of the trials; None where none is known yet, or none has the metric.
        decided: whether all trials have ended.
    """

    arms: tuple[Arm, ...]
    figures: dict[str, float]
    best: Arm | None
    decided: bool


class Tuning:
    """Chooses arms: of every group all trials, and the other seeds once the best value is known.

    Args:
        tune: the axis and the metric; None: nothing is tuned, and all arms are run.
        arms: all arms, of all values and seeds.
        outcome: the status of an arm, and its run's summary.
    """

    def __init__(self, tune: Tune | None, arms: Sequence[Arm], outcome: Callable[[Arm], tuple[str, Mapping[str, Any]]]):
        self._tune, self._arms, self._outcome = tune, arms, outcome
        self._groups: dict[tuple[Any, ...], list[Arm]] = {}
        for arm in arms:
            if arm.group is not None:
                self._groups.setdefault(arm.group, []).append(arm)

    @property
    def count(self) -> int:
        """How many arms there will be: some are not known before the best value is."""
        free = sum(arm.group is None for arm in self._arms)
        return free + sum(len(_trials(arms)) + len({arm.seed for arm in arms}) - 1 for arms in self._groups.values())

    def known(self) -> list[Arm]:
        """The arms that are to run, as far as they are known, in the order of the grid."""
        choices = self.choices()
        return [arm for arm in self._arms if arm.group is None or self._is_wanted(arm, choices[arm.group])]

    def choices(self) -> dict[tuple[Any, ...], Trials]:
        """What is known of each group, by its labels, the tuned axis apart."""
        return {group: self._choose(arms) for group, arms in self._groups.items()}

    def _choose(self, arms: list[Arm]) -> Trials:
        assert self._tune is not None
        trials = _trials(arms)
        figures: dict[str, float] = {}
        decided = True
        for arm in trials:
            status, summary = self._outcome(arm)
            decided &= status in FINAL
            value = summary.get(self._tune.metric)
            if status == "ok" and value is not None and value == value:
                figures[arm.name] = float(value)
        sign = -1.0 if direction(trials[0], self._tune) == "max" else 1.0
        ranked = sorted((arm for arm in trials if arm.name in figures), key=lambda arm: sign * figures[arm.name])
        return Trials(tuple(trials), figures, ranked[0] if ranked else None, decided)

    def _is_wanted(self, arm: Arm, trials: Trials) -> bool:
        """Whether it is a trial, or of another seed at the best value."""
        if arm.seed == trials.arms[0].seed:
            return True
        assert self._tune is not None
        best = trials.best if trials.decided else None
        return best is not None and bool(arm.labels[self._tune.axis] == best.labels[self._tune.axis])


def _trials(arms: list[Arm]) -> list[Arm]:
    """The arms at the first seed."""
    return [arm for arm in arms if arm.seed == arms[0].seed]


def direction(arm: Arm, tune: Tune) -> Literal["min", "max"]:
    """Whether less or more of the metric is better.

    Raises:
        CellError: nothing that the arm evaluates gives it, and the grid does not say; or it is known that the arm will
            not have it, whatever the grid says.
    """
    known: dict[str, Literal["min", "max"]] = {"loss": "min"}
    for cell in arm.experiment.evaluate:
        known |= cell.figures or {}
    if tune.better is not None:
        if _lacks(arm, tune.metric, known):
            raise CellError([Problem("Grid", "tune.metric", f"nothing gives {tune.metric!r} of {arm.name}",
                                     "an evaluation that does; given are: " + ", ".join([*known, *OF_EVERY_RUN]))])
        return tune.better
    if tune.metric not in known:
        raise CellError([Problem("Grid", "tune.metric", f"nothing says whether less or more of {tune.metric!r} is "
                                 "better", "`better: min` or `max` beside it; known are: " + ", ".join(known))])
    return known[tune.metric]


def _lacks(arm: Arm, metric: str, given: Collection[str]) -> bool:
    """Whether an arm's summary cannot have a figure. What functions measure, and modules of one's own write, is known
    only when they have run."""
    if arm.runner not in RUNNERS or any(cell.figures is None for cell in arm.experiment.evaluate):
        return False
    return metric.removesuffix("_se") not in given and metric not in OF_EVERY_RUN
