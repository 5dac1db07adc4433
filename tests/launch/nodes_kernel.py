"""The notebook's process on the first of several machines: `nodes_kernel.py <mark> <folder> <callback> <options>`.

It launches, waits for the end and prints what became of the run as one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import toy  # noqa: E402

import collie_lab as lab  # noqa: E402

EXPERIMENT = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), data=lab.Skills(size=100, test_size=10, packing=True, max_length=64),
    training=lab.Training(steps=3, batch_size=4, export=False), name="real")


def reduces(trainer: Any) -> None:
    import torch
    import torch.distributed as dist

    trainer.barrier()
    total = torch.tensor(trainer.rank + 1)
    dist.all_reduce(total)
    print(int(total), os.environ["GLOO_SOCKET_IFNAME"], os.environ["OF_THE_LAUNCH"], os.getcwd())


def steps_slowly(trainer: Any) -> None:
    (trainer.folder.path / f"began-{trainer.rank}").touch()
    time.sleep(0.1)


def fails_on_rank_1(trainer: Any) -> None:
    trainer.barrier()
    if trainer.rank == 1:
        raise ValueError("the loss is upside down")  # this line is shown
    trainer.barrier()


def hangs(trainer: Any) -> None:
    """Rank 0 waits in a collective for rank 1, which never comes; both have forked children."""
    trainer.barrier()
    if os.fork() == 0:
        time.sleep(100)
    (trainer.folder.path / f"began-{trainer.rank}").touch()
    if trainer.rank == 1:
        hangs_here()
    trainer.barrier()


def hangs_here() -> None:
    time.sleep(100)


def main() -> None:
    mark, folder, callback, text = sys.argv[1:]
    options = json.loads(text)
    nodes = lab.Nodes(**options.pop("nodes"))
    with mock.patch("collie_lab.launch._nodes.SILENCE", options.pop("silence", 15.0)):
        if callback == "real":
            run = EXPERIMENT.with_("parallel.dp", 2).launch(nodes=nodes, folder=folder, wait=False, show=False,
                                                            env={toy.MARK: mark})
        else:
            options["env"] = {toy.MARK: mark, "OF_THE_LAUNCH": "yes"}
            run = toy.start(mark, folder, globals()[callback], nodes=nodes, **options)
    run.wait(timeout=120)
    error = run.error
    print(json.dumps({"status": run.status, "detail": run.detail, "steps": run.steps, "error": str(error or ""),
                      "rank": error.rank if error else None}))


if __name__ == "__main__":
    main()
