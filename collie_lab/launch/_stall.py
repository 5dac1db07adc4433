"""Whether the ranks still move, from their beats."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from typing import Final

from collie_lab.beat import read_beats
from collie_lab.folder import RunFolder

__all__ = ["StallWatch", "shows_life"]

_LOOK = 0.5

#: Seconds without a sign of life after which a run is lost to those who cannot see its processes: as long as a stall
#: takes by default, for ranks that load a large model show none.
_SILENCE: Final = 1800.0


class StallWatch:
    """Watches the beats of some ranks of a run.

    A rank that loads its model is not watched: that is silent and may take long. No clock of a rank
    is used: what counts is how long a beat has been seen unchanged.
    """

    def __init__(self, folder: RunFolder, ranks: Collection[int], timeout: float | None):
        self._folder, self._ranks, self._timeout = folder, ranks, timeout
        self._looked = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}

    def stalled(self) -> bool:
        """Whether one of the ranks has shown no sign of life for the timeout."""
        now = time.monotonic()
        if self._timeout is None or now < self._looked + min(_LOOK, self._timeout / 4):
            return False
        self._looked = now
        for rank, beat in read_beats(self._folder).items():
            if rank not in self._ranks:
                continue
            if beat["doing"] in ("loading", "done"):
                self._seen.pop(rank, None)
            elif rank not in self._seen or self._seen[rank][0] != beat["count"]:
                self._seen[rank] = beat["count"], now
        return any(now > since + self._timeout for _, since in self._seen.values())

    def forget(self) -> None:
        """Have it that the ranks have not been seen yet."""
        self._seen.clear()


def shows_life(folder: RunFolder) -> bool:
    """Whether supervisors or ranks have written to their files of late, as the file server dates them."""
    latest = 0.0
    for path in (folder.path / "status.json", *folder.beats.glob("*"), *folder.path.glob("nodes/*")):
        with contextlib.suppress(OSError):  # put aside at this moment
            latest = max(latest, path.stat().st_mtime)
    return time.time() < latest + _SILENCE
