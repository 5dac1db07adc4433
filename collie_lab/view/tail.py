"""The end of the first rank's logs, folded under a panel.

A panel is drawn anew all the time, and what the reader has unfolded in it would fold again. So the fold and the
text are outputs of their own: the fold is drawn once and keeps its state, and a rule of CSS (`:has`) shows the text,
which is drawn when the logs have changed, while the fold is open. Neither needs a script or a widget.
"""

from __future__ import annotations

import html
import os
import time
from pathlib import Path
from typing import Any

from collie_lab.folder import RunFolder
from collie_lab.logs import read_log
from collie_lab.view.sheet import sheet

__all__ = ["LogTail", "fold_html", "tail_html"]

_LINES = 8
#: A line of a log may be very long, and the shortest seconds between two updates.
_WIDTH, _EVERY = 400, 1.0


class LogTail:
    """Two outputs below a panel: the fold, and the last lines of standard output and error of rank 0."""

    def __init__(self, folder: RunFolder):
        self._paths = {stream: folder.log(0, name) for stream, name in (("output", "out"), ("error", "err"))}
        self._name = f"collie-log-{os.urandom(4).hex()}"  # a class that nothing else in the notebook has
        self._state: list[tuple[int, int]] = []
        self._drawn = 0.0
        self._display: Any = None

    def open(self) -> None:
        """Show the fold, and below it the room for the lines."""
        from IPython.display import display

        display({"text/html": fold_html(self._name), "text/plain": "the log of rank 0:"}, raw=True)
        self._display = display(self._bundle(), raw=True, display_id=True)

    def draw(self, last: bool = False) -> None:
        """Update the lines if there are new ones, at most once a second; `last`: without that limit."""
        now = time.monotonic()
        if not last and now - self._drawn < _EVERY:
            return
        state = [_state(path) for path in self._paths.values()]
        if state != self._state:
            self._display.update(self._bundle(), raw=True)
            self._state, self._drawn = state, now

    def _bundle(self) -> dict[str, str]:
        texts = {stream: _last_lines(path) for stream, path in self._paths.items()}
        plain = "\n".join(text for text in texts.values() if text) or "(empty)"
        return {"text/html": tail_html(texts, self._name), "text/plain": plain}


def fold_html(name: str) -> str:
    """The fold: `name` is the class by which its text finds it."""
    style = ".collie.fold{padding:0}.collie summary{cursor:pointer;font-size:11.5px;opacity:.65;width:max-content}" \
            ".collie summary:hover{opacity:1}"
    return sheet(f'<details class="{name}"><summary>log of rank 0</summary></details>', style=style, css="fold")


def tail_html(texts: dict[str, str], name: str) -> str:
    """The lines of every stream that has any, seen while the fold is open."""
    parts = [f'<div class="stream">{stream}</div><pre class="code">{html.escape(text)}</pre>'
             for stream, text in texts.items() if text]
    style = f".{name}-text{{display:none}}body:has(details.{name}[open]) .{name}-text{{display:block;" \
            "padding:0 0 2px 10px;border-left:2px solid rgba(128,128,128,.22)}" \
            ".collie .stream{font-size:11px;opacity:.65;margin:2px 0 -4px}"
    inside = "".join(parts) or '<div class="stream">nothing has been printed</div>'
    return sheet(inside, style=style, css=f"{name}-text")


def _last_lines(path: Path) -> str:
    lines = read_log(path, tail=_LINES).rstrip().split("\n")
    return "\n".join(line if len(line) <= _WIDTH else line[:_WIDTH] + " …" for line in lines)


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_size, found.st_mtime_ns
