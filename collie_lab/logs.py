"""Reads logs as a terminal would show them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["read_log"]

_BLOCK = 1 << 16


def read_log(path: Path, tail: int | None = None) -> str:
    """The text of a log, or its last `tail` lines; empty where there is none.

    A carriage return starts its line anew, so that a progress bar is the one line it was on a terminal.
    """
    try:
        data = path.read_bytes() if tail is None else _end_of(path, tail)
    except FileNotFoundError:
        return ""
    lines = data.decode("utf-8", errors="replace").replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)


def _end_of(path: Path, lines: int) -> bytes:
    """The last lines of a file that may be large: read from its end, block by block."""
    if lines <= 0:
        return b""
    data = b""
    with path.open("rb") as file:
        position = file.seek(0, 2)
        while position > 0 and data.count(b"\n") <= lines:
            step = min(_BLOCK, position)
            position -= step
            file.seek(position)
            data = file.read(step) + data
    ended = data.endswith(b"\n")
    return b"\n".join(data.removesuffix(b"\n").split(b"\n")[-lines:]) + (b"\n" if ended else b"")
