"""The ranks in HTML: the memory of each against its limit, what it does, and which stand out."""

from __future__ import annotations

import html
from typing import Final

from collie_lab.view.beats import Beat
from collie_lab.view.history import History
from collie_lab.view.units import NOTHING, bytes_text, duration_text

__all__ = ["ranks"]

#: Seconds of silence that are not worth a word.
_FRESH: Final = 5.0
#: Up to so many ranks each has words of its own; beyond, a number and a bar.
_WORDS: Final = 16
_DOING: Final = {"answer": "answering", "done": "done", "evaluation": "evaluating", "export": "exporting",
                 "checkpoint": "checkpoint", "loading": "loading"}


def ranks(history: History) -> str:
    """A cell for each rank. Empty where no rank has said anything, and where the run has ended well."""
    latest = history.beats.latest
    if not latest or history.status in ("ok", "stopped", "diverged"):
        return ""
    count = max(history.world_size, max(latest) + 1)
    scale = max((beat.memory or 0.0 for beat in latest.values()), default=0.0)
    bad = _standing_out(history)
    cell = _cell if count <= _WORDS else _small_cell
    cells = [cell(rank, latest.get(rank), scale, rank in bad) for rank in range(count)]
    columns = 4 if count <= 4 else 8 if count <= _WORDS else 16
    return (f'<div class="over"><span>ranks</span><span class="quiet">{html.escape(_summary(history))}</span></div>'
            f'<div class="ranks{" many" * (count > _WORDS)}" style="grid-template-columns:repeat({columns},'
            f'minmax(0,1fr))">{"".join(cells)}</div>')


def _standing_out(history: History) -> set[int]:
    """Live ranks that are in trouble; of a run that has failed, the ranks that failed first: others are its victims."""
    if history.alive:
        return {trouble.beat.rank for trouble in history.troubles}
    return {rank for failure in history.failures()[:1] for rank in failure.ranks}


def _summary(history: History) -> str:
    """What holds for all of them: where they are, the memory of the fullest, and how long ago the quietest spoke."""
    latest = history.beats.latest.values()
    steps = sorted({beat.step for beat in latest})
    words = [f"step {steps[0]:,}" + (f" to {steps[-1]:,}" if len(steps) > 1 else "")]
    memory = [beat for beat in latest if beat.memory is not None]
    if memory:
        full = max(memory, key=lambda beat: beat.memory or 0.0)
        whose = f" on rank {full.rank}" if len(memory) > 1 else ""
        words.append(f"{'memory' if full.on_gpu else 'process memory'} up to {_memory_text(full)}{whose}")
    if history.alive:
        silence = max(history.beats.silence(beat.rank) for beat in latest)
        words.append("alive" if silence < _FRESH else f"the quietest spoke {duration_text(silence)} ago")
    else:
        words.append("as they were last seen")
    return " · ".join(words)


def _memory_text(beat: Beat) -> str:
    return bytes_text(beat.memory) + (f" of {bytes_text(beat.limit)}" if beat.limit else "")


def _cell(rank: int, beat: Beat | None, scale: float, bad: bool) -> str:
    words = f'<div><span>{rank}</span><span class="quiet">{bytes_text(beat.memory) if beat else NOTHING}</span></div>'
    return (f'<div class="rank{" bad" * bad}" title="{_title(rank, beat)}">{words}{_meter(beat, scale)}'
            f'<div class="doing">{_doing(beat)}</div></div>')


def _small_cell(rank: int, beat: Beat | None, scale: float, bad: bool) -> str:
    return (f'<div class="rank{" bad" * bad}" title="{_title(rank, beat)}"><span>{rank}</span>'
            f'{_meter(beat, scale)}</div>')


def _meter(beat: Beat | None, scale: float) -> str:
    """The memory against its limit; where that is unknown, against the fullest rank."""
    share = (beat.memory or 0.0) / (beat.limit or scale or 1.0) if beat else 0.0
    return f'<div class="meter"><div style="width:{100 * min(share, 1.0):.1f}%"></div></div>'


def _doing(beat: Beat | None) -> str:
    if beat is None:
        return "not started"
    return _DOING.get(beat.doing, f"step {beat.step:,}")


def _title(rank: int, beat: Beat | None) -> str:
    """All there is to say of a rank; browsers show it where the pointer rests."""
    if beat is None:
        return f"rank {rank}: not started"
    words = [f"rank {rank} on {beat.process[0]}", f"step {beat.step:,}", beat.doing, _memory_text(beat)]
    return html.escape(", ".join(words))
