"""Layouts and batches in words, for tables and figures of plans."""

from __future__ import annotations

from collie_lab.cells import Experiment, Parallel

__all__ = ["batches_text", "layout_text", "uncompiled_text"]


def layout_text(cell: Parallel) -> str:
    """`dp=4 zero=3 tp=2`; of one rank: `one rank`."""
    axes = {"dp": cell.dp, "zero": cell.zero, "tp": cell.tp, "pp": cell.pp}
    return " ".join(f"{name}={size}" for name, size in axes.items() if size > (name != "zero")) or "one rank"


def batches_text(experiment: Experiment) -> tuple[str, str]:
    """The micro-batch, and the recomputation."""
    training = experiment.training
    micro = experiment.parallel.micro_batch_size(training.batch_size, training.micro_batch_size)
    return f"micro-batches of {micro}", "recomputing" if training.recompute == "full" else "not recomputing"


def uncompiled_text(experiment: Experiment) -> str:
    """What is said of figures of an experiment that will be compiled: the steps they are of are not, for what the
    compiler will make of a block is known when it has made it. Empty for others."""
    if not experiment.training.compile:
        return ""
    return "; of steps without compile=True, which takes less time and seldom more memory: it is not forecast"
