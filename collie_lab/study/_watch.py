"""What goes on beside an arm's notebook: is its time up, does it take too much memory, is it asked to stop?"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import psutil

from collie_lab.launch import Run
from collie_lab.view.units import bytes_text

__all__ = ["Watch", "private_bytes"]

#: Seconds between two looks.
_POLL: Final = 0.2
#: Seconds beyond its time-out that an arm gets until its kernel is killed. The run within it has the same time-out, and
#: ends with the stacks of its ranks; this is for a kernel that hangs before or after it.
SLACK: Final = 20.0
#: Seconds that a run, and the notebook after it, get to come to their end.
FAREWELL: Final = 60.0
#: Seconds until the rest is killed, where the end of the largest process did not help.
_RELIEF: Final = 3.0


class Watch(threading.Thread):
    """Watches the processes below this one.

    Args:
        kernel: the pid of the notebook's kernel.
        run: gives the run that is under way, or None.
        timeout: seconds until the kernel is killed.
        memory_limit: bytes that the private memory of all processes below this one may have together. There may be a
            moment's more: they are looked at every 0.2 s.

    Attributes:
        peak_bytes: the most private memory that was seen; None where there is no limit to watch.
        over: what was found where the memory limit was exceeded; else "".
        timed_out: whether the kernel was killed for its time-out.
        stopping: set by who wants the arm to stop.
    """

    def __init__(self, kernel: int, run: Callable[[], Run | None], timeout: float | None, memory_limit: int | None):
        super().__init__(name="watch of an arm", daemon=True)
        self._kernel, self._run, self._limit = kernel, run, memory_limit
        self._deadline = None if timeout is None else time.monotonic() + timeout + SLACK
        self._killed_at: float | None = None
        self._stop_deadline: float | None = None
        self._ended = threading.Event()
        self.peak_bytes: int | None = None
        self.over = ""
        self.timed_out = False
        self.stopping = threading.Event()

    def run(self) -> None:
        """Look, again and again, until `end`."""
        while not self._ended.wait(_POLL):
            if self._limit is not None:
                self._watch_memory(self._limit)
            if self.stopping.is_set():
                self._stop()
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._end_overdue(self._deadline)

    def end(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self.join()

    def _watch_memory(self, limit: int) -> None:
        sizes = {process: private_bytes(process.pid) for process in psutil.Process().children(recursive=True)}
        total = sum(sizes.values())
        self.peak_bytes = max(total, self.peak_bytes or 0)
        if total <= limit:
            return
        largest = max(sizes, key=lambda process: sizes[process])
        if not self.over:
            name = _name(largest)
            self.over = (f"{bytes_text(total)} of host memory, over the limit of {bytes_text(limit)}; {name} had "
                         f"{bytes_text(sizes[largest])} of it and was ended")
            self._killed_at = time.monotonic()
            _kill(largest)  # as the system does: what is left of the arm then tells what has happened
        elif self._killed_at is not None and time.monotonic() > self._killed_at + _RELIEF:
            for process in sizes:
                _kill(process)

    def _stop(self) -> None:
        """Have the run stop with a checkpoint; without one there is nothing to wait for."""
        run = self._run()
        if self._stop_deadline is None:
            self._stop_deadline = time.monotonic() + FAREWELL
        if run is None or (not run.alive and not run.result):
            self._kill_kernel()
        elif run.alive:
            run.stop()
            self._stop_deadline = time.monotonic() + FAREWELL
        elif time.monotonic() > self._stop_deadline:
            self._kill_kernel()

    def _end_overdue(self, deadline: float) -> None:
        """A run that is alive ends by itself, a little later if it began late, and tells what it was doing."""
        run = self._run()
        if run is None or not run.alive or time.monotonic() > deadline + FAREWELL:
            self.timed_out = True
            self._kill_kernel()

    def _kill_kernel(self) -> None:
        with contextlib.suppress(psutil.Error):
            _kill(psutil.Process(self._kernel))


def private_bytes(pid: int) -> int:
    """Memory that a process shares with nobody and that cannot be read again from a file: what its end gives back."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        with contextlib.suppress(psutil.Error):
            return int(psutil.Process(pid).memory_info().rss)
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def _name(process: psutil.Process) -> str:
    """Who it is: a rank, or another process of the arm."""
    with contextlib.suppress(psutil.Error):
        rank = process.environ().get("RANK", "")
        return f"rank {rank}" if rank.isdigit() else f"the process {process.name()}"
    return "a process"


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(signal.SIGKILL)
