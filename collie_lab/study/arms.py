"""The arms of a grid: one experiment each, with its labels, a name and an id."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

from collie_lab.cells import CellError, Experiment, Problem
from collie_lab.folder import read_json
from collie_lab.study import peer
from collie_lab.study.columns import METRICS
from collie_lab.study.fingerprint import Identity, identify
from collie_lab.study.grid import DEFAULT_RUNNER, Combination, Grid

__all__ = ["RUNNERS", "Arm", "arms_of", "read_arm"]

#: The modules that a rank of an arm runs, by the runner's name. A grid may also name a module of its own.
RUNNERS: Final[dict[str, str]] = {DEFAULT_RUNNER: "collie_lab.training.worker", "transformers": peer.MODULE}


@dataclass(frozen=True)
class Arm:
    """One point of a grid.

    Attributes:
        name: short, and the only one of its name in the study: the labels that differ among its arms.
        id: 12 hex digits of a hash of what decides on the result: the experiment, the runner, the bytes of the data.
        key: the same without the bytes.
        labels: of each axis, the seed apart.
        seed: of the training.
        experiment: what is run.
        runner: by what: a name of `RUNNERS`, or a module.
        timeout: seconds that it may take.
        memory_limit: bytes of the host's memory that its processes may take together.
        group: the labels of the arms that its tuned value is chosen among; None where nothing is tuned.
    """

    name: str
    id: str
    key: str
    labels: dict[str, Any]
    seed: int
    experiment: Experiment
    runner: str = DEFAULT_RUNNER
    timeout: float | None = None
    memory_limit: int | None = None
    group: tuple[Any, ...] | None = None

    @property
    def gpus(self) -> int:
        """How many GPUs it takes: one a rank."""
        return self.experiment.parallel.world_size

    @property
    def module(self) -> str:
        """What its ranks run."""
        return RUNNERS.get(self.runner, self.runner)

    @property
    def refused(self) -> list[Problem]:
        """What its runner cannot do of the experiment."""
        return list(peer.problems(self.experiment)) if self.module == peer.MODULE else []

    @property
    def folder_name(self) -> str:
        """The name of its folder."""
        return f"{_slug(self.name)}-{self.id}"

    def to_json(self) -> dict[str, Any]:
        """What `arm.json` holds."""
        return {"name": self.name, "id": self.id, "key": self.key, "labels": self.labels, "seed": self.seed,
                "runner": self.runner, "timeout": self.timeout, "memory_limit": self.memory_limit,
                "experiment": self.experiment.to_dict()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**{**fields, "experiment": Experiment.from_dict(fields["experiment"])})


def read_arm(place: str | Path) -> Arm:
    """An arm from its folder in a study; or one that is made of an experiment's YAML file.

    Raises:
        CellError: neither of both.
    """
    path = Path(place).expanduser()
    if path.suffix in (".yaml", ".yml"):
        experiment = Experiment.from_yaml(path)
        id, key, _ = identify(experiment, DEFAULT_RUNNER)
        return Arm(path.stem, id, key, {}, experiment.training.seed, experiment)
    if not (path / "arm.json").is_file():
        raise CellError([Problem("arm", "", f"{place} is no arm of a study, and no YAML file of an experiment")])
    return Arm.from_json(read_json(path / "arm.json"))


def arms_of(grid: Grid, results: Path) -> list[Arm]:
    """Every arm of a grid, in its order, the tried values of an axis that is tuned with all seeds among them.

    Where the data of an arm are not there, its id is that under which it stands in `results`.

    Raises:
        CellError: cells that do not accept their fields, an axis with the name of a figure, two arms that are the same,
            unequal budgets of tuning.
    """
    made = [(combination, seed) for combination in grid.combinations() for seed in _seeds(grid, combination)]
    names = _names([({**each.labels}, seed) for each, seed in made], grid.name)
    home = _Home(results)
    arms = [_arm(grid, combination, seed, name, home) for (combination, seed), name in zip(made, names, strict=True)]
    if not arms:
        raise CellError([Problem("Grid", "exclude", "no arm is left")])
    _check_axes(grid, arms)
    _check_distinct(arms)
    _check_budgets(grid, arms)
    return arms


def _seeds(grid: Grid, combination: Combination) -> Sequence[int | None]:
    if combination.seed is not None:
        return [combination.seed]
    return [None] if grid.seeds is None else grid.seeds


class _Home:
    """The ids of arms in a results folder, by their keys."""

    def __init__(self, results: Path):
        self._results = results

    def id_of(self, identity: Identity) -> str:
        return self._ids.get(identity.key, identity.id) if identity.absent else identity.id

    @cached_property
    def _ids(self) -> dict[str, str]:
        arms = (read_json(path) for path in (self._results / "arms").glob("*/arm.json"))
        return {arm["key"]: arm["id"] for arm in arms}


def _arm(grid: Grid, combination: Combination, seed: int | None, name: str, home: _Home) -> Arm:
    mapping, runner = grid.mapping(combination)
    try:
        experiment = Experiment.from_dict({**mapping, "name": _slug(name)})
        if seed is not None:
            experiment = experiment.with_("training.seed", seed)
        if runner not in RUNNERS and "." not in runner:
            raise CellError([Problem("Grid", "runner", f"unknown runner {runner!r}",
                                     f"there are: {', '.join(RUNNERS)}; or name a module that every rank runs")])
        identity = identify(experiment, runner)
    except CellError as error:
        raise CellError([Problem(f"{name}: {each.cell}", each.field, each.message, each.remedy)
                         for each in error.problems]) from None
    labels = {axis: _taken(experiment, axis, label) if (axis, label) in combination.changes else label
              for axis, label in combination.labels.items()}
    group = None
    if grid.tune is not None and not combination.included:
        group = tuple(label for axis, label in labels.items() if axis != grid.tune.axis)
    return Arm(name, home.id_of(identity), identity.key, labels, experiment.training.seed, experiment,
               runner, grid.timeout, grid.memory_limit, group)


def _taken(experiment: Experiment, axis: str, label: Any) -> Any:
    """The number that a field has made of a value of its axis, `"1e-3"` or 1e3 steps; else the label as it is."""
    value: Any = experiment
    for part in axis.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else label


def _names(points: Sequence[tuple[dict[str, Any], int | None]], fallback: str) -> list[str]:
    """A name for each arm: its labels on the axes that have several, numbers with their axis, the seed last."""
    several = [axis for axis in points[0][0] if len({str(labels[axis]) for labels, _ in points}) > 1] if points else []
    seeds = len({seed for _, seed in points}) > 1
    names = []
    for labels, seed in points:
        parts = [_part(axis, labels[axis]) for axis in several if labels[axis] is not None]
        names.append(", ".join([*parts, *([f"seed={seed}"] if seeds else [])]) or fallback)
    return names


def _part(axis: str, label: Any) -> str:
    return label if isinstance(label, str) else f"{axis.rpartition('.')[2]}={label}"


def _slug(name: str) -> str:
    """A name for a folder, of letters that every file system and shell takes as they are."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.replace("=", "")).strip("-._")[:60] or "arm"


def _check_axes(grid: Grid, arms: Iterable[Arm]) -> None:
    """No axis is called as a figure, whose place in the frame its labels would take. `steps` may be one: no table shows
    this figure unless it is asked to."""
    given = {figure for arm in arms for cell in arm.experiment.evaluate for name in cell.figures or ()
             for figure in (name, f"{name}_se")}
    for axis in (axis for axis in grid.axes if "." not in axis):
        known = axis in METRICS and axis != "steps"
        if known or axis in given or axis.startswith("planned_") or axis.endswith("_bytes"):
            raise CellError([Problem("Grid", axis, "a figure of the arms has this name", "another name for the axis")])


def _check_distinct(arms: Iterable[Arm]) -> None:
    """No two arms are the same experiment; none has another's name, by which frames and tables know it."""
    seen: dict[str, Arm] = {}
    names: dict[str, Arm] = {}
    for arm in arms:
        if (other := seen.setdefault(arm.id, arm)) is not arm:
            raise CellError([Problem("Grid", "", f"{other.name!r} and {arm.name!r} are the same experiment",
                                     "an axis that changes nothing for one of them? `exclude` the other")])
        if names.setdefault(arm.name, arm) is not arm:
            raise CellError([Problem("Grid", "include", f"two arms that are not the same are called {arm.name!r}",
                                     "an arm that is included has a label of its own on some axis")])


def _check_budgets(grid: Grid, arms: Iterable[Arm]) -> None:
    """Every group of a tuned axis has tried the same number of values."""
    if grid.tune is None:
        return
    counts: dict[tuple[Any, ...], set[str]] = {}
    for arm in arms:
        if arm.group is not None:
            counts.setdefault(arm.group, set()).add(str(arm.labels[grid.tune.axis]))
    if len({len(values) for values in counts.values()}) > 1:
        told = ", ".join(f"{' '.join(map(str, group))}: {len(values)}" for group, values in counts.items())
        raise CellError([Problem("Grid", "tune", f"different numbers of values are tried: {told}",
                                 "the same budget for all; `include` adds arms that are not tuned")])
