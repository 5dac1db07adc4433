"""The supervisor: the process between the kernel and torchrun that sees a run to its end.

It lives in a session of its own, so that an interrupt of the kernel does not reach the ranks; it ends
everything below it when the kernel is gone, and is the only one to write `status.json`. It never imports
torch and sleeps nearly all the time. Should it die itself, the system ends torchrun, and with it the ranks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from collie_lab import rank
from collie_lab.folder import RunFolder, Tail, read_json
from collie_lab.launch import _agent, _processes
from collie_lab.launch._verdict import Cause, Facts, judge

__all__ = ["supervise"]

_POLL = 0.05


def supervise(path: str | Path) -> None:
    """Start the ranks of the run folder `path`, wait, end what has to be ended, write the status."""
    folder = RunFolder(path)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited: a rank that is not ready yet survives `Run.stacks`
    _processes.adopt_orphans()
    _Supervisor(folder).run()


class _Supervisor:
    def __init__(self, folder: RunFolder):
        self._folder = folder
        self._plan = folder.read("launch.json")
        self._began = time.time()
        self._oom_before = _processes.oom_kills()
        self._kill_asked = False
        self._stop_deadline: float | None = None
        self._stop_heeded = False
        self._failed_at: float | None = None
        self._log_offset = 0
        self._events = Tail(folder.path / "events.jsonl")
        self._agent_code: int | None = None
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def run(self) -> None:
        self._write_status("running")
        agent = self._start_agent()
        cause = self._watch(agent)
        if cause == "timeout":
            self._dump_stacks()
        # torchrun has sent SIGTERM to the peers of a failed rank, and they have had the grace to heed it.
        signalled = _processes.end_tree(agent, patience=0.0 if cause == "failed" else 1.0)
        self._reap(agent)
        self._conclude(cause, signalled)

    def _start_agent(self) -> int:
        tie = rank.die_with_parent if sys.platform == "linux" else None
        command = _agent.command(self._plan["module"], self._plan["world_size"], str(self._folder.path))
        # From the main thread: the kernel's signal to the child comes when the *thread* that started it ends.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=tie)
        process.returncode = 0  # it is reaped with all other children below, not by Popen
        return process.pid

    def _watch(self, agent: int) -> Cause:
        """Wait for the end, or for a reason to bring it about."""
        while True:
            self._reap(agent)
            self._look_for_failure()
            if self._agent_code is not None:
                return "failed" if self._failed_at else "ended"
            reason = self._reason_to_end()
            if self._failed_at and (reason or time.monotonic() > self._failed_at + self._plan["grace"]):
                return "failed"
            if reason:
                return reason
            time.sleep(_POLL)

    def _reason_to_end(self) -> Cause | None:
        if os.getppid() != self._plan["kernel_pid"]:
            return "orphaned"
        if self._kill_asked:
            return "killed"
        if self._plan["timeout"] is not None and time.time() > self._began + self._plan["timeout"]:
            return "timeout"
        return "unstopped" if self._stop_is_unheeded() else None

    def _look_for_failure(self) -> None:
        """Note when a rank has left an error record, or torchrun says that one has ended."""
        if self._failed_at is None and (any(self._folder.errors.glob("rank-*.json")) or self._agent_says_so()):
            self._failed_at = time.monotonic()

    def _agent_says_so(self) -> bool:
        with self._log.open("rb") as file:
            file.seek(self._log_offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._log_offset += end
        return _agent.started_closing(data[:end].decode(errors="replace"))

    def _stop_is_unheeded(self) -> bool:
        """Whether the stop flag stands and the ranks have not acknowledged it in time.

        The time is `grace`, or two steps where a step takes longer: ranks that make progress will heed it.
        """
        if self._stop_heeded or not self._folder.stop_flag.exists():
            return False
        if self._stop_deadline is None:
            patience = max(self._plan["grace"], 2 * _step_seconds(self._folder.path / "metrics.jsonl"))
            self._stop_deadline = time.monotonic() + patience
        self._stop_heeded = any(event.get("kind") in ("stopping", "ending") for event in self._events.new())
        return not self._stop_heeded and time.monotonic() > self._stop_deadline

    def _dump_stacks(self) -> None:
        for pid in _processes.ranks(os.getpid()).values():
            os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5)

    def _reap(self, agent: int) -> None:
        """Collect ended children: torchrun, and orphans that were adopted."""
        while True:
            try:
                pid, state = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == agent:
                self._agent_code = os.waitstatus_to_exitcode(state)

    def _conclude(self, cause: Cause, signalled: set[int]) -> None:
        exits = _agent.exits(self._log.read_text(encoding="utf-8", errors="replace"))
        records = [read_json(path) for path in sorted(self._folder.errors.glob("rank-*.json"))]
        verdict = judge(Facts(
            cause=cause, agent_code=self._agent_code, exits=exits, records=records,
            result=self._folder.read("result.json"), signalled=frozenset(signalled),
            oom_kills=_processes.oom_kills() - self._oom_before,
            grace=self._plan["grace"], timeout=self._plan["timeout"],
        ))
        codes = dict.fromkeys(range(self._plan["world_size"]), 0) if self._agent_code == 0 else {}
        codes |= {exit_.rank: exit_.code for exit_ in exits}
        self._write_status(verdict.status, ended=time.time(), detail=verdict.detail, rank=verdict.rank,
                           exit_codes={str(number): code for number, code in sorted(codes.items())})

    def _write_status(self, status: str, **more: Any) -> None:
        self._folder.write("status.json", {
            "status": status, "pid": os.getpid(), "pid_started": psutil.Process().create_time(),
            "started": self._began, "ended": None, "exit_codes": {}, "detail": "", "rank": None, **more,
        })

    def _on_sigterm(self, *_: object) -> None:
        self._kill_asked = True

    @property
    def _log(self) -> Path:
        return self._folder.logs / "launcher.log"


def _step_seconds(metrics: Path) -> float:
    """How long the last step took: from the last two records; 0 where there are none yet."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 8192))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0.0
    times = [float(json.loads(line)["time"]) for line in lines[-2:]]
    return times[1] - times[0] if len(times) == 2 else 0.0
