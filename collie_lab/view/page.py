"""The panel's HTML: a history in, one string out."""

from __future__ import annotations

import html
import textwrap
import time
from typing import Final

import numpy as np

from collie_lab.view.chart import Line, line_chart, sparkline
from collie_lab.view.curves import value_range
from collie_lab.view.facts import facts, failure_title, progress_text, short_paths, trouble_texts
from collie_lab.view.history import History
from collie_lab.view.ranks import ranks
from collie_lab.view.sheet import badge, box, hint_line, progress_bar, sheet
from collie_lab.view.units import duration_text, number_text

__all__ = ["page"]

#: Quantities with a small course of their own, by the label of their tile.
_COURSES: Final = {"tokens/s": "tokens_per_second", "peak memory": "memory_allocated", "learning rate": "lr"}


def page(history: History, hint: str = "", points: int = 400) -> str:
    """The whole panel; `hint` is a quiet last line."""
    return sheet(_head(history), progress_bar(history), _loss(history, points), _tiles(history), ranks(history),
                 _boxes(history), hint_line(str(history.size or "")), hint_line(hint))


def _head(history: History) -> str:
    now = time.time()
    words = [progress_text(history)] if len(history) or history.total else []
    remaining, elapsed = history.eta(now), history.elapsed(now)
    if remaining is not None:
        words.append(f"{duration_text(remaining)} left")
    if elapsed is not None:
        words.append(f"{duration_text(elapsed)} elapsed" if history.alive else f"took {duration_text(elapsed)}")
    return (f'<div class="head"><span class="id">{html.escape(history.folder.id)}</span>{badge(history)}'
            f'<span class="quiet">{html.escape(history.phase if len(history) else "")}</span>'
            f'<span class="push">{html.escape(" · ".join(words))}</span></div>')


def _loss(history: History, points: int) -> str:
    curve = history.curve("loss", points)
    steps, perplexity = history.evaluated("perplexity")
    with np.errstate(all="ignore"):
        held_out = np.log(perplexity)
    note = ""
    if not len(history):
        note = history.phase or "no step was recorded"
    elif not np.isfinite(curve.raw).any():
        note = "no finite loss"
    lines = [Line(steps, held_out, "dot", dots=True)]
    key = ["<span>loss</span>"]
    if curve.is_smoothed:
        lines = [Line(curve.x, curve.raw, "raw"), Line(curve.smooth_x, curve.smooth, "smooth"), *lines]
        key += [_key('<i class="raw"></i>', "of each step"), _key("<i></i>", "smoothed")]
    else:
        lone = len(history) == 1
        lines = [Line(curve.x, curve.raw, "lone" if lone else "smooth", dots=lone), *lines]
        key.append(_key("<i></i>", "of each step"))
    if len(steps):
        key.append(_key('<i class="dot"></i>', "held out (log perplexity)"))
    drawn = line_chart(lines, _reach(history), value_range(curve.raw, curve.smooth, held_out), note)
    return f'<div class="key">{"".join(key) if not note else "&nbsp;"}</div>{drawn}'


def _reach(history: History) -> tuple[int, int]:
    """The steps of the axis: all there will be, or so long as few are done, a half, a quarter, ... of them.

    A long run's first steps would be a stroke at the left. The axis grows by doubling, when it is half full.
    """
    first, last = history.span
    while history.alive and last - first > max(4 * (history.step - first), 20):
        last = first + (last - first + 1) // 2
    return first, last


def _key(mark: str, words: str) -> str:
    """A mark in its full colour, and quiet words."""
    return f'<span>{mark}<span class="quiet">{words}</span></span>'


def _tiles(history: History) -> str:
    values = facts(history)
    if history.latest("lr") is not None:
        values["learning rate"] = number_text(history.latest("lr"), 2)
    tiles = []
    for label, value in values.items():
        course = sparkline(history.curve(_COURSES[label], points=120).raw) if label in _COURSES else ""
        number, plus_minus, error = map(html.escape, value.partition(" ±"))
        small = f"<small>{plus_minus}{error}</small>" if error else ""
        tiles.append(f'<div class="tile"><div class="label">{html.escape(label)}</div>'
                     f'<div class="value">{number}{small}</div>{course}</div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _boxes(history: History) -> str:
    """What went wrong: warnings, ranks that stand out, the supervisor's words, and the errors of the ranks."""
    told = trouble_texts(history.troubles, len(history.beats.latest))
    boxes = [box(text, warn=True) for text in history.warnings[-3:]]
    boxes += [box("\n".join(told), warn=True)] if told else []
    return "".join(boxes if history.alive else [*boxes, *_failures(history)])


def _failures(history: History) -> list[str]:
    """Why the run has failed: the first error with the end of its traceback, and a line for each of the others.

    These are mostly consequences: a connection that was lost. What the supervisor says of the first is not repeated.
    """
    failures = history.failures()
    titles = [failure_title(failure) for failure in failures]
    repeated = bool(titles) and _without_ranks(history.detail) == _without_ranks(titles[0])
    boxes = []
    if history.detail and history.status != "stopped" and not repeated:
        boxes.append(box(history.detail, warn=history.status == "ok"))  # why it was over before its last step
    if failures:
        lines = short_paths(failures[0].traceback).strip().splitlines()[-8:]
        boxes.append(box(titles[0], code="\n".join(lines)))
    if len(titles) > 1:
        boxes.append(box("\n".join(textwrap.shorten(title, 140, placeholder=" …") for title in titles[1:4])))
    return boxes


def _without_ranks(text: str) -> str:
    """What follows `rank 1: ` in the first line."""
    return "".join(text.splitlines()[:1]).partition(": ")[2]
