"""A notebook's cell on a rank: its namespace, its output, its exception."""

from __future__ import annotations

import ast
import contextlib
import linecache
import os
import pickle
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from collie_lab import rank

__all__ = ["Session"]


class Session:
    """The names that cells share on one rank: at first `rank`, `world_size`, `device`, `torch` and `dist`."""

    def __init__(self, device: torch.device):
        self._rank = int(os.environ.get("RANK", "0"))
        self._names: dict[str, Any] = {
            "__name__": "__main__", "rank": self._rank, "world_size": int(os.environ.get("WORLD_SIZE", "1")),
            "device": device, "torch": torch, "dist": dist,
        }

    def do(self, command: Mapping[str, Any], place: Path, index: int) -> dict[str, Any]:
        """Do what a command says; what was raised, as `type`, `message` and `traceback`, or nothing."""
        out, err = (place / f"rank-{self._rank}.{stream}" for stream in ("out", "err"))
        with rank.lend_output(out, err):
            try:
                with _interruptible():
                    match command["kind"]:
                        case "cell":
                            self._execute(command["code"], f"<%%ranks, cell {index}>")
                        case "push":
                            self._names |= pickle.loads((place / "values.pkl").read_bytes())
                        case "pull":
                            self._pull(command, place)
            except (Exception, KeyboardInterrupt, SystemExit) as error:
                return rank.account(error, __file__)
        return {}

    def _execute(self, code: str, name: str) -> None:
        """Run a cell; the value of an expression that stands last is printed, as a notebook would show it."""
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)  # for tracebacks
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), self._names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), self._names)
            if value is not None:
                print(repr(value))

    def _pull(self, command: Mapping[str, Any], place: Path) -> None:
        """Write a value for the notebook, tensors on the CPU. All ranks evaluate it: a sharded one is whole then."""
        value = tree_map(_on_cpu, eval(command["name"], self._names))
        if self._rank in command["ranks"]:
            (place / f"rank-{self._rank}.pkl").write_bytes(cloudpickle.dumps(value))


def _on_cpu(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Within it, SIGINT raises KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        sys.stdout.flush()
