"""Arms as jobs of a Slurm cluster: arrays, put back into the queue when their time is up.

    <results>/slurm/<study>-<hex>/  arms.json (the arm of each job of the array), and what submitit keeps: logs, code

The folder's name is that of the jobs, and stands there before they do: whoever comes after a runner that was killed
finds them in the queue by it, and submits none twice. The results have to be on a file system that the nodes share, and
so has the Python that runs this.
"""

from __future__ import annotations

import fcntl
import math
import signal
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from collie_lab.cells import CellError
from collie_lab.folder import read_json
from collie_lab.logs import read_log
from collie_lab.study import _slurm_queue as queue
from collie_lab.study._slurm_array import Arrays
from collie_lab.study.arms import Arm
from collie_lab.study.cluster import Cluster
from collie_lab.study.store import FINAL, ArmFolder

__all__ = ["Slurm", "SlurmExecutor", "SlurmJob"]


class Slurm(Cluster):
    """How the jobs of a study are asked for: `study.run(executor=Slurm(partition="gpu", time="4:00:00"))`.

    A job runs one arm on one node. It is stopped `grace` seconds before its time is up, or when Slurm wants the node
    for another job, queued again, and goes on from its newest checkpoint.
    """

    kind: ClassVar[str] = "slurm"
    partition: str | None = None
    """None: the cluster's default."""
    time: str | None = None
    """Of a job, as Slurm writes it: `90` (minutes), `4:00:00`, `1-12`. None: the arm's `timeout` and ten minutes, or
    what the partition gives."""
    account: str | None = None
    qos: str | None = None
    setup: list[str] = Field(default_factory=list)
    """Lines of shell that come first in a job: `module load cuda`."""
    options: dict[str, str | int | bool] = Field(default_factory=dict)
    """Further options of sbatch: `{"constraint": "nvlink", "exclude": "node7"}`; True for one without a value."""
    grace: int = Field(default=120, ge=10)
    """Seconds before the end of a job's time in which its arm ends a step and writes a checkpoint."""
    requeues: int = Field(default=10, ge=0)
    """How often a job whose time is up is queued again. (One whose node Slurm wants: always.)"""
    interval: float = Field(default=15.0, gt=0)
    """Seconds between two looks into Slurm's queue."""

    @field_validator("time")
    @classmethod
    def _is_limit(cls, value: str | None) -> str | None:
        if value is not None and not queue.minutes(value):
            raise ValueError("a job needs a limit of its time")
        return value

    def open(self, slots: int | None) -> SlurmExecutor:
        """Arms as jobs, so many at once; by default all, and Slurm decides."""
        return SlurmExecutor(self, slots)


class SlurmExecutor:
    """Arms as jobs of Slurm. Those that are submitted between two looks at them become one array.

    Args:
        settings: how jobs are asked for.
        slots: so many at once. Default: all, and Slurm decides.

    Raises:
        CellError: there is no Slurm here, or no such partition; submitit is not installed.
    """

    def __init__(self, settings: Slurm, slots: int | None = None):
        self._settings, self._slots = settings, slots
        self._arrays = Arrays(settings)
        self._new: list[SlurmJob] = []  # to be submitted together
        self._submitted: list[SlurmJob] = []
        self._looked = -math.inf

    def check(self, arms: Iterable[Arm]) -> None:
        """Raise where an arm has no place on one node of the partition, or no limit of time."""
        if problems := [problem for arm in arms for problem in self._arrays.problems(arm)]:
            raise CellError(problems)

    def has_room(self, gpus: int) -> bool:
        """Whether there is a slot."""
        return self._slots is None or len(self._new) + sum(job.is_queued for job in self._submitted) < self._slots

    def submit(self, folder: Path, gpus: int) -> SlurmJob:
        """Have an arm run. Where it is in the queue already, whoever has put it there, its job is that one."""
        job = SlurmJob(self, folder)
        self._new.append(job)
        return job

    def close(self) -> None:
        """Nothing is kept."""

    # --- for the jobs

    def look(self) -> None:
        """Submit what is new, and ask Slurm for all, unless it was asked a moment ago."""
        try:
            if self._new:
                self._submit()
            elif time.monotonic() > self._looked + self._settings.interval:
                self._tell(self._ask())
        except OSError as error:  # its controller is restarted now and then; the jobs go on
            self._looked = time.monotonic()
            warnings.warn(f"Slurm does not answer, and is asked again: {error}", stacklevel=2)

    def forget(self, job: SlurmJob) -> bool:
        """Not submit a job; whether it had not been."""
        if job in self._new:
            self._new.remove(job)
            return True
        return False

    def _submit(self) -> None:
        with _alone(self._folder), _uninterrupted():  # else nobody knows which jobs there are
            known = self._ask()
            missing = [job.arm for job in self._new if job.arm.name not in known or not known[job.arm.name].alive]
            if missing:
                self._arrays.submit(missing, self._folder)
                known = self._ask()
            self._submitted += self._new
            self._new = []
            self._tell(known)

    def _ask(self) -> dict[str, queue.Job]:
        """The jobs of this study that Slurm knows, by the arm; of several the newest."""
        arrays = {path.parent.name: read_json(path)["arms"] for path in self._folder.glob("*/arms.json")}
        return {arrays[job.name][job.index]: job for job in sorted(queue.jobs(arrays), key=lambda job: job.number)}

    def _tell(self, known: Mapping[str, queue.Job]) -> None:
        for job in self._submitted:
            job.told(known.get(job.arm.name))
        self._looked = time.monotonic()

    @property
    def _folder(self) -> Path:
        """In the results of the study; every arm is in the same."""
        return [*self._submitted, *self._new][0].arm.parents[1] / "slurm"


class SlurmJob:
    """The job of one arm, from before it is in the queue until after."""

    def __init__(self, executor: SlurmExecutor, arm: Path):
        self.arm = arm.resolve()
        self._executor = executor
        self._queued: queue.Job | None = None  # as Slurm knew it last; None before it was submitted
        self._since = time.time()
        self._wanted: Sequence[tuple[str, ...]] = ()  # how it is to end: options of scancel
        self._concluded = False

    @property
    def alive(self) -> bool:
        """Whether it waits or runs. Where it no longer does, and the arm could not say why, Slurm does."""
        if self._is_over:
            return False
        self._executor.look()
        if self._queued is None or self._queued.alive:
            return True
        self._conclude(self._queued)
        return False

    @property
    def waits(self) -> bool:
        """Whether it is in the queue, or not even there yet."""
        return self._queued is None or self._queued.waits

    def stop(self) -> None:
        """Have the arm stop after its step, or not start."""
        self._end(("--state=PENDING",), ("--batch", "--signal=TERM"))

    def kill(self) -> None:
        """End the job."""
        self._end(())

    def told(self, job: queue.Job | None) -> None:
        """What Slurm says of it now; None where it knows nothing (any more)."""
        self._queued = job or replace(self._queued or queue.Job(id="", name="", state="", reason=""), state="")
        self._heed()

    @property
    def is_queued(self) -> bool:
        """Whether it waits or runs, as far as Slurm was asked."""
        return self._queued is not None and self._queued.alive and not self._is_over

    @property
    def _is_over(self) -> bool:
        """Whether nothing more comes of it; where the arm has its result, its job ends in a moment."""
        return self._concluded or ArmFolder(self.arm).status in FINAL

    def _end(self, *scancel: tuple[str, ...]) -> None:
        self._wanted = scancel
        if self._executor.forget(self):
            self._concluded = True
        self._heed()

    def _heed(self) -> None:
        """Do what was wanted; at every look again, for a job that is about to start hears no signal."""
        if self._queued is not None and self.is_queued:
            for options in self._wanted:
                queue.cancel(self._queued.id, *options)

    def _conclude(self, job: queue.Job) -> None:
        self._concluded = True
        log = read_log(self.arm.parents[1] / "slurm" / job.name / f"{job.id}_0_log.out", tail=50)
        status, reason = queue.ending(job.state or (queue.past_state(job.id) if job.id else ""), log)
        ArmFolder(self.arm).conclude(status, f"{reason} (job {job.id})", self._since)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within it no other runner of the study submits."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Within it an interrupt waits."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
