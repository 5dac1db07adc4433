"""A run in a shell: one progress line in a terminal, plain lines in a pipe or a log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from collie_lab.view.facts import STATUS_WORDS, closing_line, evaluation_text, failure_title, progress_text
from collie_lab.view.history import History
from collie_lab.view.units import bytes_text, count_text, duration_text, number_text

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["PlainLines", "ProgressLine"]


class _Announcer:
    """What both views tell only once, each on a line of its own: evaluations and warnings."""

    def __init__(self) -> None:
        self._evaluations: set[tuple[int, str]] = set()
        self._warnings = 0

    def new(self, history: History) -> list[str]:
        lines = []
        for item in history.evaluations:
            text = evaluation_text(item.values)
            if (item.step, text) not in self._evaluations:
                self._evaluations.add((item.step, text))
                lines.append(f"  step {item.step:,}: evaluation: {text}")
        lines += [f"  warning: {text}" for text in history.warnings[self._warnings:]]
        self._warnings = len(history.warnings)
        return lines


def _ending(history: History) -> list[str]:
    """The last lines: how the run ended and, where it failed, why."""
    lines = [f"  {closing_line(history)}"]
    if history.status not in ("ok", "stopped") and history.detail:
        lines.append(f"  {history.detail}")
    for failure in history.failures()[:3]:
        lines += [f"  {line}" for line in failure_title(failure).splitlines()]
    return lines


def _numbers(history: History) -> list[str]:
    """The moving numbers of the latest step."""
    parts = [f"loss {number_text(history.latest('loss'))}"]
    if history.latest("lr") is not None:
        parts.append(f"lr {number_text(history.latest('lr'), 2)}")
    speed = history.recent("tokens_per_second")
    if speed is not None:
        parts.append(f"{count_text(speed)} tok/s")
    memory = history.peak("memory_allocated")
    if memory is not None:
        parts.append(bytes_text(memory))
    remaining = history.eta()
    if remaining is not None:
        parts.append(f"{duration_text(remaining)} left")
    return parts


class PlainLines:
    """Lines for a log: few enough to read, often enough to see that the run is alive.

    A progress line is due after every tenth of the steps, and when 5 s have passed, a span that grows
    with the run (2 % of its time), so that a run of days writes hundreds of lines and not a hundred
    thousand.
    """

    interval = 0.1

    def __init__(self) -> None:
        self._once = _Announcer()
        self._phase = ""
        self._last_step = 0
        self._opened = self._last_time = time.monotonic()

    def open(self, history: History) -> None:
        """The line at the start: the run and its folder."""
        print(f"run {history.folder.id} in {history.folder.path.parent}", flush=True)

    def draw(self, history: History) -> None:
        """Print what is due."""
        lines = self._once.new(history)
        if history.phase != self._phase:
            self._phase = history.phase
            lines += [f"  {self._phase}"] if self._phase else []
        if self._is_due(history):
            total = history.total or history.step
            progress = progress_text(history).ljust(len(f"step {total:,}/{total:,}"))  # columns stay in line
            lines.append(f"  {progress}   " + "   ".join(_numbers(history)))
            self._last_step, self._last_time = history.step, time.monotonic()
        if lines:
            print("\n".join(lines), flush=True)

    def _is_due(self, history: History) -> bool:
        if not len(history) or history.step == self._last_step:
            return False
        now = time.monotonic()
        tenth = history.total is not None and history.step - self._last_step >= history.total / 10
        first = self._last_step == 0
        return first or tenth or now - self._last_time >= max(5.0, 0.02 * (now - self._opened))

    def close(self, history: History) -> None:
        """Print how the run ended."""
        print("\n".join([*self._once.new(history), *_ending(history)]), flush=True)


class ProgressLine:
    """One line in a terminal that moves; evaluations and warnings are printed above it."""

    interval = 0.1

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = console or Console(highlight=False)
        # No refresh thread of its own: the follower draws.
        self._progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False,
        )
        self._task = self._progress.add_task("starting", total=None, numbers="")
        self._once = _Announcer()

    def open(self, history: History) -> None:
        """Print the run and start the line."""
        self._console.print(f"run {history.folder.id} in {history.folder.path.parent}", markup=False, soft_wrap=True)
        self._progress.start()
        self._console.show_cursor(True)  # who is killed meanwhile must not leave a terminal without one
        self.draw(history)

    def draw(self, history: History) -> None:
        """Move the line."""
        for line in self._once.new(history):
            self._console.print(line, markup=False, soft_wrap=True)
        text = history.phase or "   ".join(_numbers(history))
        description = progress_text(history) if len(history) else STATUS_WORDS.get(history.status, history.status)
        self._progress.update(self._task, description=description, total=history.total, completed=history.step,
                              numbers=text, refresh=True)

    def close(self, history: History) -> None:
        """Replace the line by how the run ended."""
        self._progress.stop()
        for line in [*self._once.new(history), *_ending(history)]:
            self._console.print(line, markup=False, soft_wrap=True)
