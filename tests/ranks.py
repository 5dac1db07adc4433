"""Run a function on several gloo ranks in new processes, or in this one."""

from __future__ import annotations

import atexit
import functools
import gc
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from collie_lab.cells import Experiment
from collie_lab.data import prepare
from collie_lab.folder import RunFolder
from collie_lab.rank import leave

__all__ = ["losses", "run_here", "run_ranks"]

_ROOT = Path(__file__).parents[1]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> None:
    """Call `function(*args)` on every rank of a gloo group; exceptions come through.

    The processes are forked from one that has imported `tests.preloaded`, and done nothing else.
    """
    _start_forkserver()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_enter, (world_size, folder, function, args), nprocs=world_size, start_method="forkserver")


@functools.cache
def _start_forkserver() -> None:
    """Tests change their folder, and the server looks for modules where it is started, or in `PYTHONPATH`."""
    multiprocessing.set_forkserver_preload(["tests.preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(_ROOT), prepend=os.pathsep)
        forkserver.ensure_running()


def _enter(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        function(*args)
    finally:
        dist.destroy_process_group()
    leave()


def run_here(experiment: Experiment, folder: Path, resume: Path | None = None) -> RunFolder:
    """Train in this process (or on this rank of a group), without a launcher; the run folder."""
    from collie_lab.training.trainer import Trainer

    _freeze()
    run = RunFolder(folder)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        for sub in (run.path, run.checkpoints):
            sub.mkdir(parents=True, exist_ok=True)
        prepare(experiment, run)
        run.write("launch.json", {"resume_from": str(resume) if resume else None})
    if dist.is_initialized():
        dist.barrier()
    Trainer(experiment, run, torch.device("cpu")).run()
    return run


@functools.cache
def _freeze() -> None:
    """Take the modules of a training run out of what every run's garbage collections, a third of its time, look at."""
    import peft  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


def losses(run: RunFolder) -> list[float]:
    """The loss of every step, in order."""
    lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]
