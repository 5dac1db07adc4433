"""One run under way, as its supervisor sees it: is its time up, do its ranks move, do they heed the stop flag?"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from pathlib import Path

from collie_lab.folder import RunFolder, Tail
from collie_lab.launch._stall import StallWatch
from collie_lab.launch._verdict import Cause

__all__ = ["Course"]


class Course:
    """Looks at a run's folder, again and again."""

    def __init__(self, folder: RunFolder, ranks: Collection[int]):
        self.folder, self.plan = folder, folder.read("launch.json")
        self.began = time.time()
        self.attempts = 1
        self._stall = StallWatch(folder, ranks, self.plan["stall_timeout"])
        self._stop_deadline: float | None = None
        self._stop_heeded = False
        self._events = Tail(folder.path / "events.jsonl")

    def reason_to_end(self) -> Cause | None:
        """Why the ranks have to be ended now, if they have to."""
        if self.plan["timeout"] is not None and time.time() > self.began + self.plan["timeout"]:
            return "timeout"
        if self._stop_is_unheeded():
            return "unstopped"
        return "stalled" if self._stall.stalled() else None

    def begin_again(self) -> None:
        """Have it that the ranks start anew."""
        self.attempts += 1
        self._stall.forget()

    def _stop_is_unheeded(self) -> bool:
        """Whether the stop flag stands and the ranks have not acknowledged it in time.

        The time is `grace`, or two steps where a step takes longer: ranks that make progress will heed it.
        """
        if self._stop_heeded or not self.folder.stop_flag.exists():
            return False
        if self._stop_deadline is None:
            patience = max(self.plan["grace"], 2 * _step_seconds(self.folder.path / "metrics.jsonl"))
            self._stop_deadline = time.monotonic() + patience
        self._stop_heeded = any(event.get("kind") in ("stopping", "ending") for event in self._events.new())
        return not self._stop_heeded and time.monotonic() > self._stop_deadline


def _step_seconds(metrics: Path) -> float:
    """How long the last step took: from the last two records; 0 where there are none yet."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 8192))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0.0
    times = [float(json.loads(line)["time"]) for line in lines[-2:]]
    return times[1] - times[0] if len(times) == 2 else 0.0
