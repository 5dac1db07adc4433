"""Arms as tasks of a Ray cluster, or of a Ray that is started on this machine for the study.

A task starts the arm's program and waits for it. Ray gives each as many CPUs or GPUs as it has ranks, and no two the
same. The results have to be on a file system that the nodes share, and so has the Python that runs this.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Final

from collie_lab.cells import CellError, Problem
from collie_lab.launch._supervise import module_paths
from collie_lab.study.arms import Arm, read_arm
from collie_lab.study.cluster import Cluster
from collie_lab.study.executor import command, conclude
from collie_lab.study.store import ArmFolder

__all__ = ["Ray", "RayExecutor", "RayJob"]


#: Beginnings of the variables that arms have from this process, whatever Ray was started with.
_TOLD: Final = ("COLLIE_LAB_", "HF_", "OMP_")


class Ray(Cluster):
    """Which cluster runs the arms, and what each asks of it: `study.run(executor=Ray(address="auto"))`."""

    kind: ClassVar[str] = "ray"
    address: str | None = None
    """Of its head (`10.0.0.1:6379`), or `auto` for the one that runs on this machine. None: what `RAY_ADDRESS` says,
    else a Ray of this machine's, started for the study and ended with it."""

    def open(self, slots: int | None) -> RayExecutor:
        """Arms as tasks, so many at once; by default as many as Ray has room for."""
        return RayExecutor(self, slots)


class RayExecutor:
    """Arms as tasks of Ray, each tried once: what is lost with its node is gone on with by the next `study.run()`.

    Args:
        settings: where, and what each task asks for.
        slots: so many at once. Default: as many as Ray has room for.

    Raises:
        CellError: there is no such Ray, or it is not installed.
    """

    def __init__(self, settings: Ray, slots: int | None = None):
        self._settings, self._slots = settings, slots
        self._own = _connect(settings.address)
        self._jobs: list[RayJob] = []

    def check(self, arms: Iterable[Arm]) -> None:
        """Raise where an arm has no place on one node."""
        gpus, cpus = _most("GPU"), _most("CPU")
        if problems := [problem for arm in arms for problem in self._settings.too_large(arm, gpus, cpus)]:
            self.close()  # nobody else will: nothing has been started
            raise CellError(problems)

    def has_room(self, gpus: int) -> bool:
        """Whether there is a slot."""
        self._jobs = [job for job in self._jobs if job.alive]
        return self._slots is None or len(self._jobs) < self._slots

    def submit(self, folder: Path, gpus: int) -> RayJob:
        """Have an arm run, when Ray has what its ranks take."""
        import ray

        settings = self._settings
        asked = {"memory": settings.memory_of(read_arm(folder)), "accelerator_type": settings.gpu_type}
        task = ray.remote(_task()).options(
            name=folder.name, max_retries=0, num_cpus=settings.cpus_of(gpus),
            num_gpus=gpus if settings.on_gpus(_most("GPU")) else 0,
            **{option: value for option, value in asked.items() if value is not None})
        job = RayJob(folder, task.remote(command(folder), str(folder / "arm.log"), os.getcwd(),
                                         _variables(settings.cpus_of(1))))
        self._jobs.append(job)
        return job

    def close(self) -> None:
        """End the Ray that was started for this."""
        if self._own:
            import ray

            ray.shutdown()


class RayJob:
    """The task of one arm."""

    def __init__(self, arm: Path, task: Any):
        self.arm = arm
        self._task = task
        self._since = time.time()

    @property
    def alive(self) -> bool:
        """Whether it waits or runs. Where it no longer does, and the arm could not say why, Ray does."""
        import ray

        if self._task is None:
            return False
        if not ray.wait([self._task], timeout=0)[0]:
            return True
        task, self._task = self._task, None
        try:
            conclude(self.arm, ray.get(task), self._since)
        except ray.exceptions.RayError as error:
            ArmFolder(self.arm).conclude(*_ending(error), self._since)
        return False

    @property
    def waits(self) -> bool:
        """Ray does not say; until its arm begins, a task waits."""
        return not ArmFolder(self.arm).held

    def stop(self) -> None:
        """Have the arm stop after its step, or not start."""
        self._cancel(force=False)

    def kill(self) -> None:
        """End the task, and with its process the arm."""
        self._cancel(force=True)

    def _cancel(self, *, force: bool) -> None:
        import ray

        if self._task is not None:
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                ray.cancel(self._task, force=force)


def _task() -> Callable[[list[str], str, str, dict[str, str]], int]:
    """What Ray runs on a node. A function within this one: so it travels whole, and needs nothing of ours there."""

    def arm(command: list[str], log: str, directory: str, variables: dict[str, str]) -> int:
        import ctypes
        import os
        import signal
        import subprocess
        import sys
        import time

        def die_with_parent() -> None:
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG

        with open(log, "ab") as words:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=words, stderr=words, cwd=directory,
                                       start_new_session=True, preexec_fn=die_with_parent,
                                       env={**os.environ, **variables})
        try:
            while process.poll() is None:
                time.sleep(0.2)  # to be cancelled interrupts what Python does, but no system call that waits
            return process.returncode
        except KeyboardInterrupt:  # cancelled
            process.terminate()
            process.wait()
            raise

    return arm


def _variables(threads: int) -> dict[str, str]:
    """What an arm has to know of this process's environment, which it does not inherit from another machine's Ray."""
    told = {name: value for name, value in os.environ.items() if name.startswith(_TOLD)}
    return {"OMP_NUM_THREADS": str(threads), **told, "PYTHONPATH": os.pathsep.join(module_paths())}


def _ending(error: Exception) -> tuple[str, str]:
    """The status of an arm that ended with its task before it could write its own, and a sentence why."""
    import ray

    words = str(error).strip().splitlines()
    reason = f"Ray: {type(error).__name__}" + (f": {words[0]}" if words else "")
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "host_oom", reason
    return ("stopped" if isinstance(error, ray.exceptions.TaskCancelledError) else "lost"), reason


def _most(what: str) -> float:
    """How many CPUs or GPUs the node has that has the most."""
    import ray

    return max((float(node["Resources"].get(what, 0)) for node in ray.nodes() if node["Alive"]), default=0.0)


def _connect(address: str | None) -> bool:
    """Connect to a Ray; whether it was started by this."""
    try:
        import ray
    except ImportError:
        raise CellError([Problem("Ray", "", "ray is not installed", "pip install collie-lab[ray]")]) from None
    if ray.is_initialized():  # by the notebook: it is theirs
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    started: dict[str, Any] = {"address": address} if address is not None else {"include_dashboard": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(**started, logging_level=logging.WARNING, log_to_driver=False)
    except Exception as error:  # Ray raises plain ones where its daemons do not come up in time
        ray.shutdown()
        what, remedy = ("no Ray answers at " + address, "`ray status` on a machine of the cluster") if address else \
            ("Ray does not start", "on an overloaded machine it gives up after a minute: `ray.init()` alone says more")
        raise CellError([Problem("Ray", "address", f"{what}: {error}", remedy)]) from None
    return True
