"""Processes of a test: found again by a mark in their environment, also those that have lost their parents."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

__all__ = ["MARK", "assert_gone", "marked", "processes", "wait_until"]

#: The variable that carries the mark.
MARK = "COLLIE_LAB_TEST"


@contextmanager
def marked(seconds: float = 0.0) -> Iterator[str]:
    """A new mark, for the environment; no process that carries it may be left so many seconds after the end."""
    mark = uuid.uuid4().hex
    try:
        yield mark
        assert_gone(mark, seconds)
    finally:
        left = processes(mark)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=5)


def processes(mark: str, variable: str = MARK) -> list[psutil.Process]:
    """The living processes of a test: supervisor, torchrun, ranks and their children.

    With `variable="RANK"` only the ranks and their children.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environ = process.environ()
            if environ.get(MARK) == mark and variable in environ and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    """Raises where the condition does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.02)


def assert_gone(mark: str, seconds: float = 5.0, variable: str = MARK) -> None:
    """Raises where a process of a test is left so many seconds from now."""
    end = time.monotonic() + seconds
    while left := processes(mark, variable):
        assert time.monotonic() < end, f"left behind: {left}"
        time.sleep(0.02)
