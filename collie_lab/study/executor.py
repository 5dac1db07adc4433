"""Where arms run: on this machine (`LocalExecutor`), or wherever else something keeps to `Executor`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Protocol

import psutil

from collie_lab.cells import CellError, Problem
from collie_lab.logs import read_log
from collie_lab.machine import usable_cpus, visible_gpus
from collie_lab.rank import die_with_parent
from collie_lab.study._judge import judge_program
from collie_lab.study.arms import Arm
from collie_lab.study.cluster import Cluster
from collie_lab.study.store import HELD, ArmFolder

__all__ = ["Executor", "Job", "LocalExecutor", "cluster", "command", "conclude", "make_executor"]

#: Lines of its log that are kept of an arm whose program could not begin.
_LAST_WORDS: Final = 50


class Job(Protocol):
    """One attempt at one arm, on its way."""

    @property
    def alive(self) -> bool:
        """Whether it waits for its turn or runs. What became of the arm is in the arm's folder: where it is not alive,
        and its program has left no status, the job has written one."""

    @property
    def waits(self) -> bool:
        """Whether it waits for its turn, as far as one can tell: its program has not been started."""

    def stop(self) -> None:
        """Have the arm stop after its step with a checkpoint (SIGTERM to its program), and not start if it waits;
        returns at once."""

    def kill(self) -> None:
        """End it now."""


class Executor(Protocol):
    """Starts arms: `python -m collie_lab.study.arm FOLDER` (`command`), in the working directory of this process.

    It need not know what an arm is: locks, statuses and resuming are that program's business, the same everywhere.
    """

    def check(self, arms: Iterable[Arm]) -> None:
        """Called before anything starts. Raises CellError where an arm has no place there."""

    def has_room(self, gpus: int) -> bool:
        """Whether it takes another arm of so many ranks now."""

    def submit(self, folder: Path, gpus: int) -> Job:
        """Start the arm of a folder, which has `gpus` ranks; called where there is room."""

    def close(self) -> None:
        """Called once no job is left."""


def command(folder: Path) -> list[str]:
    """What runs the arm of a folder."""
    return [sys.executable, "-m", "collie_lab.study.arm", str(folder)]


def conclude(folder: Path, code: int, since: float) -> None:
    """See to it that an arm whose program has ended has a status. It writes its own, unless it cannot begin (a library
    does not load) or is killed: that its exit code tells, to whoever has started it at the time `since`."""
    if code in (0, HELD):
        return
    log = folder / "arm.log"  # of all attempts: the last words in it may be an earlier one's
    written = log.exists() and log.stat().st_mtime >= since
    outcome = judge_program(code, read_log(log, _LAST_WORDS) if written else "")
    ArmFolder(folder).conclude(outcome.status, outcome.reason, since, outcome.traceback)


def make_executor(executor: str | Cluster | Executor, slots: int | None = None) -> Executor:
    """An executor by its name, or of a cluster; so many arms at once.

    Raises:
        CellError: there is none of that name; no such cluster answers.
    """
    if executor == "local":
        return LocalExecutor(slots)
    chosen = cluster(executor) if isinstance(executor, str) else executor
    return chosen.open(slots) if isinstance(chosen, Cluster) else chosen


def cluster(name: str, **settings: Any) -> Cluster:
    """A cluster by the name of its executor.

    Raises:
        CellError: there is none of that name, or it has no such setting.
    """
    from collie_lab.study.ray import Ray
    from collie_lab.study.slurm import Slurm

    known: dict[str, type[Cluster]] = {each.kind: each for each in (Slurm, Ray)}
    if name not in known:
        raise CellError([Problem("study", "executor", f"there is no cluster {name!r}", "there are: local (this "
                                 f"machine, which has no further settings), {', '.join(known)}")])
    return known[name](**settings)


class LocalExecutor:
    """Arms as processes of this machine. They end with this process, however it ends.

    Args:
        slots: so many at once. Default: with GPUs as many as there is one for each rank, without one arm at a time.

    With GPUs each arm gets as many as it has ranks, and no other arm has them meanwhile, of this study or another one
    of this user: two on one GPU would measure each other, and run out of memory where one would not.
    """

    def __init__(self, slots: int | None = None):
        if slots is not None and slots < 1:
            raise CellError([Problem("study", "slots", f"at least one, got {slots}")])
        self._gpus = visible_gpus()
        self._slots = slots or (len(self._gpus) or 1)
        self._jobs: list[_LocalJob] = []

    def check(self, arms: Iterable[Arm]) -> None:
        """Raise where an arm has more ranks than there are GPUs: it would wait for ever."""
        if self._gpus and (large := [arm for arm in arms if arm.gpus > len(self._gpus)]):
            raise CellError([Problem("study", "executor", f"{arm.name!r} takes {arm.gpus} GPUs; this machine has "
                                     f"{len(self._gpus)}", "leave the arm out of the grid") for arm in large])

    def has_room(self, gpus: int) -> bool:
        """Whether there is a slot, and a free GPU for each rank."""
        self._jobs = [job for job in self._jobs if job.alive]
        if len(self._jobs) >= self._slots:
            return False
        with contextlib.ExitStack() as stack:
            return self._take(gpus, stack) is not None

    def submit(self, folder: Path, gpus: int) -> Job:
        """Start an arm; its words go to `arm.log` in its folder."""
        with contextlib.ExitStack() as stack:
            while (taken := self._take(gpus, stack)) is None:
                self._jobs = [job for job in self._jobs if job.alive]  # those that have ended give their GPUs back
                time.sleep(0.1)  # another study has been quicker
            env = {"OMP_NUM_THREADS": str(max(1, usable_cpus() // (self._slots * gpus))), **os.environ}
            if self._gpus:
                env["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
            tie, since = die_with_parent if sys.platform == "linux" else None, time.time()
            with (folder / "arm.log").open("ab") as log:
                process = subprocess.Popen(command(folder), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                           start_new_session=True, preexec_fn=tie, env=env)
            job = _LocalJob(folder, process, since, stack.pop_all())
        self._jobs.append(job)
        return job

    def close(self) -> None:
        """Nothing is kept."""

    def _take(self, count: int, stack: contextlib.ExitStack) -> list[str] | None:
        """So many free GPUs, held until the stack closes; None where they are not there. Ranks on CPUs need none."""
        if not self._gpus:
            return []
        taken: dict[str, int] = {}
        for gpu in self._gpus:
            if len(taken) < count and (handle := _lock(gpu)) is not None:
                taken[gpu] = handle
        for handle in taken.values():
            stack.callback(os.close, handle)
        if len(taken) == count:
            return list(taken)
        stack.close()
        return None


class _LocalJob:
    waits = False

    def __init__(self, arm: Path, process: subprocess.Popen[bytes], since: float, gpus: contextlib.ExitStack):
        self._arm, self._process, self._since, self._gpus = arm, process, since, gpus
        self._concluded = False

    @property
    def alive(self) -> bool:
        code = self._process.poll()
        if code is None:
            return True
        if not self._concluded:
            self._concluded = True
            self._gpus.close()
            conclude(self._arm, code, self._since)
        return False

    def stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        """End the arm's program and all below it; the supervisor of a run ends its ranks itself."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
        self._process.kill()
        self._process.wait()


_LOCKS: Final = Path(tempfile.gettempdir())


def _lock(gpu: str) -> int | None:
    """The lock of a GPU; None where somebody has it. It ends with the process."""
    handle = os.open(_LOCKS / f"collie-lab-{os.getuid()}-gpu-{gpu.replace('/', '-')}.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
