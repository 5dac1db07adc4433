"""Functions in processes of their own, forked from this one, as many at once as there are cores."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from collie_lab.machine import usable_cpus
from collie_lab.rank import die_with_parent

__all__ = ["DryRunError", "apart"]

T = TypeVar("T")


class DryRunError(RuntimeError):
    """What a function raised in its process, or how that ended without an answer."""


def apart(functions: Sequence[Callable[[], T]]) -> list[T]:
    """What the functions return, in their order.

    Raises:
        DryRunError: one of them failed, or its process was ended.
    """
    waiting, running, answers = list(enumerate(functions)), dict[int, tuple[int, int]](), dict[int, T]()
    while waiting or running:
        while waiting and len(running) < usable_cpus():
            place, function = waiting.pop(0)
            running[place] = _begin(function)
        place, (child, pipe) = next(iter(running.items()))  # the oldest: its answer may be larger than a pipe holds
        with os.fdopen(pipe, "rb") as reader:
            content = reader.read()
        _, status = os.waitpid(child, 0)
        del running[place]
        if status or not content:
            raise DryRunError(f"torch ended the process of the dry run ({status}): one of the model's operators has no "
                              "fake version")
        failed, value = pickle.loads(content)
        if failed:
            raise DryRunError(value)
        answers[place] = value
    return [answers[place] for place in range(len(functions))]


def _begin(function: Callable[[], Any]) -> tuple[int, int]:
    """The number of the process, and where its answer will be."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    status = 1
    try:
        die_with_parent()
        os.close(reader)
        _renew_pool()
        try:
            answer = (False, function())
        except Exception as error:
            answer = (True, str(error) if isinstance(error, DryRunError) else f"{type(error).__name__}: {error}")
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(answer, pipe)
        status = 0
    finally:
        os._exit(status)


def _renew_pool() -> None:
    """A fork leaves torch's pool of threads to be made anew by whoever wants it next. That is not safe to do twice at
    once, and autograd's own thread may want it when this one does: torch then ends the process ("Invalid thread pool!",
    in one of ten dry runs by torch 2.11). So it is made while there is no other thread."""
    import torch

    torch.set_num_threads(torch.get_num_threads())
