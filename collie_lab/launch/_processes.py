"""The processes of a run: who they are, how they are ended, and whether the system ended one."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil

__all__ = ["adopt_orphans", "end_tree", "identity", "is_process", "oom_kills", "ranks"]

_PR_SET_CHILD_SUBREAPER = 36

#: Seconds that torchrun gets to report after its ranks, and until giving up on processes that no signal
#: reaches (stuck in a driver).
_REPORT, _HOPELESS = 1.5, 10.0


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies, so that none escapes `end_tree`."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def identity(pid: int) -> dict[str, Any]:
    """How a status names the process of a supervisor: `is_process` knows it again, on the same machine."""
    return {"host": socket.gethostname(), "pid": pid, "pid_started": psutil.Process(pid).create_time()}


def is_process(pid: int, started: float) -> bool:
    """Whether the process `pid` that began at unix time `started` still lives; pids are used again."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def ranks(supervisor: int) -> dict[int, int]:
    """The pids of the ranks under a supervisor: the children of torchrun, by the number they were given."""
    found: dict[int, int] = {}
    with contextlib.suppress(psutil.Error):
        for agent in psutil.Process(supervisor).children():
            for child in agent.children():
                with contextlib.suppress(psutil.Error):  # gone, or between fork and exec
                    if (number := child.environ().get("RANK", "")).isdigit():
                        found[int(number)] = child.pid
    return dict(sorted(found.items()))


def end_tree(agent: int, patience: float) -> set[int]:
    """End all descendants of this process: SIGTERM, `patience` seconds later SIGKILL. Returns whom it signalled.

    The agent (torchrun) comes last: it ends by itself with its ranks and reports their exit codes.
    """
    begin = time.monotonic()
    signalled: set[int] = set()
    while alive := _descendants():
        waited = time.monotonic() - begin
        others = [process for process in alive if process.pid != agent]
        if waited > patience + _REPORT or not (others or signalled):
            others = alive
        for process in others:
            if waited > patience or process.pid not in signalled:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL if waited > patience else signal.SIGTERM)
                signalled.add(process.pid)
        if waited > _HOPELESS:
            break
        time.sleep(0.02)
    return signalled


def _descendants() -> list[psutil.Process]:
    """Descendants that have not ended; a zombie only waits to be counted."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes the system has killed for want of memory, in our cgroup where there is one."""
    group = {}
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            group[controllers] = path.lstrip("/")
    mounted = root / "sys/fs/cgroup"
    candidates = [
        mounted / group.get("", "") / "memory.events", mounted / "memory.events",
        mounted / "memory" / group.get("memory", "") / "memory.oom_control", mounted / "memory/memory.oom_control",
        root / "proc/vmstat",
    ]
    for file in candidates:
        with contextlib.suppress(OSError):
            for line in file.read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
    return 0
