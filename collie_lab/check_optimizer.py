"""Conflicts of the optimizer with the rest of an experiment; part of `collie_lab.check`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from collie_lab.cells import (
    SGD,
    AdaLomo,
    AdamW8bit,
    Adan,
    Experiment,
    Freeze,
    LibraryOptimizer,
    Lomo,
    Problem,
    RuleCell,
    ScheduleFree,
    Sophia,
)
from collie_lab.size import find_size

__all__ = ["matrix_problems", "optimizer_problems"]


def optimizer_problems(experiment: Experiment) -> Iterator[Problem]:
    """Errors and warnings, each with its remedy."""
    cell = experiment.optimizer
    if experiment.training.weights == "bf16" and experiment.training.precision != "bf16":
        yield Problem("Training", "weights", "bf16 weights compute in bf16", 'precision="bf16" too')
    if isinstance(cell, LibraryOptimizer):
        yield from _library(cell, experiment)
    if isinstance(cell, RuleCell):
        if cell.in_backward:
            yield from _in_backward(cell, experiment)
        yield from _without_effect(cell, experiment)
    yield from _advice(experiment)


def matrix_problems(experiment: Experiment) -> Iterator[Problem]:
    """Whether an optimizer for the matrices of blocks has any to train, where the patterns of `Freeze` decide that.

    A process of its own looks at the model, which takes some seconds; nothing is asked of it in other cases.
    """
    optimizer, adapter = experiment.optimizer, experiment.adapter
    if not (isinstance(optimizer, LibraryOptimizer) and optimizer.for_matrices and isinstance(adapter, Freeze)):
        return
    if not find_size(experiment).matrices:
        yield Problem("Freeze", "train", f"{type(optimizer).__name__} is for the matrices of blocks, and "
                      f"{', '.join(adapter.train)} names none", 'a pattern for some of them, such as "*mlp*"; or AdamW')


def _library(cell: LibraryOptimizer, experiment: Experiment) -> Iterator[Problem]:
    name = type(cell).__name__
    if cell.in_backward:
        yield Problem(name, "in_backward", f"{cell.library}'s optimizer updates all parameters at once",
                      "leave it out, or use an optimizer of collie_lab (AdaLomo, Lomo, AdamW, ...)")
    if importlib.util.find_spec(cell.package) is None:
        yield Problem("Experiment", "optimizer", f"{name} needs the package {cell.library}",
                      f"pip install {cell.library}")
    if experiment.parallel.zero and not cell.shardable:
        yield Problem("Parallel", "zero", f"{name} cannot update sharded parameters: {cell.why_whole}",
                      "zero=0, or an optimizer of collie_lab")
    if experiment.training.weights == "bf16" and not isinstance(cell, AdamW8bit):
        yield _warning("Training", "weights", f"{name} rounds bf16 weights to nearest, which loses small updates",
                       'weights="fp32", or an optimizer of collie_lab')


def _in_backward(cell: RuleCell, experiment: Experiment) -> Iterator[Problem]:
    training, name = experiment.training, type(cell).__name__
    several = _micro_batches(experiment) > 1
    linear = isinstance(cell, Lomo) or (isinstance(cell, SGD) and not cell.momentum)
    if cell.accumulate is None and several and experiment.parallel.pp == 1:
        each = ', or accumulate="each" (updates with every micro-batch)' if linear else ""
        yield Problem("Training", "micro_batch_size", f"{name} updates in the backward pass: gradients of several "
                      "micro-batches are not added up",
                      f'leave it out, or {name}(accumulate="hold") (exact, with the memory of all gradients){each}')
    if cell.accumulate == "each" and not linear:
        yield Problem(name, "accumulate", "updates with parts of a gradient do not add up to the update with the "
                      "whole: they would move the weights several times too far", 'accumulate="hold"')
    if cell.accumulate == "each" and training.clip_grad_value is not None:
        yield Problem("Training", "clip_grad_value", "the clipped parts of a gradient do not add up to the clipped "
                      "whole", 'accumulate="hold", or in_backward=False')
    if cell.accumulate is not None and training.clip_grad_norm is not None and experiment.parallel.pp == 1:
        yield Problem("Training", "clip_grad_norm", "the norm of an accumulated gradient is known only when all of it "
                      "is there", "clip_grad_value, or in_backward=False")


def _without_effect(cell: RuleCell, experiment: Experiment) -> Iterator[Problem]:
    training, name = experiment.training, type(cell).__name__
    given = cell.chosen
    if "clip_by" in given and not (cell.in_backward and training.clip_grad_norm):
        yield _warning(name, "clip_by", "without effect unless clip_grad_norm is set, in backward")
    elif cell.clip_by == "previous_norm" and experiment.parallel.pp > 1:
        yield _warning(name, "clip_by", "without effect in a pipeline: held gradients are clipped by their own norm")
    if cell.accumulate and not cell.in_backward:
        yield _warning(name, "accumulate", "without effect: micro-batches add up anyway outside of backward")
    elif cell.accumulate and _micro_batches(experiment) == 1:
        yield _warning(name, "accumulate", "without effect: a step is one micro-batch", "set Training.micro_batch_size")
    added = experiment.adapter is not None and not isinstance(experiment.adapter, Freeze)
    if "rounding" in given and (training.weights == "fp32" or added):
        which = "fp32 weights" if not added else "an adapter's weights, which are fp32"
        yield _warning(name, "rounding", f"without effect on {which}", 'Training(weights="bf16", precision="bf16")')
    if isinstance(cell, Adan) and cell.restart_every and cell.restart_every >= training.steps:
        yield _warning(name, "restart_every", f"no restart within {training.steps} steps")


def _micro_batches(experiment: Experiment) -> int:
    """Of a step and data-parallel rank."""
    training, parallel = experiment.training, experiment.parallel
    share = max(1, training.batch_size // parallel.dp)
    return max(1, share // max(1, parallel.micro_batch_size(training.batch_size, training.micro_batch_size)))


def _advice(experiment: Experiment) -> Iterator[Problem]:
    cell, training = experiment.optimizer, experiment.training
    if isinstance(cell, Sophia) and cell.hessian_every >= training.steps:
        yield _warning("Sophia", "hessian_every", f"no Hessian within {training.steps} steps: sign momentum",
                       "lower it, or use Lion")
    if isinstance(cell, Sophia) and training.loss is not None:
        yield _warning("Training", "loss", "Sophia's Hessian stays that of cross-entropy, on labels that the model "
                       "draws")
    if isinstance(cell, AdaLomo) and training.clip_grad_norm is not None:
        cost = ", and costs a second forward and backward pass" if cell.in_backward else ""
        yield _warning("Training", "clip_grad_norm", "AdaLomo's update hardly depends on the size of a gradient: "
                       f"clipping its norm does little{cost}", "leave it out")
    if isinstance(cell, ScheduleFree) and (training.schedule != "constant" or training.warmup):
        yield _warning("Training", "schedule", "Schedule-Free replaces the schedule by an average",
                       "schedule='constant', and ScheduleFree(warmup_steps=...) for a warm-up")


def _warning(cell: str, field: str, message: str, remedy: str = "") -> Problem:
    return Problem(cell, field, message, remedy, level="warning")
