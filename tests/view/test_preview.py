"""The preview shows the tokens and the loss mask that training sees."""

from __future__ import annotations

import html
import itertools
import re
from pathlib import Path

import pytest

from collie_lab import CellError, Instructions, Model, RandomTokens, Skills, Text
from collie_lab.data import read_documents, save_tokenizer
from collie_lab.data.prepare import tokenize

RECORDS = [{"prompt": 'Is 1 < 2 & "why"?\n', "completion": "<b>yes</b> 🐶\n ü"},
           {"prompt": "a" * 700, "completion": "b"}]


def _spans(page: str) -> list[tuple[bool, str]]:
    """Of every token in the HTML: whether it is marked as learned, and its text."""
    body = page.partition('<div class="tokens">')[2]
    found = re.findall(r'<(b|span)(?: class=special)? title="token \d+">(.*?)</\1>', body, re.DOTALL)
    return [(tag == "b", html.unescape(re.sub(r"<i>.</i>", "", text))) for tag, text in found]


@pytest.mark.parametrize("model", ["llama-tiny", "models/stories260k"])
def test_html_has_the_mask_of_the_documents(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = str(request.getfixturevalue("shared") / model) if "/" in model else model
    cell = Instructions(RECORDS, holdout=0)
    tokenizer = save_tokenizer(Model(source), tmp_path)
    documents, _ = tokenize(read_documents(cell, "train"), tokenizer, 512, "truncate")
    page = cell.preview(source, 1)._repr_html_()
    spans, end = _spans(page), int(documents.offsets[1])
    assert [learned for learned, _ in spans] == documents.learned[:end].tolist()
    text = "".join(text for _, text in spans)
    assert text.replace(" ", "") == ("<s>" + "".join(RECORDS[0].values()) + "</s>").replace(" ", "")
    assert "<b>yes" not in page
    assert f"{end} tokens, {documents.learned[:end].sum()} learned" in page


def test_a_text_where_there_is_no_colour() -> None:
    shown = repr(Skills(size=20, tasks=("copy",)).preview(n=2))
    assert len(re.findall(r"<s>copy (\w+)\n⟦\1</s>⟧", shown)) == 2


def test_what_is_cut_or_left_out_is_said() -> None:
    cell = Instructions(RECORDS, holdout=0, max_length=100)
    titles = [row.title for row in cell.preview().rows]
    assert titles[1] == "left out: there is nothing to learn within 100 tokens"
    dropped = cell.replace(overlong="drop").preview().rows
    assert [row.title for row in dropped][1] == "longer than 100 tokens: dropped"
    windows = Text(["x" * 150], holdout=0, max_length=100).preview().rows
    assert [row.title for row in windows] == ["100 tokens, 99 learned; window 1 of 2",
                                              "53 tokens, 52 learned; window 2 of 2"]
    assert "truncated" in Instructions(RECORDS, holdout=0, max_length=25).preview(n=1).rows[0].title


def test_of_a_long_one_the_middle_is_hidden() -> None:
    cell = Instructions(RECORDS, holdout=0, max_length=512)
    long = Text(["x" * 1000], holdout=0, max_length=2048, overlong="truncate").preview(Model("llama-1m", init="random",
                                                                                           tokenizer="bytes"))
    assert "… 402 more tokens …" in long._repr_html_()
    assert len(_spans(long._repr_html_())) == 600
    assert len(list(itertools.chain.from_iterable(row.tokens for row in long.rows))) == 1002
    assert cell.preview(n=1).rows[0].tokens[0].special


def test_random_tokens_have_no_text() -> None:
    with pytest.raises(CellError, match="have no text to look at"):
        RandomTokens().preview()
