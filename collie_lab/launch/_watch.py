"""What a supervisor does on any machine: start torchrun, wait, and end what has to be ended.

It sleeps nearly all the time. Should it die itself, the system ends torchrun, and with it the ranks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from typing import Final

from collie_lab import rank
from collie_lab.folder import RunFolder
from collie_lab.launch import _agent, _nodes, _processes, _stacks
from collie_lab.launch._verdict import Cause, Report

__all__ = ["POLL", "TO_END", "Watcher"]

POLL: Final = 0.05

#: Signals by which people and systems ask for the end.
TO_END: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Watcher(ABC):
    """The ranks of one node, from their start to their end."""

    def __init__(self, folder: RunFolder, node: int):
        self._folder, self._node = folder, node
        self._plan = folder.read("launch.json")
        self._began = time.time()
        self._kill_asked = False
        self._log = folder.launcher_log(node)
        nodes, ranks = self._plan["nodes"], self._plan["world_size"]
        share = ranks // nodes["count"] if nodes else ranks
        self._ranks: Final = range(node * share, (node + 1) * share)
        for number in TO_END:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a shell's background job
                signal.signal(number, self._on_signal)

    def run(self) -> int:
        """See the ranks to their end, as often as they are begun again; the exit code."""
        while True:
            if (code := self._conclude(self._attempt())) is not None:
                return code

    def _attempt(self) -> Report:
        """The ranks, from their start to their end."""
        self._oom_before = _processes.oom_kills()
        self._failed_at: float | None = None
        self._log_offset = 0
        self._agent_code: int | None = None
        cause, signalled = self._assemble(), set[int]()
        if cause is None:
            agent = self._start_agent()
            cause = self._watch(agent)
            self._announce(cause)
            if cause in ("timeout", "stalled"):
                _stacks.keep(self._subject, self._node, self._take_stacks())
            # torchrun has sent SIGTERM to the peers of a failed rank, and they have had the grace to heed it.
            signalled = _processes.end_tree(agent, patience=0.0 if cause == "failed" else 1.0)
            self._reap(agent)
        else:
            self._announce(cause)
        return self._report(cause, signalled)

    @property
    def _subject(self) -> RunFolder:
        """The run whose errors and stacks count."""
        return self._folder

    # --- what differs between the notebook's machine and the others

    @abstractmethod
    def _assemble(self) -> Cause | None:
        """Wait for the other nodes; a reason to end before the beginning, if there is one."""

    @abstractmethod
    def _reason_to_end(self) -> Cause | None:
        """Why the ranks have to be ended now, if they have to; called again and again."""

    @abstractmethod
    def _announce(self, cause: Cause) -> None:
        """Called once the end has come, before the ranks that are left are ended."""

    @abstractmethod
    def _conclude(self, report: Report) -> int | None:
        """Called when nothing is left; the exit code, or None to begin again."""

    # --- what is the same

    def _start_agent(self) -> int:
        tie = rank.die_with_parent if sys.platform == "linux" else None
        nodes = self._plan["nodes"]
        place = ["--standalone"] if nodes is None else _nodes.rendezvous(nodes, self._node, self._folder.id)
        command = _agent.command(self._plan["module"], len(self._ranks), str(self._folder.path), place)
        with self._log.open("ab") as log:
            self._log_offset = log.tell()
            # From the main thread: the kernel's signal to the child comes when the *thread* that started it ends.
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=tie,
                                       env={**os.environ, rank.SUPERVISOR: str(os.getpid())})
        process.returncode = 0  # it is reaped with all other children below, not by Popen
        return process.pid

    def _watch(self, agent: int) -> Cause:
        """Wait for the end, or for a reason to bring it about."""
        while True:
            self._reap(agent)
            if self._failed_at is None and self._sees_failure():
                self._failed_at = time.monotonic()
            if self._agent_code is not None:  # below 0: somebody has killed it, and what failed, failed of that
                return "failed" if self._failed_at and self._agent_code >= 0 else "ended"
            reason = self._reason_to_end()
            if self._failed_at and (reason or time.monotonic() > self._failed_at + self._plan["grace"]):
                return "failed"
            if reason:
                return reason
            time.sleep(POLL)

    def _sees_failure(self) -> bool:
        """Whether a rank has left an error record, or torchrun says that one has ended."""
        return any(self._subject.errors.glob("rank-*.json")) or self._agent_says_so()

    def _agent_says_so(self) -> bool:
        with self._log.open("rb") as file:
            file.seek(self._log_offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._log_offset += end
        return _agent.started_closing(data[:end].decode(errors="replace"))

    def _take_stacks(self) -> dict[int, str]:
        """The stacks of the ranks on this machine."""
        pids = _processes.ranks(os.getpid())
        return _stacks.take(self._subject, pids.values(), pids)

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

    def _report(self, cause: Cause, signalled: set[int]) -> Report:
        text = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
        exits = _agent.exits(text)
        return Report(cause, self._agent_code, exits, [exit_.rank for exit_ in exits if exit_.pid in signalled],
                      _processes.oom_kills() - self._oom_before)

    def _on_signal(self, *_: object) -> None:
        self._kill_asked = True
