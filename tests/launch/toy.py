"""What the launcher's tests share, in the test process and in the kernels that they start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import collie_lab as lab
from collie_lab.launch import Run, launch
from tests.processes import MARK, assert_gone, processes, wait_until

__all__ = ["MARK", "assert_gone", "experiment", "processes", "start", "wait_until"]


def experiment(*callbacks: Callable[..., Any], steps: int = 1, ranks: int = 2) -> lab.Experiment:
    return lab.Experiment(model=lab.Model("llama-tiny", init="random"), parallel=lab.Parallel(dp=ranks),
                          training=lab.Training(steps=steps), callbacks=callbacks, name="toy")


def start(mark: str, folder: Path | str, *callbacks: Callable[..., Any], steps: int = 1, ranks: int = 2,
          **options: Any) -> Run:
    """Launch callbacks on ranks without a model: no data are prepared and nothing is drawn."""
    options = {"wait": False, "show": False, "_module": "toy_worker", "env": {MARK: mark}, **options}
    with mock.patch("collie_lab.launch._start._prepare"):
        return launch(experiment(*callbacks, steps=steps, ranks=ranks), folder=folder, **options)
