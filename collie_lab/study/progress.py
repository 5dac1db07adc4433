"""How far a study is: one line that moves in a terminal, a bar in a notebook, plain lines in a log."""

from __future__ import annotations

import html
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

from collie_lab.study.store import FINAL, QUEUED, summary_text
from collie_lab.view.style import STATUS_COLORS
from collie_lab.view.units import duration_text

__all__ = ["Progress"]

_INTERVAL: Final = 0.5


class Progress:
    """Told of every change by the runner.

    Args:
        count: how many arms there will be.
        seconds: how long the arms that have ended took.
    """

    def __init__(self, count: int, seconds: Callable[[], list[float]]):
        self._count, self._seconds = count, seconds
        self._began, self._drawn = time.monotonic(), 0.0
        self._shown: dict[str, str] = {}
        self._at_once = 1
        self._place = _place()

    def update(self, arms: Mapping[str, str]) -> None:
        """Draw, where something has changed, and now and then for the clock."""
        running = sum(status == "running" for status in arms.values())
        self._at_once = max(self._at_once, running)
        now = time.monotonic()
        if arms == self._shown and now < self._drawn + _INTERVAL:
            return
        ended = {name: status for name, status in arms.items()
                 if status in FINAL and self._shown and self._shown.get(name) != status}
        self._shown, self._drawn = dict(arms), now
        self._place.draw(self._shown, self._text(), ended, self._count)

    def close(self) -> None:
        """Draw for the last time."""
        self._place.draw(self._shown, self._text(), {}, self._count)
        self._place.close()

    def _text(self) -> str:
        done = sum(status in FINAL for status in self._shown.values())
        left = self._count - done
        text = f"{done} of {self._count}  ·  {summary_text(self._shown.values()).partition(': ')[2]}"
        text += f"  ·  {duration_text(time.monotonic() - self._began)}"
        seconds = self._seconds() if left else []
        if seconds:
            text += f"  ·  about {duration_text(statistics.median(seconds) * left / self._at_once)} left"
        return text


def _place() -> Any:
    try:
        from IPython.core.getipython import get_ipython

        if get_ipython() is not None and hasattr(get_ipython(), "kernel"):
            return _Notebook()
    except ImportError:
        pass
    return _Terminal() if sys.stderr.isatty() else _Log()


class _Log:
    def draw(self, arms: Mapping[str, str], text: str, ended: Mapping[str, str], count: int) -> None:
        for name, status in ended.items():
            print(f"{name}: {status}  ({text})", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class _Terminal(_Log):
    """The line that moves, below those of the arms that have ended."""

    def draw(self, arms: Mapping[str, str], text: str, ended: Mapping[str, str], count: int) -> None:
        for name, status in ended.items():
            sys.stderr.write(f"\r\x1b[K{name}: {status}\n")
        under_way = [name for name, status in arms.items() if status == "running"]
        line = text + (f"  ·  {under_way[0]}" if under_way else "")
        sys.stderr.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
        sys.stderr.flush()

    def close(self) -> None:
        sys.stderr.write("\n")


class _Notebook:
    """A bar of the arms by their status."""

    def __init__(self) -> None:
        from IPython.display import display

        self._display = display({"text/plain": ""}, raw=True, display_id=True)

    def draw(self, arms: Mapping[str, str], text: str, ended: Mapping[str, str], count: int) -> None:
        counts = Counter(arms.values())
        parts = "".join(
            f"<div title='{status}' style='width:{100 * number / count:.2f}%;background:{STATUS_COLORS[status]}'></div>"
            for status, number in counts.items() if status not in ("pending", QUEUED))
        bar = f"<div style='display:flex;height:8px;border-radius:4px;overflow:hidden;background:#8884'>{parts}</div>"
        under_way = ", ".join(name for name, status in arms.items() if status == "running")
        words = html.escape(text) + (f"<br><span style='opacity:.65'>{html.escape(under_way)}</span>" if under_way
                                     else "")
        self._display.update({"text/html": f"<div style='max-width:640px'>{bar}{words}</div>", "text/plain": text},
                             raw=True)

    def close(self) -> None:
        pass
