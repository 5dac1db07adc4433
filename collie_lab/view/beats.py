"""Signs of life of the ranks: what each does, since when it is silent, and which one needs a look.

A rank rewrites `beats/rank-N.json` as it works. Its clock may be that of another machine, so silence is
counted on the reader's own clock, from the moment at which the reader saw the last change.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from collie_lab.folder import RunFolder

__all__ = ["Beat", "Beats", "Trouble"]

#: Seconds between two looks at the files: with many ranks there are many.
_EVERY: Final = 0.5
#: Silence counts as long from so many seconds and so many steps' time on, whichever is more.
_SILENT_SECONDS, _SILENT_STEPS = 30.0, 10.0
#: Likewise for a rank that stays in a step which others have left.
_BEHIND_SECONDS, _BEHIND_STEPS = 5.0, 3.0


@dataclass(frozen=True)
class Beat:
    """The latest sign of life of one rank. `memory` and `limit` in bytes; `time` on the clock of its host."""

    rank: int
    step: int
    doing: str
    time: float
    count: int
    memory: float | None
    limit: float | None
    process: tuple[str, int]
    on_gpu: bool = False
    """Whether the memory is a GPU's, or what the process holds of the host's."""


@dataclass(frozen=True)
class Trouble:
    """A rank that stands out: silent for so many seconds, or else so many steps behind the others."""

    beat: Beat
    silent: float = 0.0
    behind: int = 0


@dataclass
class _Seen:
    """When the reader saw a rank's sign of life change, and when its step; None before any change."""

    first: float
    beat: float | None = None
    step: float | None = None


class Beats:
    """What the ranks have said last. A run of an earlier version has no such files, and no ranks here."""

    def __init__(self, folder: RunFolder, clock: Callable[[], float] = time.monotonic):
        self.latest: dict[int, Beat] = {}
        self._folder, self._clock = folder, clock
        self._seen: dict[int, _Seen] = {}
        self._former: set[tuple[str, int]] = set()
        self._read: float | None = None

    def update(self, now: bool = False) -> None:
        """Read the files, unless that was done a moment ago; `now`: in any case."""
        moment = self._clock()
        if not now and self._read is not None and moment - self._read < _EVERY:
            return
        self._read = moment
        for path in self._folder.beats.glob("rank-*.json"):
            try:
                beat = _beat(json.loads(path.read_bytes()))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # half written: what it said before still holds
            if beat.process not in self._former:
                self._take(beat, moment)

    def _take(self, beat: Beat, moment: float) -> None:
        before = self.latest.get(beat.rank)
        self.latest[beat.rank] = beat
        if before is None:
            self._seen[beat.rank] = _Seen(moment)
            return
        seen = self._seen[beat.rank]
        if beat.count != before.count:
            seen.beat = moment
        if beat.step != before.step:
            seen.step = moment

    def restart(self) -> None:
        """The processes known so far have ended, and others take their place."""
        self._former |= {beat.process for beat in self.latest.values()}
        self.latest.clear()
        self._seen.clear()

    def silence(self, rank: int) -> float:
        """Seconds since the last sign of life of a rank."""
        seen, moment = self._seen[rank], self._clock()
        if seen.beat is not None:
            return moment - seen.beat
        return max(moment - seen.first, time.time() - self.latest[rank].time)

    def troubles(self, step_seconds: float | None) -> list[Trouble]:
        """The ranks that have been silent for long, the longest first, then those that lag behind.

        `step_seconds`: the time of a step, where it is known.
        """
        pace = step_seconds or 0.0
        living = [beat for beat in self.latest.values() if beat.doing != "done"]
        silent = [Trouble(beat, silent=self.silence(beat.rank)) for beat in living
                  if self.silence(beat.rank) > max(_SILENT_SECONDS, _SILENT_STEPS * pace)]
        lead = max((beat.step for beat in living), default=0)
        behind = [Trouble(beat, behind=lead - beat.step) for beat in living
                  if lead > beat.step and self._stays(beat.rank) > max(_BEHIND_SECONDS, _BEHIND_STEPS * pace)]
        told = {item.beat.rank for item in silent}
        return [*sorted(silent, key=lambda item: -item.silent),
                *sorted((item for item in behind if item.beat.rank not in told), key=lambda item: item.beat.rank)]

    def _stays(self, rank: int) -> float:
        """Seconds for which a rank has been seen in its step."""
        seen = self._seen[rank]
        return self._clock() - (seen.first if seen.step is None else seen.step)


def _beat(record: dict[str, Any]) -> Beat:
    return Beat(int(record["rank"]), int(record["step"] or 0), str(record["doing"]), float(record["time"]),
                int(record["count"]), record.get("memory"), record.get("memory_limit"),
                (str(record.get("host", "")), int(record.get("pid") or 0)), bool(record.get("on_gpu")))
