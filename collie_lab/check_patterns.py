"""Patterns of parameters' names that match nothing; part of `collie_lab.check`, which builds no model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from collie_lab.cells import AddedAdapter, Experiment, Freeze, Problem, Statistics
from collie_lab.data.tensor_names import EMBEDDING, HEAD, parameter_names

__all__ = ["pattern_problems"]


def pattern_problems(experiment: Experiment) -> Iterator[Problem]:
    """Patterns that match no parameter, or none that is trained, where the names are known before a model is built.

    Adapters, pipelines and DeepSpeed call parameters otherwise: there a rank tells.
    """
    adapter, optimizer, parallel = experiment.adapter, experiment.optimizer, experiment.parallel
    statistics = [cell for cell in experiment.callbacks if isinstance(cell, Statistics)]
    if not (isinstance(adapter, Freeze) or optimizer.lr_scale or any(cell.groups for cell in statistics)):
        return
    names = parameter_names(experiment.model)
    if names is None or isinstance(adapter, AddedAdapter):
        return
    if isinstance(adapter, Freeze):
        wrong = [pattern for pattern in adapter.train if not _match([pattern], names)]
        for pattern in wrong:
            yield _problem("Freeze", "train", f"no parameter of {experiment.model.source}", pattern, names)
        names = _trained(adapter, names)
        if wrong:
            return
    if parallel.pp > 1 or parallel.engine == "deepspeed":
        return
    for pattern in optimizer.lr_scale:
        if not _match([pattern], names):
            yield _problem(type(optimizer).__name__, "lr_scale", "no trained parameter", pattern, names)
    for cell in statistics:
        for group in cell.groups.values():
            if not _match([group] if isinstance(group, str) else group, names):
                yield _problem(type(cell).__name__, "groups", "no trained parameter", group, names)


def _match(patterns: Sequence[str], names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _trained(cell: Freeze, names: tuple[str, ...]) -> tuple[str, ...]:
    """What `Freeze` leaves; of an embedding that may be tied to the head, both names."""
    trained = {name for name in names if _match(cell.train, [name])}
    return tuple(trained | ({EMBEDDING, HEAD} if trained & {EMBEDDING, HEAD} else set()))


def _problem(cell: str, field: str, what: str, pattern: str | tuple[str, ...], names: Iterable[str]) -> Problem:
    there = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
    return Problem(cell, field, f"{what} matches {pattern!r}", "there are: " + ", ".join(there))
