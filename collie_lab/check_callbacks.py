"""Callbacks that cannot do what they are for; part of `collie_lab.check`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from collie_lab.cells import (
    BestCheckpoint,
    CallbackCell,
    EarlyStopping,
    Experiment,
    GradientStatistics,
    Monitor,
    Problem,
    Profile,
    RuleCell,
    Statistics,
    WeightStatistics,
)

__all__ = ["callback_problems"]


def callback_problems(experiment: Experiment) -> Iterator[Problem]:
    """Errors and warnings of the built-in callbacks, each with its remedy."""
    cells = [cell for cell in experiment.callbacks if isinstance(cell, CallbackCell)]
    for index, cell in enumerate(cells):
        if any(_same_work(cell, other) for other in cells[:index]):
            yield Problem(type(cell).__name__, "", "two of a kind would do the same work twice", "leave one out")
        if isinstance(cell, BestCheckpoint) and cell.restore and any(
                isinstance(other, BestCheckpoint) and other.restore for other in cells[:index]):
            yield Problem("BestCheckpoint", "restore", "a run has one model at its end, and two figures choose it",
                          "restore=False for one of them")
        if isinstance(cell, Monitor):
            yield from _monitor(cell, experiment)
        if isinstance(cell, Statistics):
            yield from _statistics(cell, experiment)
        if isinstance(cell, Profile) and cell.first > experiment.training.steps:
            yield _warning("Profile", "first", f"without effect within {experiment.training.steps} steps", "lower it")
        package = getattr(cell, "package", None)
        if package is not None and not _installed(package):
            yield Problem("Experiment", "callbacks", f"{type(cell).__name__} needs the package {package}",
                          f"pip install {package}")


def _same_work(cell: CallbackCell, other: CallbackCell) -> bool:
    """Whether two write to one place, or watch one figure."""
    return cell.kind == other.kind and all(
        getattr(cell, name) == getattr(other, name) for name in ("monitor", "folder", "uri", "project", "experiment")
        if name in type(cell).model_fields)


def _installed(package: str) -> bool:
    """Whether a package can be imported: a folder of its name, as W&B makes one, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _monitor(cell: Monitor, experiment: Experiment) -> Iterator[Problem]:
    name, evaluations = type(cell).__name__, experiment.evaluate
    if not evaluations:
        yield Problem(name, "monitor", f"nothing is evaluated, and so there is no {cell.monitor!r}",
                      "evaluate=[lab.Perplexity(every=...)]")
        return
    giving = [each for each in evaluations if each.figures is None or cell.monitor in each.figures]
    if not giving:
        known = dict.fromkeys(figure for each in evaluations for figure in each.figures or ())
        yield Problem(name, "monitor", f"no evaluation gives {cell.monitor!r}", "there are: " + ", ".join(known))
        return
    if cell.direction(evaluations) is None:
        yield Problem(name, "mode", f"it is not known whether less or more of {cell.monitor!r} is better",
                      'mode="min" or mode="max"')
    steps = experiment.training.steps
    if all(each.every is None or each.every >= steps for each in giving):
        yield _warning(name, "monitor", f"without effect: {cell.monitor!r} is found at the end alone",
                       f"{type(giving[0]).__name__}(every=...)")
    elif isinstance(cell, EarlyStopping) and all(
            each.every is None or (cell.patience + 1) * each.every >= steps for each in giving):  # the first improves
        yield _warning(name, "patience", f"without effect: there are too few evaluations within {steps} steps",
                       "lower it, or evaluate more often")


def _statistics(cell: Statistics, experiment: Experiment) -> Iterator[Problem]:
    name, optimizer, parallel = type(cell).__name__, experiment.optimizer, experiment.parallel
    if isinstance(cell, GradientStatistics):
        if isinstance(optimizer, RuleCell) and optimizer.in_backward and parallel.pp == 1:
            yield Problem(name, "", f"{type(optimizer).__name__} updates in backward: its gradients are used and freed "
                          "one by one, and never there together", "WeightStatistics, or in_backward=False")
        if parallel.engine == "deepspeed":
            yield Problem(name, "", "DeepSpeed keeps gradients in flat pieces of its own",
                          'WeightStatistics, or engine="torch"')
    if isinstance(cell, WeightStatistics) and parallel.engine == "deepspeed" and parallel.zero == 3:
        yield Problem(name, "", "DeepSpeed keeps the weights of zero=3 in flat pieces of its own",
                      'zero=2, or engine="torch"')
    if cell.every > experiment.training.steps:
        yield _warning(name, "every", f"without effect: there are {experiment.training.steps} steps")


def _warning(cell: str, field: str, message: str, remedy: str = "") -> Problem:
    return Problem(cell, field, message, remedy, level="warning")
