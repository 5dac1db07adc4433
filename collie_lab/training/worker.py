"""The entry of every rank: `python -m collie_lab.training.worker <run folder>`, started by torchrun."""

from __future__ import annotations

import sys

from collie_lab import rank
from collie_lab.folder import RunFolder

__all__ = ["main"]


def main() -> None:
    """Train one rank's part; errors and output go to the run folder."""
    folder = RunFolder(sys.argv[1])
    with rank.enter(folder):
        train(folder)
    rank.leave()


def train(folder: RunFolder) -> None:
    """Join the other ranks, run the experiment, leave."""
    # Only here: the rank must be armed, and its output redirected, before the slow imports.
    import gc
    import os

    import torch
    import torch.distributed as dist

    from collie_lab.code import load_experiment
    from collie_lab.training.provenance import provenance
    from collie_lab.training.trainer import Trainer

    gc.freeze()  # what was imported is never garbage: no collection need look at it again
    local_rank, world_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    experiment = load_experiment(folder)
    if int(os.environ.get("RANK", "0")) == 0:
        folder.write("env.json", provenance(experiment.training.seed))
    try:
        Trainer(experiment, folder, device).run()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
