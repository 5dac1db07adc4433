"""The report: one HTML page with everything in it, which opens without a network, in light and dark."""

from __future__ import annotations

import html
import io
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from markdown_it import MarkdownIt

from collie_lab._version import __version__
from collie_lab.study import _markup
from collie_lab.study._report_style import SCRIPT, STYLE, themed
from collie_lab.study.artefacts import origins, plain
from collie_lab.study.contents import default_figures, default_tables
from collie_lab.study.fairness import Fairness, fairness
from collie_lab.study.outcomes import FINISHED
from collie_lab.view.facts import STATUS_WORDS
from collie_lab.view.history import History
from collie_lab.view.page import page
from collie_lab.view.style import STATUS_COLORS, style
from collie_lab.view.units import duration_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from collie_lab.launch import Run
    from collie_lab.study.presentation import Presentation
    from collie_lab.study.table import Table

__all__ = ["inline_svg", "write_report"]

_SECTIONS: Final = {"tables": "Tables", "figures": "Figures", "fairness": "Fairness", "failures": "What did not finish",
                    "origin": "Where it was measured", "arms": "Every arm"}


def write_report(
    outcomes: Presentation, out: str | Path, *, tables: Mapping[str, Table] | None = None,
    figures: Mapping[str, Figure] | None = None, prose: str = "", found: Fairness | None = None,
) -> Path:
    """Write the page; its path.

    Args:
        out: an .html file; it is there whole or not at all.
        tables, figures: by their titles; default: see `contents`.
        prose: the question, the method and the finding, in Markdown.
        found: the fairness to tell of; default: of what is compared.
    """
    out = Path(out).expanduser()
    text = _page(outcomes, default_tables(outcomes) if tables is None else tables,
                 default_figures(outcomes) if figures is None else figures, prose,
                 fairness(outcomes) if found is None else found)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=out.parent, encoding="utf-8", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, out)
    return out


def _page(outcomes: Presentation, tables: Mapping[str, Table], figures: Mapping[str, Figure], prose: str,
          found: Fairness) -> str:
    frame = outcomes.frame
    parts = {
        "tables": "".join(_table(name, table) for name, table in tables.items()),
        "figures": "".join(_figure(name, figure) for name, figure in figures.items()),
        "fairness": f'<div class="card">{found._repr_html_()}</div>',
        "failures": _failures(frame),
        "origin": _origin(outcomes),
        "arms": "".join(_arm(outcomes, frame, name) for name in frame.index),
    }
    parts = {name: text for name, text in parts.items() if text}
    links = "".join(f'<a href="#{name}">{_SECTIONS[name]}</a>' for name in parts)
    body = "".join(f'<section id="{name}"><h2>{_SECTIONS[name]}</h2>{text}</section>' for name, text in parts.items())
    title = html.escape(outcomes.title)
    made = f"{time.strftime('%Y-%m-%d %H:%M')}, collie_lab {__version__}"
    head = f'<section>{_prose(prose)}</section>' if prose else ""
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title>'
            f"<style>{STYLE}</style></head><body><main><header><h1>{title}</h1>"
            f'<div class="quiet">{made}</div>{_badges(frame)}<nav>{links}</nav></header>'
            f"{head}{body}</main><script>{SCRIPT}</script></body></html>")


def _prose(text: str) -> str:
    """Markdown; HTML in it is shown as text, and pictures from elsewhere as their words."""
    rules = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    return str(rules.render(text))


def _badge(status: str, words: str | None = None) -> str:
    color = STATUS_COLORS.get(status, STATUS_COLORS["starting"])
    return f'<span class="badge" style="background:{color}">{words or STATUS_WORDS.get(status, status)}</span>'


def _badges(frame: pd.DataFrame) -> str:
    counts = frame["status"].value_counts()
    badges = "".join(_badge(str(status), f"{count} {STATUS_WORDS.get(str(status), str(status))}")
                     for status, count in counts.items())
    return f'<div class="badges">{badges}</div>'


def _title(name: str) -> str:
    """The name of a file as a title."""
    words = name.replace("_", " ")
    return html.escape(words[:1].upper() + words[1:])


def _table(name: str, table: Table) -> str:
    title = "" if table.caption else f"<h3>{_title(name)}</h3>"
    return f'{title}<div class="card">{_markup.page(table, style=False)}</div>'


def _figure(name: str, figure: Figure) -> str:
    arms = len(getattr(figure, "arms", []))
    told = f"{_title(name)}; of {arms} arms" if arms else _title(name)
    return f'<figure class="card">{inline_svg(figure, name)}<figcaption>{told}</figcaption></figure>'


def inline_svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element whose colours follow the page, whose text is text, and that names no address.

    `name` goes before the ids in it, which are the page's: no two figures may share them.
    """
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True,
                       metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{re.sub(r'[^A-Za-z0-9]', '-', name)}-", svg)
    svg = svg.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    label = html.escape(name.replace("_", " "), quote=True)
    return themed(re.sub(r"<svg ", f'<svg role="img" aria-label="{label}" ', svg, count=1))


def _failures(frame: pd.DataFrame) -> str:
    rows = [(name, str(row["status"]), row.get("reason")) for name, row in frame.iterrows()
            if row["status"] not in FINISHED]
    if not rows:
        return ""
    body = "".join(f"<tr><td>{html.escape(str(name))}</td><td>{_badge(status)}</td>"
                   f"<td>{html.escape(str(reason)) if isinstance(reason, str) else ''}</td></tr>"
                   for name, status, reason in rows)
    return f'<div class="card"><table class="facts">{body}</table></div>'


def _origin(outcomes: Presentation) -> str:
    rows = []
    for what, values in origins(outcomes).items():
        several = len(values) > 1
        told = "<br>".join(html.escape(value) + (f' <span class="quiet">({len(arms)} arms)</span>' if several else "")
                           for value, arms in values.items())
        rows.append(f"<tr><th>{what}</th><td>{told}</td></tr>")
    return f'<div class="card"><table class="facts">{"".join(rows)}</table></div>' if rows else ""


def _arm(outcomes: Presentation, frame: pd.DataFrame, name: str) -> str:
    """One arm, folded: the panel of its run, its figures, its experiment and its environment."""
    row, run = frame.loc[name], outcomes.runs.get(name)
    figures = {str(key): plain(value) for key, value in row.items() if value is not None and value == value}
    told = duration_text(figures["seconds"]) if "seconds" in figures else ""
    inside = _run(run) if run is not None else '<p class="quiet">It has not run.</p>'
    return (f"<details><summary>{html.escape(str(name))} {_badge(str(row['status']))}"
            f'<span class="push">{told}</span></summary>{inside}{_folded("figures", _json(figures))}</details>')


def _run(run: Run) -> str:
    history = History(run.folder)
    history.update(run.alive)
    environment = {key: value for key, value in run.folder.read("env.json").items() if value is not None}
    return (f'<div class="card">{page(history)}</div>'
            + (_folded("experiment", run.experiment_yaml) if (run.folder.path / "experiment.yaml").is_file() else "")
            + _folded("environment", _json(environment)))


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary><pre>{html.escape(text.strip())}</pre></details>"


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)
