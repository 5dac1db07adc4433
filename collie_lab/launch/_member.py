"""The supervisor of every node but the notebook's: it begins and ends when node 0 says so, and reports to it."""

from __future__ import annotations

import contextlib
import dataclasses
import time

from collie_lab.folder import RunFolder
from collie_lab.launch import _nodes
from collie_lab.launch._stall import StallWatch
from collie_lab.launch._verdict import Cause, Report
from collie_lab.launch._watch import POLL, Watcher

__all__ = ["Member"]

#: Ends of a run that are no failure.
_GOOD = ("ok", "stopped", "diverged")


class Member(Watcher):
    """Node 1 and on. Its words for people go to the terminal in which it was started."""

    def __init__(self, folder: RunFolder, node: int):
        super().__init__(folder, node)
        self._beacon = _nodes.Beacon(folder, node)
        self._head = _nodes.Sight(folder, 0, self._plan["nodes"]["silence"])
        self._stall = StallWatch(folder, self._ranks, self._plan["stall_timeout"])
        self._dismissed_at: float | None = None
        self._stacks_shown = 0
        self._beacon.say(state="waiting")

    def _assemble(self) -> Cause | None:
        self._tell("waiting for the other nodes")
        while self._head.look().get("state") != "running":
            if reason := self._reason_to_end():
                return reason
            time.sleep(POLL)
        self._beacon.say(state="running")
        self._tell(f"running; the words of torchrun go to {self._log}")
        return None

    def _reason_to_end(self) -> Cause | None:
        self._beacon.beat()
        head = self._head.look()
        if (asked := head.get("stacks", 0)) > self._stacks_shown:
            self._stacks_shown = asked
            self._take_stacks()
        if self._kill_asked:
            return "killed"
        if self._head.lost:
            return "orphaned"
        if head.get("state") not in ("ending", "ended"):
            return "stalled" if self._stall.stalled() else None
        if head.get("agent_code") == 0:  # all is well: our ranks have ended too, and torchrun is about to
            self._dismissed_at = self._dismissed_at or time.monotonic()
            if time.monotonic() < self._dismissed_at + self._plan["grace"]:
                return None
        return "timeout" if head.get("cause") == "timeout" else "dismissed"

    def _announce(self, cause: Cause) -> None:
        """Nobody waits for this node's words before its end."""

    def _conclude(self, report: Report) -> int:
        self._beacon.say(state="ended", report=dataclasses.asdict(report))
        if report.cause == "killed":
            began = self._head.look().get("state") != "waiting"
            self._tell("left; the run cannot go on" if began else "left; another machine may come instead")
            return 1
        while (head := self._head.look()).get("state") != "ended" and not (self._head.lost or self._kill_asked):
            time.sleep(POLL)
        if head.get("state") != "ended":
            self._tell("left; the run may go on to its end" if self._kill_asked else
                       f"ended: node 0 has shown no sign of life for {self._plan['nodes']['silence']:g} s")
            return 1
        self._tell(": ".join(filter(None, (head["status"], head["detail"]))))
        return 0 if head["status"] in _GOOD else 1

    def _tell(self, words: str) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone
            print(f"{self._folder.id}, node {self._node} of {self._plan['nodes']['count']}: {words}", flush=True)
