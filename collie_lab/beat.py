"""A rank's sign of life: where it is and how much memory it holds, in a small file that it rewrites in place.

It is for those who look from outside: the panel, the supervisor that waits for a rank that no longer moves, the verdict
on a rank that the system has ended without a word. Imports no torch: the supervisor reads beats.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import psutil

from collie_lab.folder import RunFolder

__all__ = ["Beat", "Doing", "memory", "read_beats"]

#: What a rank does: what it does not say again is not known to be over.
Doing = Literal["loading", "step", "evaluation", "checkpoint", "export", "answer", "done"]

#: Room for a beat, filled with spaces: rewriting it is one call, and never leaves the end of a longer one.
_SIZE: Final = 512

#: Seconds between two looks at the memory: torch's count takes longer than all the rest of a beat.
_MEMORY_EVERY: Final = 0.5

#: Where machines share the folder, seconds after which a beat is sent off to the file server.
_SYNC_EVERY: Final = 1.0


class Beat:
    """Writes the beats of this rank. A beat costs a few microseconds, and outlives a process that is killed.

    With `shared`, other machines read the file over the network.
    """

    def __init__(self, folder: RunFolder, rank: int, shared: bool = False):
        folder.beats.mkdir(exist_ok=True)
        self._file = os.open(folder.beat(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._facts: dict[str, Any] = {
            "rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "time": 0.0, "count": 0, "step": 0,
            "doing": "loading", "shape": None, **memory(),
        }
        self._shared = shared
        self._measured = self._synced = 0.0
        self.say("loading")

    def say(self, doing: Doing, *, step: int | None = None, shape: Sequence[int] | None = None) -> None:
        """Show a sign of life; what is not given stays. `shape`: rows and columns of the micro-batch at hand."""
        facts, now = self._facts, time.time()
        facts["time"], facts["doing"] = now, doing
        facts["count"] += 1
        if step is not None:
            facts["step"] = step
        if shape is not None:
            facts["shape"] = list(shape)
        if abs(now - self._measured) > _MEMORY_EVERY:
            self._measured = now
            peak = facts["memory"] or 0
            facts |= memory()
            if facts["on_gpu"]:  # where the count begins anew with every step
                facts["memory"] = max(peak, facts["memory"])
        with contextlib.suppress(OSError):  # no more than a missing sign of life
            os.pwrite(self._file, json.dumps(facts).encode().ljust(_SIZE), 0)
            if self._shared and abs(now - self._synced) > _SYNC_EVERY:
                self._synced = now
                os.fdatasync(self._file)

    def close(self) -> None:
        """The last sign of life: this rank has done its part."""
        self.say("done")
        os.close(self._file)


def read_beats(folder: RunFolder) -> dict[int, dict[str, Any]]:
    """The last beat of every rank, by its number; without those that are being written at this moment."""
    found = {}
    for path in folder.beats.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            beat = json.loads(path.read_bytes())
            found[int(beat["rank"])] = beat
    return dict(sorted(found.items()))


def memory() -> dict[str, Any]:
    """`memory` and `memory_limit`, in bytes: the peak of the GPU, `on_gpu`, or what this process holds of the host."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {"on_gpu": True, "memory": torch.cuda.max_memory_allocated(), "memory_limit": device.total_memory}
    return {"on_gpu": False, "memory": psutil.Process().memory_info().rss, "memory_limit": _host_memory()}


@functools.cache
def _host_memory() -> int:
    """What this machine, or the container that we are in, has to give."""
    total = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total
