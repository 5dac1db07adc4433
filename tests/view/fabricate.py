"""Run folders made up for the tests: what the ranks and the supervisor would have written."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

from collie_lab.folder import JsonLines, RunFolder

START = 1_700_000_000.0


class FakeRun:
    """A run whose folder somebody else writes; it is alive while its status says so."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    @property
    def alive(self) -> bool:
        return bool(self.folder.read("status.json").get("status", "running") == "running")

    def stop(self) -> None:
        self.folder.stop_flag.touch()


def record(step: int, loss: float = 1.0, moment: float | None = None, **more: Any) -> dict[str, Any]:
    """One record of metrics.jsonl; a step takes half a second."""
    return {"step": step, "time": START + 10 + step / 2 if moment is None else moment, "loss": loss, "lr": 1e-3,
            "grad_norm": 1.0, "tokens": 64, "tokens_per_second": 128.0, "mfu": None, "memory_allocated": 1000 + step,
            **more}


def append(folder: RunFolder, name: str, records: Iterable[dict[str, Any]]) -> None:
    """Add lines to a JSONL file of the folder."""
    lines = JsonLines(folder.path / name)
    for item in records:
        lines.append(item)
    lines.close()


def end(folder: RunFolder, status: str = "ok", seconds: float = 60.0, detail: str = "", **result: Any) -> None:
    """What the last process writes."""
    if result:
        folder.write("result.json", {"status": status, **result})
    folder.write("status.json", {"status": status, "started": START, "ended": START + seconds, "detail": detail})


def beat(
    folder: RunFolder, rank: int, step: int, doing: str = "step", moment: float | None = None, **more: Any,
) -> None:
    """The sign of life of one rank; its count is the step unless `more` says otherwise."""
    folder.beats.mkdir(exist_ok=True)
    folder.beat(rank).write_text(json.dumps({
        "rank": rank, "host": "a", "pid": rank + 1, "time": time.time() if moment is None else moment, "count": step,
        "step": step, "doing": doing, "shape": [4, 16], "memory": None, "memory_limit": None, **more}))
