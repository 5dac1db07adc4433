"""Fabricated runs as fixtures."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from collie_lab.folder import JsonLines, RunFolder
from tests.view.fabricate import START, FakeRun, append, end, record


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """An empty folder of a run that has been launched."""
    created = RunFolder.create(tmp_path, "toy")
    created.write("launch.json", {"created": START, "world_size": 2})
    created.write("status.json", {"status": "running", "started": START})
    return created


@pytest.fixture
def finished(folder: RunFolder) -> FakeRun:
    """A run of 40 steps with two evaluations."""
    append(folder, "metrics.jsonl", (record(step, math.exp(-step / 10) + 1) for step in range(1, 41)))
    append(folder, "events.jsonl", [
        {"time": START + 10, "kind": "start", "steps": 40, "world_size": 2, "step": 0},
        {"time": START + 20, "kind": "evaluation", "step": 20, "perplexity": 4.0, "exact_match": 0.25},
        {"time": START + 30, "kind": "evaluation", "step": 40, "perplexity": 3.0, "exact_match": 0.5},
    ])
    end(folder, steps=40, loss=1.02, perplexity=3.0, exact_match=0.5, peak_bytes=2_000_000, tokens_per_second=130.0)
    return FakeRun(folder)


@pytest.fixture
def write_slowly(folder: RunFolder) -> Iterator[Callable[..., FakeRun]]:
    """`write_slowly(steps, rate)` starts a run that a thread writes, some steps a second."""
    threads: list[threading.Thread] = []

    def start(steps: int, rate: float) -> FakeRun:
        def work() -> None:
            append(folder, "events.jsonl", [{"time": time.time(), "kind": "start", "steps": steps, "step": 0}])
            lines, begun = JsonLines(folder.path / "metrics.jsonl"), time.monotonic()
            for step in range(1, steps + 1):
                lines.append(record(step, 1 + 1 / step, time.time()))
                time.sleep(max(0.0, begun + step / rate - time.monotonic()))
            lines.close()
            end(folder, steps=steps, loss=1.0)

        threads.append(threading.Thread(target=work))
        threads[-1].start()
        return FakeRun(folder)

    yield start
    for thread in threads:
        thread.join()
