"""Brings what ranks print to the notebook, line by line, each behind the number of its rank."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["Relay"]


class Relay:
    """Follows `rank-N.out` and `rank-N.err` in a folder."""

    def __init__(self, place: Path, ranks: int):
        self._place, self._width = place, len(str(ranks - 1))
        self._rests = {(rank, stream): b"" for rank in range(ranks) for stream in ("out", "err")}
        self._offsets = dict.fromkeys(self._rests, 0)

    def pass_on(self) -> None:
        """Print the lines that have come since."""
        for rank, stream in self._rests:
            *lines, self._rests[rank, stream] = self._new(rank, stream).split(b"\n")
            self._print(rank, stream, lines)

    def flush(self) -> None:
        """Print all that has come, whole lines or not."""
        self.pass_on()
        for (rank, stream), rest in self._rests.items():
            self._rests[rank, stream] = b""
            self._print(rank, stream, [rest] if rest else [])

    def _new(self, rank: int, stream: str) -> bytes:
        try:
            with (self._place / f"rank-{rank}.{stream}").open("rb") as file:
                file.seek(self._offsets[rank, stream])
                data = file.read()
        except FileNotFoundError:
            data = b""
        self._offsets[rank, stream] += len(data)
        return self._rests[rank, stream] + data

    def _print(self, rank: int, stream: str, lines: list[bytes]) -> None:
        target = sys.stdout if stream == "out" else sys.stderr
        # What a carriage return has overwritten is not shown: a progress bar is one line.
        texts = (line.decode("utf-8", errors="replace").rstrip("\r").rpartition("\r")[2] for line in lines)
        target.writelines(f"[rank {rank:>{self._width}}] {text}\n" for text in texts)
        if lines:
            target.flush()
