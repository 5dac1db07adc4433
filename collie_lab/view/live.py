"""`watch`: follows a run from a thread of its own and draws it where it is looked at."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Protocol

from collie_lab.folder import RunFolder
from collie_lab.view.history import History

__all__ = ["View", "Watched", "attended", "watch"]


class Watched(Protocol):
    """What the view needs to know of a run."""

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""

    @property
    def alive(self) -> bool:
        """Whether its processes still exist."""

    def stop(self) -> object:
        """Ask the ranks to stop after the step they are in."""


class View(Protocol):
    """Draws a history in one place. `draw` is called at most every `interval` seconds, `close` once."""

    interval: float

    def open(self, history: History) -> None:
        """Draw for the first time; called in the thread of the caller, the others from the follower's."""

    def draw(self, history: History) -> None:
        """Draw again."""

    def close(self, history: History) -> None:
        """Draw for the last time: the run has ended."""


class _Follower(threading.Thread):
    """Reads the run's folder and draws until the run has ended.

    A thread, because the picture is to go on when the cell that waits is interrupted (the ranks then
    finish their step), and when nobody waits at all. It never outlives the interpreter.
    """

    def __init__(self, run: Watched, view: View, poll: float):
        super().__init__(name=f"view of {run.folder.id}", daemon=True)
        self._run, self._view, self._poll = run, view, poll
        #: Set when there is nothing more to draw. Waited for instead of `join`, which in Python 3.11 and 3.12
        #: takes a thread for ended when it is interrupted itself.
        self.ended = threading.Event()
        self._history = History(run.folder)
        self._history.update(run.alive)
        view.open(self._history)

    def run(self) -> None:
        try:
            self._follow()
        except Exception as error:  # a broken picture must not end the run, nor the wait for it
            warnings.warn(f"the view of {self._run.folder.id} ended: {error!r}; the run itself goes on", stacklevel=2)
            while self._run.alive:
                time.sleep(self._poll)
        finally:
            self.ended.set()

    def _follow(self) -> None:
        drawn, changed = time.monotonic(), False
        while True:
            alive = self._run.alive  # asked before reading: what was written until the end is then read
            changed |= self._history.update(alive)
            if not alive:
                break
            since = time.monotonic() - drawn
            # Without news the clocks still move, once a second.
            if since >= self._view.interval and (changed or since >= 1.0):
                self._view.draw(self._history)
                drawn, changed = time.monotonic(), False
            time.sleep(self._poll)
        self._view.close(self._history)


#: Followers whose waiting was interrupted: who watches such a run again joins the picture that is there.
_interrupted: dict[Path, _Follower] = {}


def watch(run: Watched, poll: float = 0.05, wait: bool = True) -> None:
    """Show a run until it has ended: a panel in a notebook, a progress line in a terminal, else plain lines.

    `poll` is the time in seconds between two looks at its folder. With `wait=False` a notebook's panel
    lives on after the cell has ended, and elsewhere nothing is shown.
    """
    follower = _interrupted.pop(run.folder.path, None)
    if follower is None:
        view = _view_for(run, wait)
        if view is None:
            return
        follower = _Follower(run, view, poll)
        follower.start()
    try:
        while wait and not follower.ended.wait(poll):
            pass
    except KeyboardInterrupt:
        _interrupted[run.folder.path] = follower
        raise


def _view_for(run: Watched, wait: bool) -> View | None:
    if _kernel() is not None:
        from collie_lab.view.panel import Panel

        return Panel(run, attended=attended(), blocking=wait)
    if not wait:
        return None
    from collie_lab.view.terminal import PlainLines, ProgressLine

    return ProgressLine() if sys.stdout.isatty() else PlainLines()


def _kernel() -> object | None:
    """The Jupyter kernel this is running in, or None."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None)


def attended() -> bool:
    """Whether somebody may be looking: papermill and nbconvert execute cells without a stdin, people with one."""
    return bool(getattr(_kernel(), "_allow_stdin", True))
