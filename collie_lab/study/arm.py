"""Runs one arm: `python -m collie_lab.study.arm FOLDER`, whoever starts it: a local runner, Slurm, Ray, a person.

It takes the arm's lock, has papermill execute `arm.ipynb` in a kernel below it, watches time and memory, and writes
what became of it. SIGTERM and SIGINT stop the run after its step, with a checkpoint; the next attempt goes on from
there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from collie_lab.cells import CellError
from collie_lab.launch import Run
from collie_lab.launch._processes import adopt_orphans, oom_kills
from collie_lab.provenance import provenance
from collie_lab.study._judge import Facts, Outcome, judge
from collie_lab.study._watch import Watch
from collie_lab.study.arms import Arm, read_arm
from collie_lab.study.store import FINAL, HELD, ArmFolder, HeldError

__all__ = ["NOTEBOOK", "main", "run_arm"]

#: The notebook that every arm executes.
NOTEBOOK: Final = Path(__file__).with_name("arm.ipynb")
#: Seconds that a kernel gets to start, on a machine where many start at once.
_START: Final = 300
#: Seconds that the run of an attempt gets to end when its kernel has.
_LAST_RUN: Final = 30.0


def main() -> int:
    """Run the arm of the folder that is named; the exit code. What became of it says `status.json`, not the code."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        outcome = run_arm(sys.argv[1])
    except HeldError as error:
        print(error, file=sys.stderr)
        return HELD
    print(f"{outcome['status']}: {outcome.get('reason', '')}".rstrip(": "))
    return 0


def run_arm(place: str | Path) -> dict[str, Any]:
    """Make an attempt at an arm, unless it has its result; its state.

    Raises:
        HeldError: another process runs it.
        CellError: the folder is no arm's.
    """
    arm, folder = read_arm(place), ArmFolder(place)
    with folder.hold():
        before = folder.state_when_held
        if before["status"] in FINAL:
            return before
        return _Attempt(arm, folder, before).make()


class _Attempt:
    """One attempt at an arm, in this process, which holds its lock."""

    def __init__(self, arm: Arm, folder: ArmFolder, before: Mapping[str, Any]):
        self._arm, self._folder = arm, folder
        self._known = {run.id for run in folder.every_run}
        folder.put_aside()
        self._status: dict[str, Any] = {
            "status": "running", "reason": "", "attempts": before.get("attempts", 0) + 1, "since": before.get("since"),
            "seconds": 0.0, "seconds_before": before.get("seconds_before", 0.0) + before.get("seconds", 0.0),
            "started": time.time(), "ended": None, "pid": os.getpid(), "run": None, "peak_host_bytes": None,
            "provenance": provenance(),
        }
        folder.write_status(self._status)

    def make(self) -> dict[str, Any]:
        """Execute the notebook and write what became of it."""
        adopt_orphans()
        for earlier in self._folder.every_run:
            _end(earlier)  # of an attempt that was killed: it may still be about to end, and hold GPUs
        kills, raised = oom_kills(), {}
        from collie_lab.study._kernel import kernel  # slow to import; the status says "running" by now

        with kernel(self._folder.path) as (manager, process):
            watch = Watch(process.pid, lambda: self._run, self._arm.timeout, self._arm.memory_limit)
            with _signals(watch):
                watch.start()
                try:
                    raised = self._execute(manager)
                finally:
                    code = process.poll()
                    watch.end()
        run = self._run
        if run is not None:
            _end(run)
        outcome = judge(Facts(
            run_status=None if run is None else run.status, run_detail="" if run is None else run.detail,
            raised=raised, kernel_code=code, over=watch.over, timed_out=watch.timed_out, timeout=self._arm.timeout,
            stopping=watch.stopping.is_set(), oom_kills=oom_kills() - kills))
        return self._conclude(outcome, run, watch.peak_bytes)

    def _execute(self, manager: Any) -> dict[str, str]:
        """Execute the notebook; what a cell of it raised."""
        import papermill
        from nbclient.exceptions import DeadKernelError

        logging.getLogger("papermill").setLevel(logging.WARNING)
        checkpoint = self._folder.checkpoint(self._arm.experiment.training.steps)
        try:
            papermill.execute_notebook(
                NOTEBOOK, self._folder.notebook, km=manager, start_timeout=_START, progress_bar=False,
                parameters={"arm": str(self._folder.path), "resume": str(checkpoint) if checkpoint else None})
        except papermill.PapermillExecutionError as error:
            return {"name": error.ename, "message": error.evalue, "traceback": _plain("\n".join(error.traceback))}
        except (DeadKernelError, RuntimeError) as error:  # "Kernel died before replying to kernel_info"
            print(error, file=sys.stderr)
        return {}

    @property
    def _run(self) -> Run | None:
        """The run of this attempt."""
        return next((run for run in self._folder.every_run if run.id not in self._known), None)

    def _conclude(self, outcome: Outcome, run: Run | None, peak: int | None) -> dict[str, Any]:
        ended = time.time()
        traceback = outcome.traceback
        if run is not None and outcome.status in ("error", "cuda_oom", "host_oom") and (error := run.error) is not None:
            traceback = error.traceback or traceback
        self._status |= {
            "status": outcome.status, "reason": outcome.reason, "traceback": traceback, "ended": ended,
            "seconds": ended - self._status["started"], "peak_host_bytes": peak,
            "run": None if run is None else str(run.folder.path.relative_to(self._folder.path)),
        }
        if run is not None:
            self._status["provenance"] |= run.folder.read("env.json")
        self._folder.write_status(self._status)
        return self._status


@contextlib.contextmanager
def _signals(watch: Watch) -> Iterator[None]:
    """Within it, who asks for the end of this process has the run stop with a checkpoint."""
    def ask(*_: object) -> None:
        watch.stopping.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(run: Run) -> None:
    """Wait until nothing of a run is left on this machine; end it where that takes too long."""
    if run.host != socket.gethostname():
        return
    with contextlib.suppress(TimeoutError):
        run.wait(_LAST_RUN)
    run.kill()


def _plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="papermill")
    try:
        sys.exit(main())
    except CellError as error:
        sys.exit(str(error))
