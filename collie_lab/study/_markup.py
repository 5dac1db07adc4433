"""A table in Markdown, LaTeX and HTML."""

from __future__ import annotations

import html
import itertools
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from collie_lab.study.groups import label_text

if TYPE_CHECKING:
    from collie_lab.study.table import Cell, Table

__all__ = ["CSS", "latex", "markdown", "page"]


def _headings(table: Table) -> list[tuple[str, ...]]:
    return [(shown.heading, *map(label_text, labels)) for shown, labels in table.columns]


def _row_labels(table: Table, row: tuple[Any, ...]) -> list[str]:
    return [label_text(label) for label in row]


def _cells(table: Table, row: tuple[Any, ...]) -> list[Cell]:
    return [table.cells[row, place] for place in range(len(table.columns))]


def _line(text: str) -> str:
    """The text without line breaks, which end a row, and a caption."""
    return " ".join(text.split())


# --- Markdown

def markdown(table: Table) -> str:
    """GitHub's Markdown."""
    headings = [", ".join(heading) if len(heading) > 1 else heading[0] for heading in _headings(table)]
    headings = [_md(heading) + _sup(table.column_marks.get(labels, ""))
                for heading, (_, labels) in zip(headings, table.columns, strict=True)]
    lines = [[*map(_md, table.row_axes), *headings]]
    for row in table.rows:
        labels = [_md(text) for text in _row_labels(table, row)]
        labels[-1] += _sup(table.row_marks.get(row, ""))
        lines.append([*labels, *((f"**{cell.text}**" if cell.best else cell.text) + _sup(cell.marks)
                                 for cell in _cells(table, row))])
    left = len(table.row_axes)
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    drawn = ["| " + " | ".join(text.ljust(width) if place < left else text.rjust(width)
                               for place, (text, width) in enumerate(zip(line, widths, strict=True))) + " |"
             for line in lines]
    rule = "|" + "|".join("-" * (width + 2) if place < left else "-" * (width + 1) + ":"
                          for place, width in enumerate(widths)) + "|"
    parts = [f"**{_md(table.caption)}**\n\n" if table.caption else "", "\n".join([drawn[0], rule, *drawn[1:]]) + "\n"]
    if table.notes:
        parts.append("\n" + "  \n".join(f"{_sup(note.mark)} {_md(note.text)}".strip() for note in table.notes) + "\n")
    return "".join(parts)


def _md(text: str) -> str:
    """Text that is no markup. A `_` within a word is none on GitHub, and stays readable in plain text."""
    return re.sub(r"[\\`*<|\[]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)", r"\\\g<0>", _line(text))


def _sup(marks: str) -> str:
    return f"<sup>{','.join(marks)}</sup>" if marks else ""


# --- LaTeX

_SPECIAL: Final = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "≥": r"$\geq$", "×": r"$\times$", "–": "--",
    "→": r"$\to$", "−": r"$-$", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}


def _tex(text: str) -> str:
    return "".join(_SPECIAL.get(letter, letter) for letter in _line(text))


def _tex_sup(marks: str) -> str:
    return rf"\textsuperscript{{{','.join(marks)}}}" if marks else ""


#: Points of a line in LaTeX's `article` at 10 pt. A table that may be wider is made to fit the line that it stands on.
_TEX_WIDTH: Final = 345
#: Scales down what follows up to the closing brace, where it is wider than the line; else leaves it as it is.
_TEX_FIT: Final = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"


def latex(table: Table, siunitx: bool, label: str) -> str:
    """A booktabs table."""
    left, headings = len(table.row_axes), _headings(table)
    kinds = [_number_format(table, place) if siunitx else "r" for place in range(len(headings))]
    packages = "booktabs, siunitx (version 3)" if siunitx else "booktabs"
    lines = [f"% needs {packages}", rf"\begin{{tabular}}{{{'l' * left}{''.join(kinds)}}}", r"\toprule"]
    lines += _tex_head(table, headings, siunitx)
    lines.append(r"\midrule")
    for before, row in zip([None, *table.rows], table.rows, strict=False):
        labels = [_tex(text) for text in _row_labels(table, row)]
        if left > 1 and before is not None and before[0] != row[0]:
            lines.append(r"\addlinespace")
        if left > 1 and before is not None:
            labels = ["" if before[:place + 1] == row[:place + 1] else text for place, text in enumerate(labels)]
        labels[-1] += _tex_sup(table.row_marks.get(row, ""))
        if labels[0].startswith(("[", "*")):
            labels[0] = "{}" + labels[0]  # else an argument of the command before
        lines.append(" & ".join([*labels, *(_tex_cell(cell, siunitx) for cell in _cells(table, row))]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if _tex_width(table, headings) > _TEX_WIDTH:
        lines = [f"{lines[0]}, graphicx", _TEX_FIT, *lines[1:], "}"]
    return "\n".join(_floating(table, lines, label) if table.caption or table.notes else lines) + "\n"


def _tex_width(table: Table, headings: list[tuple[str, ...]]) -> float:
    """Points that the table takes at 10 pt, about: 5.4 a character, which is between figures and bold letters, and the
    space on both sides of a column. A heading that spans several columns counts with its share."""
    spans = Counter(heading[:level] for heading in headings for level in range(1, len(heading) + 1))
    widest: list[float] = [max(len(axis), *(len(label_text(row[place])) for row in table.rows), 0)
                           for place, axis in enumerate(table.row_axes)]
    for place, heading in enumerate(headings):
        shares = [len(part) / spans[heading[:level]] for level, part in enumerate(heading, 1)]
        widest.append(max(*shares, *(len(table.cells[row, place].text) for row in table.rows), 0))
    return sum(5.4 * width + 12 for width in widest)


def _tex_head(table: Table, headings: list[tuple[str, ...]], siunitx: bool) -> list[str]:
    """A line of headings for each level; what spans several columns has a rule below it."""
    left, lines = len(table.row_axes), []
    for level in range(len(headings[0]) if headings else 1):
        last = level == (len(headings[0]) if headings else 1) - 1
        names = [_tex(axis) if last else "" for axis in table.row_axes]
        cells, rules, place = [], [], left + 1
        for prefix, members in itertools.groupby(enumerate(headings), key=lambda item: item[1][:level + 1]):
            places = [index for index, _ in members]
            text = _tex(prefix[-1])
            if last:
                text += _tex_sup(table.column_marks.get(table.columns[places[0]][1], ""))
                cells += [f"{{{text}}}" if siunitx else text]
                place += 1
                continue
            cells.append(rf"\multicolumn{{{len(places)}}}{{c}}{{{text}}}")
            rules.append(rf"\cmidrule(lr){{{place}-{place + len(places) - 1}}}")
            place += len(places)
        lines.append(" & ".join([*names, *cells]) + r" \\")
        if rules:
            lines.append("".join(rules))
    return lines


def _tex_cell(cell: Cell, siunitx: bool) -> str:
    if siunitx and _s_number(cell):
        number = cell.text.replace(",", "").replace("±", r"\pm")
        return (r"\bfseries " if cell.best else "") + number + _tex_sup(cell.marks)
    text = (rf"\textbf{{{_tex(cell.text)}}}" if cell.best else _tex(cell.text)) + _tex_sup(cell.marks)
    return f"{{{text}}}" if siunitx else text


def _s_number(cell: Cell) -> re.Match[str] | None:
    """A figure that an S column takes: digits before and after the marker, and those of the deviation. No powers: they
    would make all cells of the column as wide."""
    pattern = r"-?(\d+)(?:\.(\d+))?(?: ± (\d+)(?:\.(\d+))?)?"
    return re.fullmatch(pattern, cell.text.replace(",", "")) if cell.value.n else None


def _number_format(table: Table, place: int) -> str:
    """An S column as wide as its widest number: digits before and after the marker, and those of the deviation."""
    known = [match for (_, at), cell in table.cells.items() if at == place and (match := _s_number(cell))]
    if not known:
        return "c"
    whole = max(len(match[1]) for match in known)
    rest = max(len(match[2] or "") for match in known)
    deviation = max((len(f"{match[3]}{match[4] or ''}".lstrip("0")) or 1 for match in known if match[3]), default=0)
    marks = max(len(cell.marks) for (_, at), cell in table.cells.items() if at == place)
    spread = f"({deviation})" if deviation else ""
    errors = ", separate-uncertainty, retain-zero-uncertainty" if deviation else ""
    space = f", table-space-text-post={{{_tex_sup('a' * marks)}}}" if marks else ""
    return f"S[table-format={whole}.{rest}{spread}, detect-weight{errors}{space}]"


def _floating(table: Table, lines: list[str], label: str) -> list[str]:
    notes = [rf"{_tex_sup(note.mark)} {_tex(note.text)}".strip() for note in table.notes]
    return [lines[0], r"\begin{table}", r"\centering",
            *([rf"\caption{{{_tex(table.caption)}}}"] if table.caption else []),
            *([rf"\label{{{label}}}"] if label else []), *lines[1:],
            *([r"\par\smallskip", r"\begin{minipage}{\linewidth}\footnotesize", *(f"{note}\\par" for note in notes),
               r"\end{minipage}"] if notes else []), r"\end{table}"]


# --- HTML

#: The look of a table; text has the page's own colour.
CSS: Final = """
.collie-table{font-size:13px;line-height:1.45;margin:8px 0;overflow-x:auto;font-variant-numeric:tabular-nums}
.collie-table table{border-collapse:collapse;border:0;border-top:1.5px solid currentColor;
 border-bottom:1.5px solid currentColor;margin:4px 0}
.collie-table caption{caption-side:top;text-align:left;font-weight:600;padding:0 0 6px;color:inherit}
.collie-table table th,.collie-table table td{padding:4px 10px;text-align:right;border:0;background:none;
 white-space:nowrap;font-weight:400;color:inherit}
.collie-table table thead tr,.collie-table table tbody tr{background:none;border:0}
.collie-table table thead th{font-weight:600;vertical-align:bottom}
.collie-table table thead th.span{text-align:center;border-bottom:1px solid rgba(128,128,128,.5)}
.collie-table table thead tr:last-child th{border-bottom:1px solid currentColor}
.collie-table table tbody tr.first td,.collie-table table tbody tr.first th{border-top:1px solid rgba(128,128,128,.3)}
.collie-table table .label{text-align:left}
.collie-table td.word{opacity:.65;font-style:italic}
.collie-table sup{font-size:75%;line-height:0;margin-left:1px}
.collie-table .note{font-size:12px;opacity:.8;max-width:820px}
""".replace("\n", "")


def page(table: Table, style: bool = True) -> str:
    """HTML; without `style`, the page has `CSS` already."""
    head, body, before = _html_head(table), [], None
    for row in table.rows:
        labels = _row_labels(table, row)
        first = ' class="first"' if len(row) > 1 and before is not None and before[0] != row[0] else ""
        if len(row) > 1 and before is not None:
            labels = ["" if before[:place + 1] == row[:place + 1] else text for place, text in enumerate(labels)]
        texts = [html.escape(text) for text in labels]
        texts[-1] += _sup(table.row_marks.get(row, ""))
        body.append(f"<tr{first}>" + "".join(f'<th class="label" scope="row">{text}</th>' for text in texts)
                    + "".join(map(_html_cell, _cells(table, row))) + "</tr>")
        before = row
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    notes = "".join(f'<div class="note">{_sup(note.mark)} {html.escape(note.text)}</div>' for note in table.notes)
    return (f'<div class="collie-table">{f"<style>{CSS}</style>" if style else ""}<table>{caption}<thead>{head}</thead>'
            f'<tbody>{"".join(body)}</tbody></table>{notes}</div>')


def _html_head(table: Table) -> str:
    headings, lines = _headings(table), []
    levels = len(headings[0]) if headings else 1
    for level in range(levels):
        last = level == levels - 1
        names = "".join(f'<th class="label">{html.escape(axis) if last else ""}</th>' for axis in table.row_axes)
        cells = []
        for prefix, members in itertools.groupby(enumerate(headings), key=lambda item: item[1][:level + 1]):
            places = [index for index, _ in members]
            marks = _sup(table.column_marks.get(table.columns[places[0]][1], "")) if last else ""
            span = "" if last else f' colspan="{len(places)}" class="span"'
            cells.append(f"<th{span}>{html.escape(prefix[-1])}{marks}</th>")
        lines.append(f"<tr>{names}{''.join(cells)}</tr>")
    return "".join(lines)


def _html_cell(cell: Cell) -> str:
    text = html.escape(cell.text)
    text = f"<b>{text}</b>" if cell.best else text
    word = "" if cell.value.n else ' class="word"'
    return f"<td{word}>{text}{_sup(cell.marks)}</td>"
