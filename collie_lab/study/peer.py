"""A study's peer: transformers' Trainer on an experiment, as a rank of a run.

`python -m collie_lab.study.peer <run folder>`, started as `collie_lab.training.worker` is, with the same contract: the
run folder gets the same files. The model is transformers' own, as it comes; its first weights are ours (but for those
that DeepSpeed draws in shards). Sequences, their order, micro-batches, learning rate, decay and clipping are those of
the experiment. The Trainer gets what makes it fast: a fused AdamW, no log that waits for the device, batches padded to
their longest row, and with `engine="deepspeed"` the configuration that transformers advises.

`Training.compile` is its `torch_compile`: the whole model is compiled, where ours compiles the blocks.

What differs: packed documents share a padded row, kept apart by a mask; logits are made whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from collie_lab import rank
from collie_lab.cells import AdamW, CellError, Experiment, Problem
from collie_lab.folder import JsonLines, RunFolder

if TYPE_CHECKING:
    import torch

__all__ = ["MODULE", "check", "main", "problems", "run"]

#: The module that every rank runs.
MODULE: Final = "collie_lab.study.peer"


def check(experiment: Experiment) -> None:
    """Raise CellError where the Trainer would not do what the experiment says."""
    if found := list(problems(experiment)):
        raise CellError(found)


def problems(experiment: Experiment) -> Iterator[Problem]:
    """What the Trainer cannot do of an experiment, or would do in another way."""
    yield from _layout(experiment)
    yield from _recipe(experiment)
    for field in ("evaluate", "callbacks", "adapter"):
        if getattr(experiment, field):
            yield Problem("Experiment", field, "transformers' Trainer is run for its losses, speed and memory in full "
                          "training alone", "leave it out, or `runner: collie_lab`")


def _layout(experiment: Experiment) -> Iterator[Problem]:
    parallel, training = experiment.parallel, experiment.training
    for field in ("tp", "pp"):
        if getattr(parallel, field) > 1:
            yield Problem("Parallel", field, "transformers' Trainer is run with data-parallel layouts", f"{field}=1")
    if parallel.zero and parallel.engine == "torch":
        yield Problem("Parallel", "zero", "transformers' Trainer shards by DeepSpeed here", 'engine="deepspeed"')
    if parallel.offload is not None:
        yield Problem("Parallel", "offload", "DeepSpeed would step with an optimizer of its own on the host",
                      "leave it out")
    sharded = parallel.engine == "deepspeed" and parallel.zero > 0
    if sharded and training.precision != ("bf16" if training.weights == "bf16" else "fp32"):
        yield Problem("Training", "weights", "DeepSpeed, as the Trainer calls it, computes in the type of the "
                      "weights", 'weights="bf16" with precision="bf16": it keeps an fp32 copy')
    if parallel.engine == "deepspeed" and training.compile:
        yield Problem("Training", "compile", "transformers' Trainer is compiled without DeepSpeed here",
                      "compile=False")
    if not sharded and training.weights == "bf16":
        yield Problem("Training", "weights", "the Trainer rounds bf16 weights to nearest, which loses updates",
                      'weights="fp32"; or engine="deepspeed" with zero, which keeps an fp32 copy')


def _recipe(experiment: Experiment) -> Iterator[Problem]:
    cell, training = experiment.optimizer, experiment.training
    name = type(cell).__name__
    if not isinstance(cell, AdamW):
        yield Problem("Experiment", "optimizer", f"the Trainer is run with AdamW, not with {name}", "lab.AdamW(...)")
    elif cell.in_backward or cell.rounding not in (None, "master"):
        yield Problem(name, "in_backward" if cell.in_backward else "rounding", "the Trainer's AdamW cannot do this",
                      "leave it out")
    if cell.lr_scale:
        yield Problem(name, "lr_scale", "the Trainer has one learning rate", "leave it out")
    for field in ("export", "checkpoint_every", "loss", "clip_grad_value"):
        if getattr(training, field):
            yield Problem("Training", field, "the Trainer is run for its losses, speed and memory alone",
                          "export=False" if field == "export" else "leave it out")


def main() -> None:
    """Train one rank's part; errors and output go to the run folder."""
    folder = RunFolder(sys.argv[1])
    with rank.enter(folder):
        from collie_lab.code import load_experiment

        experiment = load_experiment(folder)
        check(experiment)
        train(experiment, folder)
    rank.leave()


def train(experiment: Experiment, folder: RunFolder) -> None:
    """Join the other ranks, let the Trainer run, leave."""
    from collie_lab.training.worker import joined

    with joined() as device:
        run(experiment, folder, device)


def run(experiment: Experiment, folder: RunFolder, device: torch.device) -> None:
    """Have the Trainer run an experiment whose data are prepared, on ranks that have joined."""
    from collie_lab.study._peer_trainer import PeerTrainer, Watch, sizes
    from collie_lab.training.ending import ending
    from collie_lab.training.memory import worst_rank
    from collie_lab.training.provenance import provenance

    began, number, parallel = time.perf_counter(), int(os.environ.get("RANK", "0")), experiment.parallel
    for name in ("accelerate", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.closing(JsonLines(folder.path / "events.jsonl")) as events:

        def event(kind: str, **fields: Any) -> None:
            if number == 0:
                events.append({"time": time.time(), "kind": kind, **fields})

        if number == 0:
            folder.write("env.json", provenance(experiment.training.seed))
        event("phase", text="loading the model")
        counts, flops = sizes(experiment)
        watch = Watch(experiment, folder, device, flops)
        trainer = PeerTrainer(experiment, folder, watch)
        event("start", step=0, steps=experiment.training.steps, world_size=parallel.world_size,
              device=str(device.type), runner="transformers", **counts)
        trainer.train()
        status, reason = watch.end()
        result = {"status": status, "steps": watch.step, **watch.meters.summary(),
                  **worst_rank(watch.memory.peak_bytes, {}, device), "seconds": time.perf_counter() - began,
                  "world_size": parallel.world_size, **counts, **ending(status, reason, folder)}
        if number == 0:
            folder.write("result.json", result)
        event("end")


if __name__ == "__main__":
    main()
