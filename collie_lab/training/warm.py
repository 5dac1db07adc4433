"""The entry of a pool's ranks: `python -m collie_lab.training.warm <pool folder>`, started by torchrun.

They import torch, join the process group, and then do what the pool's folder tells them, one command after another:
run an experiment, or a notebook's cell. How a command ended stands in `done/`; a run that fails ends the ranks.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from collie_lab import rank
from collie_lab.commands import Commands
from collie_lab.folder import RunFolder, read_json, write_json

if TYPE_CHECKING:
    import torch

__all__ = ["main"]

#: Seconds between two looks for the next command.
_POLL: Final = 0.005


def main() -> None:
    """Serve until the pool's end."""
    folder = RunFolder(sys.argv[1])
    with rank.enter(folder):
        _serve(Commands(folder))


def _serve(commands: Commands) -> None:
    from collie_lab.training import last_model
    from collie_lab.training.cell import Session
    from collie_lab.training.worker import join

    last_model.keep()
    number = int(os.environ.get("RANK", "0"))
    device = join()
    session = Session(device)
    for index in itertools.count(1):
        command = _await(commands, index)
        if command["kind"] == "run":
            _run(RunFolder(command["folder"]), device)
            outcome: dict[str, Any] = {}
        else:
            outcome = session.do(command, commands.place(index), index)
        write_json(commands.done(index, number), outcome)


def _await(commands: Commands, index: int) -> dict[str, Any]:
    path = commands.path(index)
    while not path.exists():
        time.sleep(_POLL)
    return read_json(path)


def _run(folder: RunFolder, device: torch.device) -> None:
    """An experiment, as a process of its own would run it; what it has left in memory is given back."""
    import gc

    import torch

    from collie_lab.training.worker import run

    launch = folder.read("launch.json")
    os.chdir(launch["cwd"])  # relative paths mean the same
    sys.path[:] = dict.fromkeys([*launch["sys_path"], *sys.path])
    with rank.lend(folder):
        with _as_before():
            run(folder, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """What a run that goes well sets in torch for the whole process is not for the next one. (After a failure the ranks
    end.)"""
    import torch
    from torch.backends import cudnn

    settings: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (torch.get_default_dtype, torch.set_default_dtype), (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_default_device, lambda _: torch.set_default_device(None)),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        *[(functools.partial(getattr, place, name), functools.partial(setattr, place, name))
          for place, name in ((cudnn, "benchmark"), (cudnn, "deterministic"), (torch.backends, "fp32_precision"),
                              (torch.backends.cuda.matmul, "fp32_precision"))],
    ]
    before: list[tuple[Any, Callable[[], Any], Callable[[Any], Any]]] = []
    for get, set_ in settings:
        with contextlib.suppress(RuntimeError):  # torch refuses its older precision settings beside the newer
            before.append((get(), get, set_))
    yield
    for value, get, set_ in reversed(before):  # the newer first
        with contextlib.suppress(RuntimeError):
            if get() != value:
                set_(value)


if __name__ == "__main__":
    main()
