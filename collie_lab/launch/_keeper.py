"""The supervisor of a pool: it keeps warm ranks, and sees every run that they are given to its end."""

from __future__ import annotations

import os
import shutil

from collie_lab.commands import Commands
from collie_lab.folder import RunFolder, read_json
from collie_lab.launch._conclusion import conclude, write_status
from collie_lab.launch._course import Course
from collie_lab.launch._verdict import Cause, Report
from collie_lab.launch._watch import Watcher

__all__ = ["PoolKeeper"]


class PoolKeeper(Watcher):
    """Lives as long as the kernel, or until a run fails: what a failed run has left in its ranks is not to be trusted.
    """

    def __init__(self, folder: RunFolder):
        super().__init__(folder, 0)
        self._own = Course(folder, self._ranks)
        self._commands = Commands(folder)
        self._index = 1
        self._course: Course | None = None
        write_status(self._own, "running")

    @property
    def _subject(self) -> RunFolder:
        return self._course.folder if self._course else self._folder

    def _assemble(self) -> Cause | None:
        return None

    def _reason_to_end(self) -> Cause | None:
        if os.getppid() != self._plan["kernel_pid"]:
            return "orphaned"
        if self._kill_asked:
            return "killed"
        self._follow()
        return self._course.reason_to_end() if self._course else None

    def _follow(self) -> None:
        """Take up the run that the ranks have been given, and conclude it when all have done it."""
        while (path := self._commands.path(self._index)).exists():
            command = read_json(path)
            if self._course is None and command["kind"] == "run":
                self._course = Course(RunFolder(command["folder"]), self._ranks)
                write_status(self._course, "running")
            if len(self._commands.outcomes(self._index, len(self._ranks))) < len(self._ranks):
                return
            if self._course is not None:
                conclude(self._course, {0: Report("ended", agent_code=0)})
                self._course = None
            self._index += 1

    def _announce(self, cause: Cause) -> None:
        """Nobody waits for words."""

    def _conclude(self, report: Report) -> int:
        self._follow()  # what the ranks had just finished
        if self._course is not None:
            shutil.copy2(self._log, self._course.folder.launcher_log())
            conclude(self._course, {0: report})
        conclude(self._own, {0: report})
        if report.cause == "orphaned":  # nobody else is left to do it
            shutil.rmtree(self._plan["parent"], ignore_errors=True)
        return 0
