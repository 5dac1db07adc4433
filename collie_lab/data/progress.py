"""A progress bar for what takes long before a run starts: in a terminal and in a notebook, and only after a while."""

from __future__ import annotations

import contextlib
import html
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar

__all__ = ["Progress"]

Item = TypeVar("Item")

_QUIET: Final = 2.0  # seconds without a bar: most data sets are done by then


class Progress:
    """Counts documents, or what else `unit` says. The bar, with the time that is left, comes after two seconds and goes
    at the end.

    Args:
        text: what is done.
        total: how many there will be, where that can be known; asked for when the bar appears.
        unit: the plural of what is counted.
    """

    def __init__(self, text: str, total: Callable[[], int] | None = None, unit: str = "documents"):
        self._text, self._total, self._unit = text, total, unit
        self._due, self.done = time.monotonic() + _QUIET, 0
        self._bar: _Bar | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        if self._bar is None and time.monotonic() > self._due:
            self._show()
        if self._bar is not None:
            self._bar.update(self.done)

    def each(self, documents: Iterable[Item]) -> Iterator[Item]:
        """The documents, counted one by one."""
        for document in documents:
            yield document
            self.advance(1)

    def _show(self) -> None:
        from rich import get_console

        console = get_console()
        if not (console.is_jupyter or console.is_terminal):
            self._due = float("inf")  # a log or a pipe
            return
        kind = _NotebookBar if console.is_jupyter else _TerminalBar
        self._bar = kind(self._text, self._total() if self._total else None, self._unit)


class _Bar(Protocol):
    """What shows how far it is."""

    def update(self, done: int) -> None:
        """So many are done."""

    def close(self) -> None:
        """Take it away."""


class _TerminalBar:
    """rich's bar, on a line that is gone at the end."""

    def __init__(self, text: str, total: int | None, unit: str):
        from rich.errors import LiveError
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                             TextColumn(f"{unit},"), TimeRemainingColumn(compact=True), TextColumn("left"),
                             transient=True)
        self._task = self._bar.add_task(text, total=total)
        with contextlib.suppress(LiveError):  # somebody else's bar is moving
            self._bar.start()

    def update(self, done: int) -> None:
        self._bar.update(self._task, completed=done)

    def close(self) -> None:
        self._bar.stop()


class _NotebookBar:
    """A line of HTML, updated in place; no widget, which would stay in a saved notebook."""

    def __init__(self, text: str, total: int | None, unit: str):
        from IPython.display import display

        self._text, self._total, self._unit = text, total, unit
        self._began = self._drawn = time.monotonic()
        self._first: int | None = None
        self._display: Any = display({"text/plain": ""}, raw=True, display_id=True)

    def update(self, done: int) -> None:
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        if now - self._drawn < 0.2:
            return
        self._drawn = now
        said = f"{self._text}: {done:,} {self._unit}"
        if self._total:
            rate = (done - self._first) / (now - self._began)
            left = f", {_span((self._total - done) / rate)} left" if rate else ""
            said = f"{self._text}: {done:,} of {self._total:,} {self._unit}{left}"
        bar = f'<progress max="{self._total}" value="{done}"></progress> ' if self._total else ""
        self._display.update({"text/html": bar + html.escape(said), "text/plain": said}, raw=True)

    def close(self) -> None:
        self._display.update({"text/plain": ""}, raw=True)


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
