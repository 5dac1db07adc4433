"""What a Slurm job of a study does: one arm, in a process below. submitit calls it on the node.

Two signals reach this process alone, and not the ranks below, which would die of them: SIGUSR2 when the job's time is
nearly up or Slurm wants the node for another, upon which the arm is stopped and the job queued again; SIGTERM when the
study is interrupted, upon which it is stopped and the job ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

__all__ = ["ArmJob"]


class ArmJob:
    """A callable that submitit pickles into the queue, and asks to `checkpoint` before it is put back there."""

    def __init__(self, command: list[str], log: Path, ranks: int):
        self._command, self._log, self._ranks = command, log, ranks
        self._arm: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Run the arm; its exit code. Where it could not begin, its status is written here: Slurm knows no reason."""
        signal.signal(signal.SIGTERM, lambda *_: self._stop())  # instead of submitit's, which only notes it
        threads = int(os.environ.get("SLURM_CPUS_ON_NODE", "1")) // self._ranks  # the node has more, for other jobs
        env = {"OMP_NUM_THREADS": str(max(1, threads)), **os.environ}
        since = time.time()
        with self._log.open("ab") as log:
            self._arm = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        _wait(self._arm)
        code = self._arm.wait()
        if code:
            from collie_lab.study.executor import conclude  # what a job need not hold while its arm runs

            conclude(self._log.parent, code, since)
        return code

    def checkpoint(self) -> DelayedSubmission:
        """Stop the arm, which leaves a checkpoint; the job that goes on from it."""
        from submitit.helpers import DelayedSubmission

        self._stop()
        return DelayedSubmission(ArmJob(self._command, self._log, self._ranks))

    def _stop(self) -> None:
        if self._arm is None:  # not begun yet
            raise SystemExit(0)
        self._arm.terminate()
        _wait(self._arm)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arm": None}


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Wait without taking the exit code: a signal handler does so in the midst of `__call__` doing it.

    (`Popen.wait` holds a lock meanwhile, on which the handler would wait for ever.)
    """
    with contextlib.suppress(ChildProcessError):  # somebody has taken it
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
