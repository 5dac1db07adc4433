"""What the launcher's tests share, in the test process and in the kernels that they start."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

import collie_lab as lab
from collie_lab.launch import Run, launch

#: Marks all processes of one test by their environment, also those that have lost their parents.
MARK = "COLLIE_LAB_TEST"


def experiment(*callbacks: Callable[..., Any], steps: int = 1, ranks: int = 2) -> lab.Experiment:
    return lab.Experiment(model=lab.Model("llama-tiny", init="random"), parallel=lab.Parallel(dp=ranks),
                          training=lab.Training(steps=steps), callbacks=callbacks, name="toy")


def start(mark: str, folder: Path | str, *callbacks: Callable[..., Any], steps: int = 1, ranks: int = 2,
          **options: Any) -> Run:
    """Launch callbacks on ranks without a model: no data are prepared and nothing is drawn."""
    options = {"wait": False, "show": False, "_module": "toy_worker", "env": {MARK: mark}, **options}
    with mock.patch("collie_lab.launch._start._prepare"):
        return launch(experiment(*callbacks, steps=steps, ranks=ranks), folder=folder, **options)


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


def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Raises where the condition does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.02)


def assert_gone(mark: str, seconds: float = 5.0, variable: str = MARK) -> None:
    wait_until(lambda: not processes(mark, variable), seconds)
