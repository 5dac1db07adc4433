"""What DeepSpeed's engine cannot do, and what it alone can; part of `collie_lab.check`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from collie_lab.cells import AdaLomo, Experiment, LibraryOptimizer, Optimizer, Parallel, Problem, RuleCell, Sophia

__all__ = ["deepspeed_problems"]


def deepspeed_problems(experiment: Experiment) -> Iterator[Problem]:
    """What DeepSpeed's engine cannot do, and what it alone can."""
    parallel = experiment.parallel
    if parallel.engine != "deepspeed":
        yield from _only_deepspeed(parallel)
        return
    if importlib.util.find_spec("deepspeed") is None:
        yield Problem("Parallel", "engine", "DeepSpeed's engine needs the package deepspeed",
                      "DS_BUILD_OPS=0 pip install deepspeed")
    yield from _deepspeed_layout(parallel)
    yield from _deepspeed_optimizer(experiment.optimizer, parallel)
    if experiment.training.weights == "bf16":
        yield from _deepspeed_bf16(experiment)


def _only_deepspeed(parallel: Parallel) -> Iterator[Problem]:
    if parallel.offload is not None:
        yield Problem("Parallel", "offload", "torch's engine keeps everything on the device",
                      'engine="deepspeed", or leave `engine` out')
    if parallel.zero == 1:
        yield Problem("Parallel", "zero", "torch's engine shards gradients together with the optimizer's state",
                      'zero=2, or engine="deepspeed"')


def _deepspeed_layout(parallel: Parallel) -> Iterator[Problem]:
    for field in ("tp", "pp"):
        if getattr(parallel, field) > 1:
            yield Problem("Parallel", field, "DeepSpeed's engine is for data-parallel layouts", 'engine="torch"')
    if parallel.shard is not None:
        yield Problem("Parallel", "shard", "DeepSpeed's engine shards over all data-parallel ranks",
                      'engine="torch", or leave it out')
    if parallel.sequence_parallel:
        yield Problem("Parallel", "sequence_parallel", "DeepSpeed's engine has no tensor parallelism that it belongs "
                      "to", 'engine="torch" with `tp`, or leave it out')
    if parallel.offload == "optimizer" and not parallel.zero:
        yield Problem("Parallel", "offload", "with zero=0 the optimizer's state is not DeepSpeed's to move",
                      "zero=1, 2 or 3; on one rank too")
    if parallel.offload == "parameters" and parallel.zero < 3:
        yield Problem("Parallel", "offload", f"with zero={parallel.zero} the weights stay whole on the device",
                      "zero=3; on one rank too")


def _deepspeed_optimizer(cell: Optimizer, parallel: Parallel) -> Iterator[Problem]:
    name = type(cell).__name__
    if isinstance(cell, LibraryOptimizer):
        yield Problem("Parallel", "engine", f"DeepSpeed's engine steps with optimizers of collie_lab, and {name} is "
                      f"{cell.library}'s", "an element-wise one (AdamW, Lion, Adan, SGD), or engine=\"torch\"")
    elif cell.in_backward:
        yield Problem(name, "in_backward", "DeepSpeed averages gradients after an update in the backward pass has "
                      "used them: the result would be wrong, silently", 'in_backward=False, or engine="torch"')
    if isinstance(cell, Sophia):
        yield Problem("Parallel", "engine", "Sophia's Hessian needs a backward pass of its own, which DeepSpeed "
                      "would take for a step's", 'AdamW, Lion, Adan or SGD, or engine="torch"')
    if isinstance(cell, AdaLomo) and parallel.zero:
        yield Problem("Parallel", "zero", "AdaLomo looks at rows and columns of a matrix, and DeepSpeed hands out flat "
                      "pieces of all of them", 'AdamW, Lion, Adan or SGD, or engine="torch"')


def _deepspeed_bf16(experiment: Experiment) -> Iterator[Problem]:
    cell = experiment.optimizer
    if not experiment.parallel.zero:
        yield Problem("Training", "weights", "with zero=0 DeepSpeed would add up gradients in bf16 too",
                      'zero=1, 2 or 3, or engine="torch"')
    elif isinstance(cell, RuleCell) and cell.rounding not in (None, "master"):
        yield Problem(type(cell).__name__, "rounding", "without effect: DeepSpeed keeps bf16 weights with an fp32 "
                      "copy", "leave it out", level="warning")
