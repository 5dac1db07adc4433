"""A progress bar for what takes long before a run starts: in a terminal and in a notebook, and only after a while."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["Progress"]

Item = TypeVar("Item")

_QUIET: Final = 2.0  # seconds without a bar: most data sets are done by then


class Progress:
    """Counts documents. The bar, with the time that is left, comes after two seconds and goes at the end.

    Args:
        text: what is done.
        total: how many documents there will be, where that can be known; asked for when the bar appears.
    """

    def __init__(self, text: str, total: Callable[[], int] | None = None):
        self._text, self._total = text, total
        self._began, self.done = time.monotonic(), 0
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, documents: int) -> None:
        """So many more are done."""
        self.done += documents
        if self._bar is None and time.monotonic() - self._began > _QUIET:
            self._show()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done)

    def each(self, documents: Iterable[Item]) -> Iterator[Item]:
        """The documents, counted one by one."""
        for document in documents:
            yield document
            self.advance(1)

    def _show(self) -> None:
        from rich.errors import LiveError
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("documents,"),
                       TimeRemainingColumn(compact=True), TextColumn("left"), transient=True)
        if not (bar.console.is_terminal or bar.console.is_jupyter):
            self._began = float("inf")  # a log or a pipe
            return
        bar.add_task(self._text, total=self._total() if self._total else None)
        with contextlib.suppress(LiveError):  # somebody else's bar is moving
            bar.start()
        self._bar = bar
