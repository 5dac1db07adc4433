"""The folder of an arm: the contract between a study, the processes that run its arms, and everyone who reads them.

    <results>/study.json                     the grid as it was resolved, and the ids of its arms
    <results>/arms/<name>-<id>/  arm.json    the arm
                                 lock        held (flock) by the process that runs the arm: it runs if and only if held
                                 status.json written by that process alone, the parent of kernel and ranks
                                 arm.ipynb   notebooks/arm.ipynb as it was executed
                                 arm.log     what the process itself had to say
                                 runs/       the run folders, one an attempt
                                 attempts/   status.json and arm.ipynb of earlier attempts
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from collie_lab.folder import checkpoints_in, read_json, write_json
from collie_lab.launch import Run, runs
from collie_lab.study.arms import Arm

__all__ = ["ARM_STATUSES", "FINAL", "HELD", "QUEUED", "ArmFolder", "HeldError", "summary_text"]

#: Every state of an arm: those of runs, and `pending`.
ARM_STATUSES: Final = (
    "pending", "running", "ok", "stopped", "cuda_oom", "host_oom", "diverged", "timeout", "error", "lost",
)
#: States in which an arm has a result, if only that it has none; in the others it is run, or gone on with.
FINAL: Final = ("ok", "cuda_oom", "host_oom", "diverged", "timeout", "error")
#: What a runner calls an arm that waits for its turn elsewhere. No state of the folder: only the runner knows it.
QUEUED: Final = "queued"
#: Exit code of an arm's program where another process runs the arm already (sysexits' EX_TEMPFAIL).
HELD: Final = 75

#: Seconds for which a lock that is held is asked for again: who only looks holds it for a moment.
_PATIENCE: Final = 0.5


def summary_text(statuses: Iterable[str]) -> str:
    """How many arms there are of each status: `12 arms: 10 ok, 1 host oom, 1 pending`."""
    counts = Counter(statuses)
    order = (ARM_STATUSES[0], QUEUED, *ARM_STATUSES[1:])
    parts = [f"{counts[status]} {status.replace('_', ' ')}" for status in order if counts[status]]
    return f"{counts.total()} arms: {', '.join(parts)}"


class HeldError(RuntimeError):
    """Another process runs the arm."""


class ArmFolder:
    """Paths of one arm, and what became of it."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().resolve()

    @classmethod
    def create(cls, results: Path, arm: Arm) -> ArmFolder:
        """The folder of an arm, made where there is none of its id yet; what does not decide on the result (its name,
        its time-out) is as the grid has it now."""
        folder = cls.find(results, arm.id) or cls(results / "arms" / arm.folder_name)
        folder.runs.mkdir(parents=True, exist_ok=True)
        fields = json.loads(json.dumps(arm.to_json()))
        if read_json(folder.path / "arm.json") != fields:
            write_json(folder.path / "arm.json", fields)
        return folder

    @classmethod
    def find(cls, results: Path, id: str) -> ArmFolder | None:
        """The folder of an id, whatever the arm was called then."""
        found = next((path for path in (results / "arms").glob(f"*-{id}") if (path / "arm.json").is_file()), None)
        return None if found is None else cls(found)

    @property
    def runs(self) -> Path:
        """Where the run folders are."""
        return self.path / "runs"

    @property
    def notebook(self) -> Path:
        """The executed notebook."""
        return self.path / "arm.ipynb"

    @property
    def run(self) -> Run | None:
        """The newest run, or None."""
        return next(reversed(self.every_run), None)

    @property
    def every_run(self) -> list[Run]:
        """The runs of all attempts, oldest first."""
        return runs(self.runs)

    @property
    def state(self) -> dict[str, Any]:
        """What is known of the arm; `status` is always there, `reason` where there is something to say."""
        held = self.held  # first: who runs the arm writes its end before it lets go
        state = read_json(self.path / "status.json") or {"status": "pending"}
        if held and state["status"] not in FINAL:
            return {**state, "status": "running"}
        if not held and state["status"] == "running":
            return {**state, "status": "lost", "reason": "the process that ran the arm is gone"}
        return state

    @property
    def status(self) -> str:
        """One of `ARM_STATUSES`."""
        return str(self.state["status"])

    @property
    def held(self) -> bool:
        """Whether a process runs the arm; on any machine that sees the folder."""
        try:
            handle = os.open(self._lock, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Within it, this process alone runs the arm, or changes its status.

        Raises:
            HeldError: another one does.
        """
        handle = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)  # no child inherits it
        try:
            deadline = time.monotonic() + _PATIENCE
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise HeldError(f"another process runs {self.path.name}") from None
                    time.sleep(0.02)
            yield
        finally:
            os.close(handle)

    def write_status(self, status: dict[str, Any]) -> None:
        """Write `status.json`; for who holds the arm."""
        write_json(self.path / "status.json", status)

    def conclude(self, status: str, reason: str, since: float, traceback: str = "") -> None:
        """Write what became of an arm that was given to somebody at the time `since`, and whose program was ended, or
        never began, without a word. Nothing where it has a result, has said something since, or runs."""
        with suppress(HeldError), self.hold():
            state, now = self.state_when_held, time.time()
            silent = state["status"] in ("pending", "lost") or (state.get("ended") or now) < since
            if state["status"] in FINAL or not silent:
                return
            began = state.get("started", now)
            if began < since:  # the state is an earlier attempt's, and so is its time
                state["seconds_before"] = state.get("seconds_before", 0.0) + state.get("seconds", 0.0)
                began = now
            self.write_status({**state, "status": status, "reason": reason, "traceback": traceback, "ended": now,
                               "seconds": now - began})

    def put_aside(self) -> None:
        """Keep the status and the notebook of an attempt before the next one; for who holds the arm."""
        state = read_json(self.path / "status.json")
        if not state or state["status"] == "pending":
            return
        aside = self.path / "attempts" / str(state.get("attempts", 1))
        aside.mkdir(parents=True, exist_ok=True)
        for file in (self.path / "status.json", self.notebook):
            if file.exists():
                shutil.copy2(file, aside)

    def reset(self, resume: bool) -> bool:
        """Have a finished arm run again; whether it was finished. What it left stays in `attempts/` and `runs/`.

        `resume`: from its newest checkpoint, where there is one; else from the beginning.
        """
        try:
            with self.hold():
                state = self.state_when_held
                if state["status"] not in FINAL:
                    return False
                self.put_aside()
                fields = {"since": None, "seconds_before": state.get("seconds_before", 0.0) + state.get("seconds", 0.0)
                          } if resume else {"since": time.time()}
                self.write_status({"status": "pending", "attempts": state.get("attempts", 1), **fields})
                return True
        except HeldError:
            return False

    @property
    def state_when_held(self) -> dict[str, Any]:
        """The state, for who holds the arm: nobody else runs it."""
        state = read_json(self.path / "status.json") or {"status": "pending"}
        return {**state, "status": "lost"} if state["status"] == "running" else state

    def checkpoint(self, steps: int) -> Path | None:
        """The newest checkpoint before `steps`, of any attempt since the arm was last begun anew."""
        since = read_json(self.path / "status.json").get("since") or 0.0
        for run in reversed(self.every_run):
            if run.folder.read("launch.json")["created"] < since:
                break
            for path in reversed(checkpoints_in(run.folder.checkpoints)):
                if int(path.name.removeprefix("step-")) < steps:
                    return path
        return None

    @property
    def _lock(self) -> Path:
        return self.path / "lock"
