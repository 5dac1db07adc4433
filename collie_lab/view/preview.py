"""The first documents of a data cell as a model will see them: tokens, and which of them the loss counts."""

from __future__ import annotations

import html
import io
import itertools
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from collie_lab.cells import CellError, Data, Model, Problem, RandomTokens
from collie_lab.data import Tokenizer, context_length, model_config, save_tokenizer, sequence_length
from collie_lab.data.records import Corpus, Document, Split
from collie_lab.data.tokenize import Tally, tokenize_into
from collie_lab.view.sheet import sheet

__all__ = ["Preview", "Row", "Token", "preview"]

#: Of a longer sequence the middle is left out.
_HEAD, _TAIL = 400, 200

# The learned are told by a tint, a thicker line and a heavier letter: no colour vision is needed.
_CSS: Final = """
.collie .legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:11.5px;margin:4px 0 2px}
.collie .doc{margin:8px 0 0;padding:7px 10px 8px;border:1px solid rgba(128,128,128,.28);border-radius:6px}
.collie .doc .quiet{font-size:11.5px;margin-bottom:3px}
.collie .tokens{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.8;
 font-family:var(--jp-code-font-family,ui-monospace,monospace);font-size:12.5px}
.collie .tokens b,.collie .tokens span,.collie .legend b,.collie .legend span{font-weight:400;padding:1px 0;
 margin-right:1px;border-bottom:1px solid rgba(128,128,128,.55)}
.collie .tokens b,.collie .legend b{font-weight:600;border-bottom:2.5px solid var(--line);
 background:color-mix(in srgb,var(--line) 17%,transparent)}
.collie .tokens .special,.collie .legend .special{font-size:10.5px;padding:0 4px;border-radius:4px;
 outline:1px solid rgba(128,128,128,.6);outline-offset:-1px;margin:0 2px 0 1px}
.collie .tokens i{font-style:normal;opacity:.5}
""".replace("\n", "")
_LEGEND: Final = ('<div class="legend"><div><b>learned</b>: the loss counts it</div><div><span>not learned</span>: '
                  'read only</div><div><span class="special">&lt;s&gt;</span> special token</div></div>')


@dataclass(frozen=True)
class Token:
    """One token: its id, its text (what of a character is not complete yet has none), and what it is."""

    id: int
    text: str
    learned: bool
    special: bool


@dataclass(frozen=True)
class Row:
    """The tokens of one sequence, and what there is to say of the document that it is made of."""

    tokens: tuple[Token, ...]
    note: str

    @property
    def title(self) -> str:
        """How many tokens, and how many of them are learned."""
        if not self.tokens:
            return self.note
        learned = sum(token.learned for token in self.tokens)
        return f"{len(self.tokens):,} tokens, {learned:,} learned{f'; {self.note}' if self.note else ''}"


@dataclass(frozen=True)
class Preview:
    """Shows itself: as HTML in a notebook, in colour in a terminal, else with `⟦ ⟧` around what is learned."""

    title: str
    rows: tuple[Row, ...]

    def _repr_html_(self) -> str:
        rows = [f'<div class="doc"><div class="quiet">{html.escape(row.title)}</div>'
                f'<div class="tokens">{"".join(map(_html, _shortened(row)))}</div></div>' for row in self.rows]
        head = f'<div class="head"><span class="id">{html.escape(self.title)}</span></div>'
        return sheet(head, _LEGEND, *rows, style=_CSS)

    def __repr__(self) -> str:
        if not sys.stdout.isatty():
            return "\n".join([self.title, *(f"\n{row.title}\n{_plain(row)}" for row in self.rows)])
        from rich.console import Console
        from rich.text import Text

        console = Console(file=io.StringIO(), force_terminal=True)
        console.print(Text(self.title, "bold"), Text("learned", "bold blue underline"), "not learned",
                      Text("special", "reverse dim"))
        for row in self.rows:
            console.print(Text(f"\n{row.title}", "dim"))
            console.print(Text.assemble(*(_styled(token) for token in _shortened(row))))
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip("\n")


def preview(cell: Data, model: Model, n: int, split: Split) -> Preview:
    """The first `n` documents of a split; see `Data.preview`.

    Raises:
        CellError: data that cannot be read, a model without a tokenizer, random tokens.
    """
    name = type(cell).__name__
    if isinstance(cell, RandomTokens):
        raise CellError([Problem(name, "", "random tokens have no text to look at")])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = save_tokenizer(model, Path(folder))
        max_length = sequence_length(cell, context_length(model_config(model)))
        chosen = Corpus(cell, tokenizer.render_chat if tokenizer.chat_template else None).select(split)
        rows = [row for document in itertools.islice(chosen, n)
                for row in _rows(document, tokenizer, max_length, cell.overlong)]
    return Preview(f"{name}, {split}: its first documents, in sequences of at most {max_length:,} tokens", tuple(rows))


def _rows(document: Document, tokenizer: Tokenizer, max_length: int, overlong: str) -> Iterator[Row]:
    tally = Tally()
    (documents,) = tokenize_into(tally, [document], tokenizer, max_length, overlong, answers=False)
    if tally.unlearnable:
        yield Row((), f"left out: there is nothing to learn within {max_length:,} tokens")
    elif tally.overlong and overlong in ("drop", "error"):
        yield Row((), f"longer than {max_length:,} tokens: " + ("dropped" if overlong == "drop" else "an error"))
        return
    for index, (begin, end) in enumerate(itertools.pairwise(documents.offsets.tolist())):
        note = f"window {index + 1} of {len(documents)}" if len(documents) > 1 else ""
        ids = documents.tokens[begin:end].tolist()
        texts = zip(ids, tokenizer.pieces(ids), documents.learned[begin:end].tolist(), strict=True)
        yield Row(tuple(Token(id_, text, learned, special) for id_, (text, special), learned in texts),
                  note or _note(tally))


def _note(tally: Tally) -> str:
    said = {"truncated": tally.overlong, "only the last reply, since the chat template rewrites others": tally.partial}
    return "; ".join(text for text, so in said.items() if so)


def _shortened(row: Row) -> Iterator[Token | str]:
    """The tokens, with a word in place of those in the middle of a long row."""
    hidden = len(row.tokens) - _HEAD - _TAIL
    if hidden <= 0:
        yield from row.tokens
        return
    yield from row.tokens[:_HEAD]
    yield f"\n… {hidden:,} more tokens …\n"
    yield from row.tokens[-_TAIL:]


def _html(token: Token | str) -> str:
    if isinstance(token, str):
        return f"<i>{html.escape(token)}</i>"
    tag = "b" if token.learned else "span"
    text = html.escape(token.text).replace("\n", "<i>↵</i>\n") or "<i>·</i>"
    return f'<{tag}{" class=special" * token.special} title="token {token.id}">{text}</{tag}>'


def _styled(token: Token | str) -> tuple[str, str]:
    if isinstance(token, str):
        return token, "dim"
    style = "bold blue underline" if token.learned else ""
    return token.text, f"{style} reverse dim".strip() if token.special else style


def _plain(row: Row) -> str:
    parts = []
    for learned, group in itertools.groupby(_shortened(row), lambda item: isinstance(item, Token) and item.learned):
        text = "".join(token if isinstance(token, str) else token.text for token in group)
        parts.append(f"⟦{text}⟧" if learned else text)
    return "".join(parts)
