"""Runs the arms of a study that have no result yet, each once.

The runner holds nothing that matters: what is done stands in the arms' folders, and who runs an arm holds its lock. So
several runners can share one results folder, and one that is killed loses nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from collie_lab.study.arms import Arm
from collie_lab.study.executor import Executor, Job
from collie_lab.study.store import FINAL, QUEUED, ArmFolder

__all__ = ["Observer", "Runner"]

#: Seconds between two looks at this runner's own jobs, and at the folders of all arms.
_POLL: Final = 0.1
_LOOK: Final = 1.0


class Observer(Protocol):
    """Who is told how things go."""

    def update(self, arms: Mapping[str, str]) -> None:
        """The status of every arm by its name, `queued` among them; called again and again."""


@dataclass
class Runner:
    """Sees to it that every arm gets a result.

    Args:
        arms: gives the arms as they are known now; tuning adds some on the way.
        folder: of an arm, made where it is not there.
        executor: where they run.
        observer: is told of every change.
    """

    arms: Callable[[], list[Arm]]
    folder: Callable[[Arm], ArmFolder]
    executor: Executor
    observer: Observer | None = None
    _jobs: dict[str, Job] = field(default_factory=dict)
    _tried: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Start what has no result, wait for what runs, also elsewhere, until there is nothing more to do.

        An arm is begun at most once: one that is lost twice in a row might be lost for ever. At an interrupt the arms
        under way are stopped, with a checkpoint, and waited for; at the next one they are killed.
        """
        try:
            while self._step():
                self._wait()
        except KeyboardInterrupt:
            self._stop()
            raise
        except BaseException:
            self._kill()
            raise
        finally:
            self.executor.close()

    def _step(self) -> bool:
        """Start what can be started; whether there is still something to wait for."""
        ended = [id for id, job in self._jobs.items() if not job.alive]
        for id in ended:
            del self._jobs[id]
        arms = self.arms()  # with those that tuning adds, now that these have ended
        states = {arm.id: self.folder(arm).status for arm in arms}
        self._tried -= {id for id in ended if states.get(id) == "running"}  # another runner was quicker
        waiting = False
        for arm in arms:
            if states[arm.id] in FINAL or arm.id in self._jobs or states[arm.id] == "running":
                continue  # an arm that runs elsewhere is waited for, and taken over where it is lost
            if arm.id in self._tried:
                continue
            if not self.executor.has_room(arm.gpus):
                waiting = True
                break  # in order: a large arm is not overtaken by small ones for ever
            self._tried.add(arm.id)
            self._jobs[arm.id] = self.executor.submit(self.folder(arm).path, arm.gpus)
        self._tell(arms, states)
        return waiting or bool(self._jobs) or "running" in states.values()

    def _wait(self) -> None:
        """Until a job has ended, but not for long: the arms of other runners are looked at now and then."""
        deadline = time.monotonic() + _LOOK
        while time.monotonic() < deadline and all(job.alive for job in self._jobs.values()):
            time.sleep(_POLL)

    def _tell(self, arms: list[Arm], states: Mapping[str, str]) -> None:
        if self.observer is not None:
            self.observer.update({arm.name: self._shown(arm.id, states[arm.id]) for arm in arms})

    def _shown(self, arm: str, state: str) -> str:
        """An arm that was given away is queued until its turn comes, and runs from then on, also while it starts."""
        if state in FINAL or state == "running" or arm not in self._jobs:
            return state
        return QUEUED if self._jobs[arm].waits else "running"

    def _stop(self) -> None:
        for job in self._jobs.values():
            job.stop()
        try:
            while any(job.alive for job in self._jobs.values()):
                time.sleep(_POLL)
        except KeyboardInterrupt:
            self._kill()

    def _kill(self) -> None:
        for job in self._jobs.values():
            if job.alive:
                job.kill()
