"""The entry of every rank: `python -m collie_lab.training.worker <run folder>`, started by torchrun."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from collie_lab import rank
from collie_lab.folder import RunFolder

if TYPE_CHECKING:
    import torch

__all__ = ["join", "joined", "main", "run"]


def main() -> None:
    """Train one rank's part; errors and output go to the run folder."""
    folder = RunFolder(sys.argv[1])
    with rank.enter(folder):
        train(folder)
    rank.leave()


def train(folder: RunFolder) -> None:
    """Join the other ranks, run the experiment, leave."""
    with joined() as device:
        run(folder, device)


@contextlib.contextmanager
def joined() -> Iterator[torch.device]:
    """Within it, this rank has joined the others; it gives the rank's device.

    After a failure it does not leave them: that may hang or abort, and nobody would ever hear of the error.
    """
    # Only here: the rank must be armed, and its output redirected, before the slow imports.
    import torch.distributed as dist

    yield join()
    if dist.is_initialized():
        dist.destroy_process_group()


def join() -> torch.device:
    """Import what a run needs, take this rank's device, and join the other ranks, where there are any."""
    import gc
    import os

    gc.disable()  # what is imported is never garbage: a tenth of the time would go to looking for some
    import torch
    import torch.distributed as dist

    import collie_lab.training.trainer  # noqa: F401

    gc.freeze()  # nor need any later collection look at it
    gc.enable()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() \
        else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def run(folder: RunFolder, device: torch.device) -> None:
    """Run the experiment of a folder on ranks that have joined."""
    import os

    from collie_lab.code import load_experiment
    from collie_lab.training.provenance import provenance
    from collie_lab.training.trainer import Trainer

    experiment = load_experiment(folder)
    if int(os.environ.get("RANK", "0")) == 0:
        folder.write("env.json", provenance(experiment.training.seed))
    Trainer(experiment, folder, device).run()


if __name__ == "__main__":
    main()
