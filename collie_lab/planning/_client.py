"""The kernel's side of dry runs: one process that answers, started with the first question."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import yaml

import collie_lab
from collie_lab import code
from collie_lab.cells import Experiment

__all__ = ["PlanError", "ask"]


class PlanError(RuntimeError):
    """The step of an experiment cannot be run on tensors without values."""


_lock = threading.Lock()
_process: subprocess.Popen[str] | None = None


def ask(experiment: Experiment, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The summaries of some dry runs of one experiment: for each, what `forecast` wants to know of it.

    Raises:
        PlanError: a dry run failed; a rank would have failed for the same reason, or torch has no fake of an operator.
    """
    mapping, packed = code.pack(experiment)
    with tempfile.TemporaryDirectory(prefix="collie-plan-") as folder, _lock:
        Path(folder, "experiment.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False), encoding="utf-8")
        if packed:
            Path(folder, "code.pkl").write_bytes(packed)
        return _asked({"folder": folder, "cwd": os.getcwd(), "ranks": ranks})


def _asked(request: dict[str, Any]) -> list[dict[str, Any]]:
    process = _running()
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BaseException:  # an interrupt: the answer under way would be taken for the next one's
        _stop(process)
        raise
    if not line:
        _stop(process)
        raise PlanError("the process of the dry runs has ended")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise PlanError(answer["error"])
    summaries: list[dict[str, Any]] = answer["summaries"]
    return summaries


def _running() -> subprocess.Popen[str]:
    global _process
    if _process is None or _process.poll() is not None:
        if _process is None:
            atexit.register(lambda: None if _process is None else _stop(_process))
        root = str(Path(collie_lab.__file__).resolve().parent.parent)
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        _process = subprocess.Popen(
            [sys.executable, "-m", "collie_lab.planning._worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, encoding="utf-8", start_new_session=True,  # no interrupts
            env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    return _process


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
