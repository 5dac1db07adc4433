"""Studies in processes of their own, and what is seen of them from outside; for tests of what runs arms."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from collie_lab.study import Study

__all__ = ["REAL", "finish", "running", "steps"]

#: Two arms that train, long enough to be interrupted.
REAL: dict[str, Any] = {
    "name": "real",
    "base": {"model": {"source": "llama-tiny", "init": "random"}, "data": {"kind": "random_tokens", "length": 64},
             "training": {"steps": 120, "batch_size": 2, "micro_batch_size": 2, "checkpoint_every": 10}},
    "product": {"method": {"AdamW": {"optimizer": {"kind": "adamw", "lr": 1.0e-3}},
                           "LOMO": {"optimizer": {"kind": "lomo", "lr": 1.0e-3}}}},
}

@contextlib.contextmanager
def running(grid: dict[str, Any], results: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`collie-lab study run`; the process is gone at the end."""
    file = results.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(grid), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-c", "from collie_lab.study.commands import study_app; study_app()", "run", str(file),
         "--results", str(results), *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end; the exit code and the words."""
    words = process.communicate(timeout=400)[0]
    return process.returncode, words


def steps(grid: dict[str, Any], results: Path) -> list[int]:
    """The last step of each arm that has a run."""
    return [run.steps for run in Study(grid, results=results).runs.values()]
