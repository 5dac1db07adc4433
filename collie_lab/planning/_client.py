"""The kernel's side of dry runs: a process that answers, started with the first question, and more of them for what is
asked at once; another one of the lowest priority for what nobody waits for."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

import collie_lab
from collie_lab import code
from collie_lab.cells import Experiment
from collie_lab.machine import usable_cpus

__all__ = ["AT_ONCE", "PlanError", "ask", "rest"]

#: So many dry runs can be under way, each in a process of its own of half a gigabyte and more.
AT_ONCE: Final = min(4, usable_cpus())


class PlanError(RuntimeError):
    """The step of an experiment cannot be run on tensors without values."""


@dataclass
class _Worker:
    """One process; not there before it is asked."""

    niceness: int
    process: subprocess.Popen[str] | None = None


def _workers(count: int, niceness: int) -> queue.LifoQueue[_Worker]:
    """Those that nobody is asking; the last that was asked comes first, for its process is there."""
    idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
    for _ in range(count):
        idle.put(_Worker(niceness))
    return idle


_IDLE: Final = {False: _workers(AT_ONCE, 0), True: _workers(1, 19)}


@contextlib.contextmanager
def _turn(quiet: bool) -> Iterator[_Worker]:
    """A worker of one's own, as soon as there is one."""
    worker = _IDLE[quiet].get()
    try:
        yield worker
    finally:
        _IDLE[quiet].put(worker)


def ask(experiment: Experiment, ranks: list[dict[str, Any]], quiet: bool = False) -> list[dict[str, Any]]:
    """The summaries of some dry runs of one experiment: for each, what `forecast` wants to know of it.

    `quiet`: from the process of the lowest priority.

    Raises:
        PlanError: a dry run failed; a rank would have failed for the same reason, or torch has no fake of an operator.
    """
    mapping, packed = code.pack(experiment)
    with tempfile.TemporaryDirectory(prefix="collie-plan-") as folder, _turn(quiet) as worker:
        Path(folder, "experiment.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False), encoding="utf-8")
        if packed:
            Path(folder, "code.pkl").write_bytes(packed)
        return _asked(worker, {"folder": folder, "cwd": os.getcwd(), "ranks": ranks})


def rest(quiet: bool) -> None:
    """End the processes, and so free their memory, until the next question."""
    with contextlib.ExitStack() as stack:
        for _ in range(1 if quiet else AT_ONCE):
            worker = stack.enter_context(_turn(quiet))
            if worker.process is not None:
                _stop(worker.process)


def _asked(worker: _Worker, request: dict[str, Any]) -> list[dict[str, Any]]:
    process = _running(worker)
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


def _running(worker: _Worker) -> subprocess.Popen[str]:
    if worker.process is None or worker.process.poll() is not None:
        if worker.process is None:
            atexit.register(lambda: None if worker.process is None else _stop(worker.process))
        root = str(Path(collie_lab.__file__).resolve().parent.parent)
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        worker.process = subprocess.Popen(
            [sys.executable, "-m", "collie_lab.planning._worker", str(worker.niceness)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            start_new_session=True,  # no interrupts
            env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    return worker.process


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
