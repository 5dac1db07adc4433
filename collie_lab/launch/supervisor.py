"""The supervisor: the process between the kernel and torchrun that sees a run to its end.

It lives in a session of its own, so that an interrupt of the kernel does not reach the ranks; it ends
everything below it when the kernel is gone, and is the only one to write `status.json`. It never imports torch.
With several nodes it is node 0's: the others (`_member`) begin and end when it says so.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

from collie_lab.folder import JsonLines, RunFolder
from collie_lab.launch import _nodes, _processes
from collie_lab.launch._conclusion import conclude, write_status
from collie_lab.launch._course import Course
from collie_lab.launch._keeper import PoolKeeper
from collie_lab.launch._member import Member
from collie_lab.launch._verdict import Cause, Report, Verdict, how_it_ended
from collie_lab.launch._watch import POLL, TO_END, Watcher

__all__ = ["supervise"]

#: Seconds that other nodes get to report, where the verdict does not need them.
_FAREWELL = 8.0


def supervise(path: str | Path, role: str) -> int:
    """Start the ranks of the run folder `path` on this machine, wait, end what has to be ended; the exit code.

    `role`: `lead` a run; `join` one with a further machine, which takes the next free number; keep a `pool`.
    """
    folder = RunFolder(path)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited: a rank that is not ready yet survives `Run.stacks`
    _processes.adopt_orphans()
    watcher = _member(folder) if role == "join" else PoolKeeper(folder) if role == "pool" else Supervisor(folder)
    return watcher.run()


def _member(folder: RunFolder) -> Member:
    # Who is told to leave once it has a number must be able to say so: others wait for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, TO_END)
    count = folder.read("launch.json")["nodes"]["count"]
    node = _nodes.claim(folder, count)
    if node is None:
        sys.exit(f"cannot join {folder.path}: all {count} nodes are there already")
    member = Member(folder, node)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_END)
    return member


class Supervisor(Watcher):
    """Node 0: it also writes the status, and leads the other nodes."""

    def __init__(self, folder: RunFolder):
        super().__init__(folder, 0)
        self._course = Course(folder, self._ranks)
        nodes = self._plan["nodes"]
        self._beacon = _nodes.Beacon(folder, 0) if nodes else None
        self._members = {node: _nodes.Sight(folder, node, nodes["silence"]) for node in range(1, nodes["count"])} \
            if nodes else {}
        if self._beacon is not None:
            self._beacon.say(state="waiting")
            signal.signal(signal.SIGUSR2, self._on_sigusr2)
        self._stacks_asked, self._stacks_passed_on = 0, 0
        write_status(self._course, "running")

    # --- the beginning

    def _assemble(self) -> Cause | None:
        told: list[int] = []
        while missing := [node for node in self._members if not self._is_here(node)]:
            if missing != told:
                write_status(self._course, "running", detail=self._invitation(missing))
                told = missing
            if self._folder.stop_flag.exists():
                return "killed"
            if reason := self._reason_to_end():
                return reason
            if self._a_member_has_failed():
                return "failed"
            if time.time() > self._began + self._plan["nodes"]["timeout"]:
                return "absent"
            time.sleep(POLL)
        if self._beacon is not None:
            self._beacon.say(state="running")
            write_status(self._course, "running")
        return None

    def _is_here(self, node: int) -> bool:
        facts = self._members[node].look()
        if facts.get("state") == "ended":  # it has left again: another may take its number
            self._members[node].forget()
            return False
        return bool(facts)

    def _invitation(self, missing: list[int]) -> str:
        nodes = self._plan["nodes"]
        return f"waiting for {len(missing)} of {nodes['count']} nodes: run `{nodes['command']}` there"

    # --- the watch

    def _reason_to_end(self) -> Cause | None:
        if self._beacon is not None:
            self._beacon.beat()
            if self._stacks_passed_on < self._stacks_asked:
                self._stacks_passed_on = self._stacks_asked
                self._beacon.say(stacks=self._stacks_asked)
        if self._plan["kernel_pid"] not in (None, os.getppid()):  # None: it is to outlive the kernel
            return "orphaned"
        return "killed" if self._kill_asked else self._course.reason_to_end()

    def _sees_failure(self) -> bool:
        return super()._sees_failure() or self._a_member_has_failed()

    def _a_member_has_failed(self) -> bool:
        """Whether a node is lost, or has ended otherwise than well."""
        for sight in self._members.values():
            facts = sight.look()
            if facts and (sight.lost or (facts["state"] == "ended" and facts["report"]["agent_code"] != 0)):
                return True
        return False

    def _on_sigusr2(self, *_: object) -> None:
        """Somebody wants the stacks of all ranks: `Run.stacks`, which reaches those of this node itself."""
        self._stacks_asked += 1

    # --- the end

    def _announce(self, cause: Cause) -> None:
        if self._beacon is not None:
            self._beacon.say(state="ending", cause=cause, agent_code=self._agent_code)

    def _conclude(self, report: Report) -> int | None:
        reports = {0: report} | self._reports_of_members(report.cause)
        cause, verdict = conclude(self._course, reports, self._absent(report.cause, reports))
        if self._may_begin_again(cause, verdict):
            self._begin_again(verdict)
            return None
        if self._beacon is not None:
            self._beacon.say(state="ended", status=verdict.status, detail=verdict.detail)
        return 0

    def _may_begin_again(self, cause: Cause, verdict: Verdict) -> bool:
        """Whether there is an attempt left, and hope: nobody wanted the end, and it was not for want of GPU memory,
        which would be wanting again."""
        return (self._course.attempts <= self._plan["max_restarts"] and cause in ("ended", "failed", "stalled")
                and verdict.status in ("error", "host_oom", "timeout") and not self._folder.stop_flag.exists())

    def _begin_again(self, verdict: Verdict) -> None:
        """Put what the attempt has left aside, and go on from the newest checkpoint."""
        checkpoint = self._folder.latest_checkpoint()
        aside = self._folder.path / "attempts" / str(self._course.attempts)
        aside.mkdir(parents=True)
        shutil.copy2(self._folder.path / "status.json", aside)
        for part in (self._folder.logs, self._folder.errors, self._folder.beats):
            part.rename(aside / part.name)
            part.mkdir()
        self._course.begin_again()
        if checkpoint is not None:
            self._folder.write("launch.json", {**self._plan, "resume_from": str(checkpoint)})
        events = JsonLines(self._folder.path / "events.jsonl")
        events.append({"time": time.time(), "kind": "restart", "attempt": self._course.attempts,
                       "step": int(checkpoint.name.removeprefix("step-")) if checkpoint else 0,
                       "detail": verdict.detail})
        events.close()
        write_status(self._course, "running", detail=f"attempt {self._course.attempts}")

    def _reports_of_members(self, cause: Cause) -> dict[int, Report | None]:
        """What the other nodes say of their part, once they have; None for a node that never came, or is lost."""
        patience = None if cause in ("ended", "failed") else time.monotonic() + _FAREWELL
        reports: dict[int, Report | None] = {}
        while waiting := self._members.keys() - reports.keys():
            for node in waiting:
                facts = self._members[node].look()
                if facts.get("state") == "ended":
                    reports[node] = Report.from_json(facts["report"])
                elif not facts or self._members[node].lost or (patience and time.monotonic() > patience):
                    reports[node] = None
            if self._beacon is not None:
                self._beacon.beat()
            time.sleep(POLL)
        return dict(sorted(reports.items()))

    def _absent(self, cause: Cause, reports: dict[int, Report | None]) -> list[str]:
        """A sentence on every node that did not come, was lost, or lost its torchrun."""
        if not self._members:
            return []
        sentences = []
        for node, report in reports.items():
            host = self._members[node].host if node else os.uname().nodename
            name = f"node {node} ({host})" if host else f"node {node}"
            if not host:
                if cause == "absent":
                    sentences.append(f"{name} did not come within {self._plan['nodes']['timeout']:g} s")
            elif report is None:
                sentences.append(f"{name} is gone: no sign of life for {self._plan['nodes']['silence']:g} s")
            elif node and report.cause == "killed":
                sentences.append(f"{name} left: somebody ended its part there")
            elif report.cause == "ended" and (report.agent_code or 0) < 0:
                sentences.append(f"{name}: the launcher (torchrun) was {how_it_ended(report.agent_code or 0)}")
        return sentences
