"""What the jobs of arms ask of Slurm, and how they come into its queue, by submitit."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from collie_lab.cells import CellError, Problem
from collie_lab.folder import write_json
from collie_lab.study import _slurm_queue as queue
from collie_lab.study._slurm_job import ArmJob
from collie_lab.study.arms import Arm, read_arm
from collie_lab.study.executor import command

if TYPE_CHECKING:
    from collie_lab.study.slurm import Slurm

__all__ = ["Arrays"]

#: Jobs in one array; Slurm's MaxArraySize is 1001 where nobody changed it.
_SIZE: Final = 1000
#: Minutes beside those that an arm may take: to start, and to end.
_MARGIN: Final = 10


class Arrays:
    """Makes arrays of jobs, as the settings and the partition want them."""

    def __init__(self, settings: Slurm):
        self._settings = settings
        self._partition = _partition(settings.partition)

    def problems(self, arm: Arm) -> Iterator[Problem]:
        """Why a job of this arm would never start."""
        place, minutes = self._partition, self._minutes(arm)
        yield from self._settings.too_large(arm, place.gpus, place.cpus)
        if minutes == 0:
            yield Problem("Slurm", "time", f"neither {arm.name!r} nor the partition {place.name!r} has a limit of time",
                          'e.g. time="4:00:00", or `timeout` in the grid')
        elif place.max_minutes is not None and minutes > place.max_minutes:
            yield Problem("Slurm", "time", f"{arm.name!r} asks for {minutes} minutes; {place.name!r} gives "
                          f"{place.max_minutes:g} at most", "a shorter `time`: in its next job an arm goes on from its "
                          "newest checkpoint")

    def submit(self, arms: Sequence[Path], place: Path) -> None:
        """Put arms into the queue; those that ask for the same become one array.

        `arms`: their folders; `place`: where the folders of the arrays are.

        Raises:
            CellError: sbatch refuses.
        """
        alike: dict[tuple[tuple[str, Any], ...], list[Path]] = {}
        for arm in arms:
            alike.setdefault(tuple(self._resources(read_arm(arm)).items()), []).append(arm)
        for resources, group in alike.items():
            for start in range(0, len(group), _SIZE):
                self._submit(group[start:start + _SIZE], place, dict(resources))

    def _submit(self, arms: Sequence[Path], place: Path, resources: dict[str, Any]) -> None:
        from submitit.slurm.slurm import SlurmExecutor as Submitter

        settings = self._settings
        folder = place / f"{re.sub(r'[^A-Za-z0-9._-]', '-', place.parent.name)}-{os.urandom(3).hex()}"
        folder.mkdir()
        write_json(folder / "arms.json", {"arms": [arm.name for arm in arms]})
        # In place of the shell and without srun: so Slurm's signals reach this one process, and none below it.
        submitter = Submitter(folder, max_num_timeout=settings.requeues, python=f"exec {shlex.quote(sys.executable)}")
        submitter.update_parameters(
            job_name=folder.name, time=resources.pop("minutes"), array_parallelism=len(arms), wckey=None,
            partition=settings.partition, account=settings.account, qos=settings.qos, setup=settings.setup or None,
            use_srun=False, stderr_to_stdout=True, additional_parameters={
                "requeue": True, "signal": f"B:USR2@{settings.grace}", **resources, **settings.options})
        try:
            with submitter.batch():
                for arm in arms:
                    submitter.submit(ArmJob(command(arm), arm / "arm.log", read_arm(arm).gpus))
        except RuntimeError as error:  # sbatch's words
            shutil.rmtree(folder)
            raise CellError([Problem("Slurm", "", f"sbatch does not take the jobs: {error}")]) from None

    def _resources(self, arm: Arm) -> dict[str, Any]:
        """What a job of this arm asks sbatch for."""
        settings = self._settings
        asked: dict[str, Any] = {"minutes": self._minutes(arm)}
        if gpus := settings.on_gpus(self._partition.gpus):
            asked["gpus-per-node"] = f"{settings.gpu_type}:{arm.gpus}" if settings.gpu_type else arm.gpus
        if settings.cpus is not None or not gpus:
            asked["cpus-per-task"] = settings.cpus_of(arm.gpus)
        if (memory := settings.memory_of(arm)) is not None:
            asked["mem"] = f"{math.ceil(memory / 2**20)}M"
        return asked

    def _minutes(self, arm: Arm) -> int:
        """The limit of a job; 0 where nothing tells it."""
        if self._settings.time is not None:
            found = queue.minutes(self._settings.time)
        elif arm.timeout is not None:
            found = arm.timeout / 60 + _MARGIN
        else:
            found = self._partition.default_minutes or self._partition.max_minutes
        return math.ceil(found or 0)


def _partition(name: str | None) -> queue.Partition:
    """The partition of this name, or the default one."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise CellError([Problem("Slurm", "", "submitit is not installed", "pip install collie-lab[slurm]")]) from None
    try:
        found = {each.name: each for each in queue.partitions()}
    except OSError as error:
        raise CellError([Problem("Slurm", "", f"no Slurm answers here: {error}",
                                 "run the study on a machine from which one submits jobs")]) from None
    if not found or (name is not None and name not in found):
        raise CellError([Problem("Slurm", "partition", f"there is no partition {name or ''!r}",
                                 f"there are: {', '.join(found) or 'none'}")])
    return found[name] if name is not None else next(iter(found.values()))
