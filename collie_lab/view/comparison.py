"""Several runs side by side in HTML: one chart of their losses, and a row of numbers for each."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from collie_lab.view.chart import Line, line_chart
from collie_lab.view.curves import value_range
from collie_lab.view.facts import closing_line, held_out, peak_memory, progress_text, speed, time_text, trouble_texts
from collie_lab.view.history import History
from collie_lab.view.sheet import badge, box, hint_line, progress_bar, sheet
from collie_lab.view.style import COLORS
from collie_lab.view.units import NOTHING, bytes_text, count_text, number_text

__all__ = ["Comparison", "comparison_page", "comparison_text", "labelled"]

#: Line styles of further rounds through the colours: as dashes of a stroke, and as borders of the legend.
_DASHES: Final = ("", "6 4", "2 4", "8 3 2 3")
_BORDERS: Final = ("solid", "dashed", "dotted", "dashed")

_STYLE: Final = "".join(
    [f".collie path.c{index}{{stroke:var(--c{index})}}.collie circle.c{index}{{fill:var(--c{index})}}"
     for index in range(len(COLORS))]
    + [f".collie path.d{index}{{stroke-dasharray:{dash}}}" for index, dash in enumerate(_DASHES) if dash]
) + """
.collie table.runs{width:100%;margin:6px 0 0;border-collapse:collapse;table-layout:auto;font-size:12px;border:0}
.collie table.runs thead tr th,.collie table.runs tbody tr td{padding:4px 10px 4px 0;text-align:right;border:0;
 vertical-align:top;background:none;white-space:nowrap;font-weight:400;line-height:1.5}
.collie table.runs thead tr th{font-size:11.5px;opacity:.65;padding-bottom:2px}
.collie table.runs thead tr,.collie table.runs tbody tr{background:none;border:0}
.collie table.runs tbody tr td{border-top:1px solid rgba(128,128,128,.22)}
.collie table.runs tr>:first-child{text-align:left;max-width:150px;overflow:hidden;text-overflow:ellipsis}
.collie table.runs tr>:last-child{padding-right:2px}
.collie table.runs tr>.left{text-align:left}
.collie table.runs tr>:nth-child(4){min-width:84px}
.collie table.runs .bar{margin:2px 0 3px;min-width:90px}
""".replace("\n", "")


@dataclass(frozen=True)
class Comparison:
    """What several runs have written so far, and what they are called."""

    labels: tuple[str, ...]
    histories: tuple[History, ...]


def labelled(runs: Sequence[Any], labels: Sequence[str] | None, verb: str, wanted: str) -> list[str]:
    """A label a run: those given, by default the ids.

    `ValueError` where there are none, or too few or many, or what is no run; `wanted` says how runs are given.
    """
    strange = [run for run in runs if not hasattr(run, "folder")] if isinstance(runs, (list, tuple)) else [runs]
    if strange:
        raise ValueError(f"{verb} takes {wanted}, got {strange[0]!r:.60}")
    if not runs:
        raise ValueError(f"{verb}: there are no runs to {verb}; give at least one")
    names = list(labels) if labels is not None else [run.folder.id for run in runs]
    if len(names) != len(runs):
        raise ValueError(f"{verb}: {len(names)} labels for {len(runs)} runs; give one label a run")
    return names


def comparison_text(comparison: Comparison) -> str:
    """A line a run."""
    return "\n".join(f"{label}: {closing_line(history)}"
                     for label, history in zip(comparison.labels, comparison.histories, strict=True))


def comparison_page(comparison: Comparison, hint: str = "", points: int = 200) -> str:
    """The whole comparison; `hint` is a quiet last line."""
    return sheet(_legend(comparison), _losses(comparison, points), _table(comparison), _boxes(comparison),
                 hint_line(hint), style=_STYLE)


def _swatch(index: int) -> str:
    border = _BORDERS[index // len(COLORS) % len(_BORDERS)]
    return f'<i style="border-top:2px {border} var(--c{index % len(COLORS)})"></i>'


def _legend(comparison: Comparison) -> str:
    names = "".join(f"<span>{_swatch(index)}{html.escape(label)}</span>"
                    for index, label in enumerate(comparison.labels))
    return f'<div class="key"><span>loss</span>{names}</div>'


def _losses(comparison: Comparison, points: int) -> str:
    lines, values = [], []
    for index, history in enumerate(comparison.histories):
        curve = history.curve("loss", points)
        x, y = (curve.smooth_x, curve.smooth) if curve.is_smoothed else (curve.x, curve.raw)
        css = f"c{index % len(COLORS)} d{index // len(COLORS) % len(_DASHES)}"
        lines.append(Line(x, y, css, dots=len(x) == 1))
        values.append(y)
    spans = [history.span for history in comparison.histories]
    note = "" if any(np.isfinite(part).any() for part in values) else "no step yet"
    # The first run is drawn last: it is the one that others are compared with.
    return line_chart(lines[::-1], (min(first for first, _ in spans), max(last for _, last in spans)),
                      value_range(*values), note)


def _table(comparison: Comparison) -> str:
    rows = [_row(index, label, history)
            for index, (label, history) in enumerate(zip(comparison.labels, comparison.histories, strict=True))]
    heads = ("run", "", "progress", "time", "loss", "held out", "tokens/s", "peak memory")
    head = "".join(f'<th{_LEFT * (place in (1, 2))}>{text}</th>' for place, text in enumerate(heads))
    return f'<table class="runs"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


_LEFT: Final = ' class="left"'


def _row(index: int, label: str, history: History) -> str:
    metrics = [f'<span class="quiet">{html.escape(name)}</span> {html.escape(text.partition(" ±")[0])}'
               for name, text in held_out(history).items()]
    doing = html.escape(history.phase or progress_text(history))
    loss = history.result.get("loss", history.latest("loss"))
    cells = [
        f'<td title="{html.escape(label)}">{_swatch(index)}{html.escape(label)}</td>',
        f"<td{_LEFT}>{badge(history)}</td>",
        f"<td{_LEFT}>{doing}{progress_bar(history)}</td>",
        *(f"<td>{text}</td>" for text in (
            html.escape(time_text(history)), number_text(loss), "<br/>".join(metrics) or NOTHING,
            count_text(speed(history)), bytes_text(peak_memory(history)))),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _boxes(comparison: Comparison) -> str:
    """What needs a look, run by run: ranks that stand out, and why a run has failed."""
    boxes = []
    for label, history in zip(comparison.labels, comparison.histories, strict=True):
        boxes += [box(f"{label}: {text}", warn=True)
                  for text in trouble_texts(history.troubles, len(history.beats.latest), limit=1)]
        if not history.alive and history.status != "stopped" and history.detail:
            boxes.append(box(f"{label}: {history.detail}", warn=history.status == "ok"))
    return "".join(boxes)
