"""The panel's HTML: a history in, one string out. It follows the light or dark theme of the page around it."""

from __future__ import annotations

import html
import time
from typing import Final

import numpy as np

from collie_lab.view.chart import Line, line_chart, sparkline
from collie_lab.view.curves import value_range
from collie_lab.view.facts import STATUS_WORDS, facts, failure_title, progress_text
from collie_lab.view.history import History
from collie_lab.view.style import STATUS_COLORS
from collie_lab.view.units import duration_text, number_text

__all__ = ["page"]

# Text has the page's own colour; everything quiet is that colour made faint. Only the two lines need a
# colour for light and one for dark: JupyterLab and nbconvert mark a dark page by an attribute, VS Code by a class.
_CSS: Final = """
.collie{--line:#0072B2;--dot:#D55E00;max-width:760px;padding:2px 0 6px;font-size:13px;line-height:1.45;
 font-family:var(--jp-ui-font-family,var(--vscode-font-family,system-ui,sans-serif));
 color:var(--jp-ui-font-color1,var(--vscode-foreground,inherit));font-variant-numeric:tabular-nums}
[data-jp-theme-light="false"] .collie,.vscode-dark .collie,.collie.dark{--line:#56B4E9;--dot:#F0954B}
.collie .head{display:flex;flex-wrap:wrap;align-items:center;gap:4px 10px}
.collie .id{font-weight:600}
.collie .badge{color:#fff;border-radius:9px;padding:0 9px;font-size:11.5px;font-weight:600;line-height:18px}
.collie .push{margin-left:auto}
.collie .quiet{opacity:.65}
.collie .bar{height:4px;border-radius:2px;background:rgba(128,128,128,.22);margin:7px 0 8px;overflow:hidden}
.collie .bar div{height:100%;border-radius:2px}
.collie .key{display:flex;gap:14px;font-size:11.5px;margin-left:2px}
.collie .key i{display:inline-block;width:14px;height:0;border-top:2px solid var(--line);vertical-align:3px;
 margin-right:5px}
.collie .key i.raw{opacity:.35}
.collie .key i.dot{width:7px;height:7px;border:0;border-radius:50%;background:var(--dot);vertical-align:0}
.collie svg{display:block;width:100%;height:auto;overflow:visible}
.collie svg svg{overflow:hidden}
.collie path{fill:none;stroke:var(--line);stroke-linecap:round;stroke-linejoin:round;stroke-width:1.8}
.collie path.raw{stroke-width:1;opacity:.32}
.collie circle.dot{fill:var(--dot)}
.collie circle.lone{fill:var(--line)}
.collie .grid{stroke:currentColor;stroke-opacity:.13}
.collie text{fill:currentColor;font-size:11px;opacity:.65}
.collie text.note{font-size:13px}
.collie .tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(92px,1fr));gap:8px 10px;margin:6px 0 0 2px}
.collie .tile .label{font-size:11.5px;opacity:.65}
.collie .tile .value{font-size:16px;font-weight:600;line-height:1.3}
.collie .tile svg{width:88px;height:18px;opacity:.75}
.collie .tile path{stroke-width:1.4}
.collie .box{margin:10px 0 0;padding:6px 10px;border-left:3px solid #B3261E;background:rgba(179,38,30,.09);
 white-space:pre-wrap;overflow-wrap:anywhere}
.collie .box.warn{border-color:#E69F00;background:rgba(230,159,0,.10)}
.collie pre{margin:6px 0 0;font:12px/1.45 var(--jp-code-font-family,ui-monospace,monospace);color:inherit;
 background:none;white-space:pre-wrap}
""".replace("\n", "")

#: Quantities with a small course of their own, by the label of their tile.
_COURSES: Final = {"tokens/s": "tokens_per_second", "peak memory": "memory_allocated", "learning rate": "lr"}


def page(history: History, hint: str = "", points: int = 400) -> str:
    """The whole panel; `hint` is a quiet last line."""
    parts = [_head(history), _bar(history), _loss(history, points), _tiles(history), _boxes(history)]
    if hint:
        parts.append(f'<div class="quiet" style="margin-top:8px;font-size:11.5px">{html.escape(hint)}</div>')
    return f'<div class="collie"><style>{_CSS}</style>{"".join(parts)}</div>'


def _head(history: History) -> str:
    now = time.time()
    words = [progress_text(history)] if len(history) or history.total else []
    remaining, elapsed = history.eta(now), history.elapsed(now)
    if remaining is not None:
        words.append(f"{duration_text(remaining)} left")
    if elapsed is not None:
        words.append(f"{duration_text(elapsed)} elapsed" if history.alive else f"took {duration_text(elapsed)}")
    status = STATUS_WORDS.get(history.status, history.status)
    return (f'<div class="head"><span class="id">{html.escape(history.folder.id)}</span>'
            f'<span class="badge" style="background:{_color(history)}">{html.escape(status)}</span>'
            f'<span class="quiet">{html.escape(history.phase if len(history) else "")}</span>'
            f'<span class="push">{html.escape(" · ".join(words))}</span></div>')


def _color(history: History) -> str:
    return STATUS_COLORS.get(history.status, STATUS_COLORS["error"])


def _bar(history: History) -> str:
    share = min(history.step / history.total, 1.0) if history.total else 0.0
    return f'<div class="bar"><div style="width:{100 * share:.2f}%;background:{_color(history)}"></div></div>'


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
        key += ['<span class="quiet"><i class="raw"></i>of each step</span>',
                '<span class="quiet"><i></i>smoothed</span>']
    else:
        lone = len(history) == 1
        lines = [Line(curve.x, curve.raw, "lone" if lone else "smooth", dots=lone), *lines]
        key.append('<span class="quiet"><i></i>of each step</span>')
    if len(steps):
        key.append('<span class="quiet"><i class="dot"></i>held out (log perplexity)</span>')
    drawn = line_chart(lines, history.span, value_range(curve.raw, curve.smooth, held_out), note)
    return f'<div class="key">{"".join(key) if not note else "&nbsp;"}</div>{drawn}'


def _tiles(history: History) -> str:
    values = facts(history)
    if history.latest("lr") is not None:
        values["learning rate"] = number_text(history.latest("lr"), 2)
    tiles = []
    for label, value in values.items():
        course = sparkline(history.curve(_COURSES[label], points=120).raw) if label in _COURSES else ""
        tiles.append(f'<div class="tile"><div class="label">{html.escape(label)}</div>'
                     f'<div class="value">{html.escape(value)}</div>{course}</div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _boxes(history: History) -> str:
    """What went wrong: warnings, the supervisor's words, and the errors of the ranks with the end of the traceback."""
    boxes = [f'<div class="box warn">{html.escape(text)}</div>' for text in history.warnings[-3:]]
    if history.alive:
        return "".join(boxes)
    if history.detail and history.status not in ("ok", "stopped"):
        boxes.append(f'<div class="box">{html.escape(history.detail)}</div>')
    for failure in history.failures()[:3]:
        lines = failure.traceback.strip().splitlines()[-8:]
        boxes.append(f'<div class="box">{html.escape(failure_title(failure))}'
                     f'<pre>{html.escape(chr(10).join(lines))}</pre></div>')
    return "".join(boxes)
