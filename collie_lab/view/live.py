"""`watch`: follows runs from a thread of its own and draws them where they are looked at."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from collie_lab.folder import RunFolder
from collie_lab.view.comparison import Comparison, labelled
from collie_lab.view.history import History

__all__ = ["View", "Watched", "attended", "watch"]

Shown = TypeVar("Shown", contravariant=True)


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


class View(Protocol[Shown]):
    """Draws a `History`, or the `Comparison` of several, in one place.

    `draw` is called at most every `interval` seconds, `close` once.
    """

    interval: float

    def open(self, shown: Shown, /) -> None:
        """Draw for the first time; called in the thread of the caller, as is `interrupted`, the others from the
        follower's."""

    def draw(self, shown: Shown, /) -> None:
        """Draw again."""

    def interrupted(self) -> bool:
        """The caller waits no longer, and the runs go on; whether to go on drawing them."""

    def close(self, shown: Shown, /) -> None:
        """Draw for the last time: the runs have ended, or are watched no longer."""


class _Follower(threading.Thread):
    """Reads the folders of runs and draws until all of them have ended.

    A thread, because the picture is to go on when the cell that waits is interrupted (the ranks then
    finish their step), and when nobody waits at all. It never outlives the interpreter.
    """

    def __init__(self, runs: Sequence[Watched], histories: Sequence[History], shown: Any, view: View[Any], poll: float):
        self._names = ", ".join(run.folder.id for run in runs)
        super().__init__(name=f"view of {self._names}", daemon=True)
        self._going = dict(enumerate(runs))
        self._histories, self._shown, self._view, self._poll = histories, shown, view, poll
        self._left = threading.Event()
        #: Set when there is nothing more to draw. Waited for instead of `join`, which in Python 3.11 and 3.12
        #: takes a thread for ended when it is interrupted itself.
        self.ended = threading.Event()
        for run, history in zip(runs, histories, strict=True):
            history.update(run.alive)
        view.open(shown)

    def run(self) -> None:
        try:
            self._follow()
        except Exception as error:  # a broken picture must not end the run, nor the wait for it
            warnings.warn(f"the view of {self._names} ended: {error!r}; the run itself goes on", stacklevel=2)
            while any(run.alive for run in self._going.values()) and not self._left.is_set():
                time.sleep(self._poll)
        finally:
            self.ended.set()

    def interrupted(self) -> None:
        """The caller waits no longer, and the runs go on."""
        if not self._view.interrupted():
            self._left.set()
            self.ended.wait(_LEAVE_WITHIN)

    def _follow(self) -> None:
        drawn, changed = time.monotonic(), False
        while not self._left.is_set():
            changed |= self._read()
            if not self._going:
                break
            since = time.monotonic() - drawn
            # Without news the clocks still move, once a second.
            if since >= self._view.interval and (changed or since >= 1.0):
                self._view.draw(self._shown)
                drawn, changed = time.monotonic(), False
            time.sleep(self._poll)
        self._view.close(self._shown)

    def _read(self) -> bool:
        """Read what the runs have written, and whether that was anything; what has ended is read for the last time."""
        changed = False
        for index, run in list(self._going.items()):
            alive = run.alive  # asked before reading: what was written until the end is then read
            changed |= self._histories[index].update(alive)
            if not alive:
                del self._going[index]
                changed = True
        return changed


#: Followers whose waiting was interrupted: who watches such a run again joins the picture that is there.
_interrupted: dict[Path, _Follower] = {}

_LEAVE_WITHIN: Final = 2.0


def watch(*runs: Watched, labels: Sequence[str] | None = None, poll: float = 0.05, wait: bool = True,
          stops: bool = False) -> None:
    """Show runs until they have ended: a panel in a notebook, progress lines in a terminal, else plain lines.

    Several runs share one chart and one table, where `labels` name them in the same order (by default their
    ids). An interrupt ends the watching only, and the runs go on.

    With `wait=False` a notebook's panel lives on after the cell has ended, and elsewhere nothing is shown.
    `poll` is the time in seconds between two looks at the folders. `stops`: the caller stops a run that it
    watches when it is interrupted itself, and watches it again until it has ended.
    """
    names = labelled(runs, labels, "watch", "runs one by one, watch(a, b)")
    follower = _interrupted.pop(runs[0].folder.path, None) if stops else None
    if follower is None:
        follower = _follower(runs, names, poll, wait, stops)
        if follower is None:
            return
        follower.start()
    try:
        while wait and not follower.ended.wait(poll):
            pass
    except KeyboardInterrupt:
        if stops:
            _interrupted[runs[0].folder.path] = follower
            raise
        follower.interrupted()
        what = "the run goes on; run.stop() ends it" if len(runs) == 1 else "the runs go on; run.stop() ends one"
        raise KeyboardInterrupt(f"the watching has ended, {what}") from None


def _follower(runs: Sequence[Watched], names: Sequence[str], poll: float, wait: bool,
              stops: bool) -> _Follower | None:
    histories = [History(run.folder) for run in runs]
    if len(runs) == 1:
        view = _view_for(runs[0], wait, stops)
        return None if view is None else _Follower(runs, histories, histories[0], view, poll)
    several = _view_for_several(names, wait)
    return None if several is None else _Follower(runs, histories, Comparison(tuple(names), tuple(histories)),
                                                  several, poll)


def _view_for(run: Watched, wait: bool, stops: bool) -> View[History] | None:
    if _kernel() is not None:
        from collie_lab.view.panel import Panel

        # A kernel that waits hears no button; it hears an interrupt. (Subshells would carry the click, but
        # ipykernel sends it back to the shell that made the button: the busy one.)
        effect = "stops the run after its current step" if stops else "ends the watching only, and the run goes on"
        return Panel(run, attended=attended(), button=not wait, hint=_hint(effect, wait))
    if not wait:
        return None
    from collie_lab.view.terminal import PlainLines, ProgressLine, moving_lines

    return ProgressLine(moving_lines()) if sys.stdout.isatty() else PlainLines()


def _view_for_several(names: Sequence[str], wait: bool) -> View[Comparison] | None:
    if _kernel() is not None:
        from collie_lab.view.panel import ComparisonPanel

        return ComparisonPanel(attended=attended(), hint=_hint("ends the watching only, and the runs go on", wait))
    if not wait:
        return None
    from collie_lab.view.terminal import moving_lines, several_lines

    return several_lines(names, moving_lines() if sys.stdout.isatty() else None)


def _hint(effect: str, wait: bool) -> str:
    """What an interrupt does, for a person who looks at a cell that waits."""
    return f"Interrupting the cell (■) {effect}." if wait and attended() else ""


def _kernel() -> object | None:
    """The Jupyter kernel this is running in, or None."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None)


def attended() -> bool:
    """Whether somebody may be looking: papermill and nbconvert execute cells without a stdin, people with one."""
    return bool(getattr(_kernel(), "_allow_stdin", True))
