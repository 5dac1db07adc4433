"""Runs in a shell: a progress line for each in a terminal, plain lines in a pipe or a log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from collie_lab.size import Size
from collie_lab.view.comparison import Comparison
from collie_lab.view.facts import (
    STATUS_WORDS,
    closing_line,
    evaluation_text,
    failure_title,
    progress_text,
    trouble_texts,
)
from collie_lab.view.history import History
from collie_lab.view.units import bytes_text, count_text, duration_text, number_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["PlainLines", "ProgressLine", "moving_lines", "several_lines"]


class _Announcer:
    """What both views tell only once, each on a line of its own: the size, evaluations, warnings, ranks that stand out.
    """

    def __init__(self) -> None:
        self._evaluations: set[tuple[int, str]] = set()
        self._warnings = 0
        self._size: Size | None = None
        self._in_trouble: set[int] = set()

    def new(self, history: History) -> list[str]:
        lines = []
        if history.size != self._size:  # a run that is begun again tells it again
            self._size = history.size
            lines.append(f"  {self._size}")
        for item in history.evaluations:
            text = evaluation_text(item.values)
            if (item.step, text) not in self._evaluations:
                self._evaluations.add((item.step, text))
                lines.append(f"  step {item.step:,}: evaluation: {text}")
        lines += [f"  warning: {text}" for text in history.warnings[self._warnings:]]
        self._warnings = len(history.warnings)
        troubles = history.troubles
        if not self._in_trouble.issuperset(item.beat.rank for item in troubles):
            lines += [f"  warning: {text}" for text in trouble_texts(troubles, len(history.beats.latest))]
        self._in_trouble = {item.beat.rank for item in troubles}
        return lines


def _opening(history: History) -> str:
    """The first line: the run and its folder."""
    return f"run {history.folder.id} in {history.folder.path.parent}"


def _ending(history: History) -> list[str]:
    """The last lines: how the run ended and, where it failed, why."""
    lines = [f"  {closing_line(history)}"]
    if history.status != "stopped" and history.detail:
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
    thousand. `prefix` begins every line.
    """

    interval = 0.1

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._once = _Announcer()
        self._phase = ""
        self._last_step = 0
        self._opened = self._last_time = time.monotonic()

    def open(self, history: History) -> None:
        """The line at the start: the run and its folder."""
        self._print([_opening(history)])

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
        self._print(lines)

    def interrupted(self) -> bool:
        """There is nobody to write lines for."""
        return False

    def _print(self, lines: list[str]) -> None:
        if lines:
            print("\n".join(self._prefix + line for line in lines), flush=True)

    def _is_due(self, history: History) -> bool:
        if not len(history) or history.step == self._last_step:
            return False
        now = time.monotonic()
        tenth = history.total is not None and history.step - self._last_step >= history.total / 10
        first = self._last_step == 0
        return first or tenth or now - self._last_time >= max(5.0, 0.02 * (now - self._opened))

    def close(self, history: History) -> None:
        """Print how the run ended."""
        self._print([*self._once.new(history), *_ending(history)])


class ProgressLine:
    """One line in a terminal that moves; evaluations and warnings are printed above it.

    `progress` may have several lines, of which this is one; `prefix` begins every line that is printed.
    """

    interval = 0.1

    def __init__(self, progress: Progress, prefix: str = "") -> None:
        self._progress = progress
        self._prefix = prefix
        self._task = self._progress.add_task(f"{prefix}starting", total=None, numbers="")
        self._once = _Announcer()

    def open(self, history: History) -> None:
        """Print the run and start the line."""
        self._print([_opening(history)])
        self._progress.start()
        self._progress.console.show_cursor(True)  # who is killed meanwhile must not leave a terminal without one
        self.draw(history)

    def draw(self, history: History) -> None:
        """Move the line."""
        self._print(self._once.new(history))
        text = history.phase or "   ".join(_numbers(history))
        description = progress_text(history) if len(history) else STATUS_WORDS.get(history.status, history.status)
        self._progress.update(self._task, description=self._prefix + description, total=history.total,
                              completed=history.step, numbers=text, refresh=True)

    def interrupted(self) -> bool:
        """There is nobody to move the line for."""
        return False

    def close(self, history: History) -> None:
        """Replace the line by how the run ended."""
        self._progress.remove_task(self._task)
        if not self._progress.tasks:
            self._progress.stop()
        self._print([*self._once.new(history), *_ending(history)])

    def _print(self, lines: list[str]) -> None:
        for line in lines:
            self._progress.console.print(self._prefix + line, markup=False, soft_wrap=True)


def moving_lines(console: Console | None = None) -> Progress:
    """The place in a terminal for lines that move; by default the terminal that standard output is."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    # No refresh thread of its own: the follower draws.
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
        TextColumn("{task.fields[numbers]}", markup=False),
        console=console or Console(highlight=False), auto_refresh=False, transient=True,
        redirect_stdout=False, redirect_stderr=False,
    )


class _Several:
    """Lines for several runs, each with its label in front. A run's last lines come when it ends."""

    interval = 0.1

    def __init__(self, lines: Sequence[PlainLines | ProgressLine]):
        self._open = dict(enumerate(lines))

    def open(self, comparison: Comparison) -> None:
        """Start the lines of every run."""
        for index, lines in self._open.items():
            lines.open(comparison.histories[index])

    def draw(self, comparison: Comparison) -> None:
        """Draw the runs that go on, and end the lines of those that have ended."""
        for index, lines in list(self._open.items()):
            history = comparison.histories[index]
            if history.alive:
                lines.draw(history)
            else:
                self._open.pop(index).close(history)

    def interrupted(self) -> bool:
        """There is nobody to write lines for."""
        return False

    def close(self, comparison: Comparison) -> None:
        """End the lines that are left."""
        for index, lines in self._open.items():
            lines.close(comparison.histories[index])


def several_lines(labels: Sequence[str], progress: Progress | None) -> _Several:
    """A view of several runs: a moving line for each where there is a place for them, else plain lines."""
    width = max(map(len, labels))
    prefixes = [f"{label.ljust(width)}  " for label in labels]
    return _Several([ProgressLine(progress, prefix) if progress else PlainLines(prefix) for prefix in prefixes])
