"""The sheet on which every HTML view is written: its style, and the pieces they share.

It follows the light or dark theme of the page around it.
"""

from __future__ import annotations

import html
from typing import Final

from collie_lab.view.facts import STATUS_WORDS
from collie_lab.view.history import History
from collie_lab.view.style import COLORS, DARK_COLORS, STATUS_COLORS

__all__ = ["badge", "box", "hint_line", "progress_bar", "sheet"]

# Text has the page's own colour; everything quiet is that colour made faint. Only lines and warnings need a
# colour for light and one for dark: JupyterLab and nbconvert mark a dark page by an attribute, VS Code by a class.
# Tables undo the host's own style of tables, and so name more classes than it does.
_CSS: Final = """
.collie{--line:#0072B2;--dot:#D55E00;--warn:#9A5B00;max-width:760px;padding:2px 0 6px;font-size:13px;line-height:1.45;
 font-family:var(--jp-ui-font-family,var(--vscode-font-family,system-ui,sans-serif));
 color:var(--jp-ui-font-color1,var(--vscode-foreground,inherit));font-variant-numeric:tabular-nums;LIGHT}
[data-jp-theme-light="false"] .collie,.vscode-dark .collie,.collie.dark{--line:#56B4E9;--dot:#F0954B;--warn:#FFC061;
 DARK}
.collie .head{display:flex;flex-wrap:wrap;align-items:center;gap:4px 10px}
.collie .id{font-weight:600}
.collie .badge{color:#fff;border-radius:9px;padding:0 9px;font-size:11.5px;font-weight:600;line-height:18px;
 white-space:nowrap}
.collie .push{margin-left:auto}
.collie .quiet{opacity:.65}
.collie .bar{height:4px;border-radius:2px;background:rgba(128,128,128,.22);margin:7px 0 8px;overflow:hidden}
.collie .bar div{height:100%;border-radius:2px}
.collie .key{display:flex;flex-wrap:wrap;gap:0 14px;font-size:11.5px;margin-left:2px}
.collie .key i,.collie .runs i{display:inline-block;width:14px;height:0;border-top:2px solid var(--line);
 vertical-align:3px;margin-right:5px}
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
.collie .tile small{font-size:11.5px;font-weight:400;opacity:.65;white-space:nowrap}
.collie .tile svg{width:88px;height:18px;opacity:.75}
.collie .tile path{stroke-width:1.4}
.collie .ranks{display:grid;gap:6px 12px;margin:4px 0 0 2px;font-size:11px;line-height:1.35}
.collie .over{display:flex;gap:0 10px;margin:10px 0 0 2px;font-size:11.5px}
.collie .rank>div:first-child{display:flex;justify-content:space-between;white-space:nowrap}
.collie .rank .meter{height:5px;border-radius:2.5px;background:rgba(128,128,128,.22);margin:2px 0;overflow:hidden}
.collie .rank .meter div{height:100%;background:var(--line);border-radius:2.5px;opacity:.8}
.collie .rank .doing{opacity:.65;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.collie .rank.bad,.collie .rank.bad .doing{color:var(--warn);font-weight:600;opacity:1}
.collie .rank.bad .meter div{background:var(--warn);opacity:1}
.collie .ranks.many{gap:3px 10px}
.collie .many .rank{display:flex;align-items:center;gap:4px;font-size:9.5px}
.collie .many .rank span{min-width:13px;text-align:right;opacity:.65}
.collie .many .rank.bad span{opacity:1}
.collie .many .rank .meter{flex:1;margin:0}
.collie .box{margin:10px 0 0;padding:6px 10px;border-left:3px solid #B3261E;background:rgba(179,38,30,.09);
 white-space:pre-wrap;overflow-wrap:anywhere}
.collie .box.warn{border-color:#E69F00;background:rgba(230,159,0,.10)}
div.collie pre.code{margin:6px 0 0;padding:0;border:0;color:inherit;background:none;white-space:pre-wrap;
 font:12px/1.45 var(--jp-code-font-family,ui-monospace,monospace)}
.collie .hint{margin-top:8px;font-size:11.5px;opacity:.65}
""".replace("\n", "")


def _palette(colors: tuple[str, ...]) -> str:
    return ";".join(f"--c{index}:{color}" for index, color in enumerate(colors))


_SHEET: Final = _CSS.replace("LIGHT", _palette(COLORS)).replace("DARK", _palette(DARK_COLORS))


def sheet(*parts: str, style: str = "", css: str = "") -> str:
    """The parts, one below the other; `style` is CSS that only this view needs, `css` a class of its own."""
    return f'<div class="collie {css}"><style>{_SHEET}{style}</style>{"".join(parts)}</div>'


def _color(history: History) -> str:
    return STATUS_COLORS.get(history.status, STATUS_COLORS["error"])


def badge(history: History) -> str:
    """The status in a word, on its colour."""
    status = STATUS_WORDS.get(history.status, history.status)
    return f'<span class="badge" style="background:{_color(history)}">{html.escape(status)}</span>'


def progress_bar(history: History) -> str:
    """The share of the steps that are done, in the colour of the status."""
    share = min(history.step / history.total, 1.0) if history.total else 0.0
    return f'<div class="bar"><div style="width:{100 * share:.2f}%;background:{_color(history)}"></div></div>'


def box(text: str, code: str = "", warn: bool = False) -> str:
    """Something that must not be overlooked, with the lines of code that belong to it."""
    lines = f'<pre class="code">{html.escape(code)}</pre>' if code else ""
    return f'<div class="box{" warn" * warn}">{html.escape(text)}{lines}</div>'


def hint_line(text: str) -> str:
    """A quiet last line, if there is anything to say."""
    return f'<div class="hint">{html.escape(text)}</div>' if text else ""
