"""Documents that this process has made before are taken again, as long as nothing they depend on has changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import collie_lab as lab
from collie_lab.data import prepare
from collie_lab.data.documents import Documents
from collie_lab.folder import RunFolder
from tests.data.conftest import Watch


@pytest.fixture
def made(splits_of: Watch) -> list[str]:
    """The splits that are really read and tokenized."""
    return splits_of("_make")


def prepared(folder: Path, name: str, data: lab.Data, **fields: Any) -> tuple[Documents, dict[str, Any]]:
    experiment = lab.Experiment(model=lab.Model("llama-tiny", init="random"), data=data, **fields)
    run = RunFolder.create(folder, name)
    prepare(experiment, run)
    return Documents.load(run.path / "data" / "train"), run.read("data/index.json")


def write(path: Path, answer: str, when: int) -> None:
    records = [{"prompt": f"{number}?", "completion": f"{answer} {number}" * 9} for number in range(40)]
    path.write_text(json.dumps(records))
    os.utime(path, ns=(when, when))


def test_a_variant_takes_what_is_there(tmp_path: Path, made: list[str]) -> None:
    file = tmp_path / "data.json"
    write(file, "yes", 1)
    data = lab.Instructions(file, max_length=24)
    first, index = prepared(tmp_path, "a", data, evaluate=[lab.Perplexity()])
    assert made == ["train", "test"]
    assert index["warnings"]  # of what was cut
    again, same = prepared(tmp_path, "b", data, evaluate=[lab.Perplexity()], optimizer=lab.Lion())
    assert made == ["train", "test"]
    assert same == index
    assert again.tokens.tolist() == first.tokens.tolist()


@pytest.mark.parametrize("change", ["file", "length", "tokenizer", "callable"])
def test_what_has_changed_is_made_anew(tmp_path: Path, made: list[str], change: str) -> None:
    file = tmp_path / "data.json"
    write(file, "yes", 1)
    first, _ = prepared(tmp_path, "a", lab.Instructions(file))
    data = lab.Instructions(file, max_length=20 if change == "length" else None)
    fields: dict[str, Any] = {}
    if change == "file":
        write(file, "no!", 2)
    if change == "callable":
        data = lab.Instructions(lambda: [{"prompt": "1?", "completion": "no"}], holdout=0.0)
    if change == "tokenizer":
        other = tmp_path / "tokenizer"
        other.mkdir()
        for source in (next(tmp_path.glob("a-*")) / "tokenizer").iterdir():
            (other / source.name).write_text(source.read_text().replace('"</s>"', '"<end>"'))
        fields["model"] = lab.Model("llama-tiny", init="random", tokenizer=str(other))
    experiment = lab.Experiment(**{"model": lab.Model("llama-tiny", init="random"), "data": data, **fields})
    run = RunFolder.create(tmp_path, "b")
    prepare(experiment, run)
    assert made == ["train", "train"]
    if change != "tokenizer":
        assert Documents.load(run.path / "data" / "train").tokens.tolist() != first.tokens.tolist()


def test_empty_responses_are_counted(tmp_path: Path) -> None:
    records = [{"prompt": "a", "completion": text} for text in ("", "x", " ")]
    _, index = prepared(tmp_path, "a", lab.Instructions(records, holdout=0))
    assert index["warnings"] == ["Instructions, train: 2 of 3 responses are empty; of these only the end is learned"]
    turns = [{"role": role, "content": text} for text in ("", "x") for role in ("user", "assistant")]
    _, index = prepared(tmp_path, "b", lab.Instructions([{"messages": turns}], holdout=0))
    assert index["warnings"] == ["Instructions, train: 1 of 2 responses are empty; of these only the end is learned"]


def test_blank_texts_are_counted(tmp_path: Path) -> None:
    """Once: the held-out share is drawn from the same texts."""
    texts = [*map(str, range(20)), *["  "] * 7]
    (tmp_path / "a.txt").write_text("<|end|>".join([*texts, "\n"]), encoding="utf-8")
    cells = [lab.Text(texts, holdout=0), lab.Text(texts, holdout=0.2, limit=5),
             lab.Text(tmp_path / "a.txt", separator="<|end|>")]
    for number, cell in enumerate(cells):
        _, index = prepared(tmp_path, str(number), cell, evaluate=[lab.Perplexity()] if cell.holdout else [])
        assert index["warnings"] == ["Text, train: 7 of 27 texts are blank, and were left out"]
    _, index = prepared(tmp_path, "other", cells[0], evaluate=[lab.Perplexity(data=lab.Text(["a", ""]))])
    assert index["warnings"][1:] == ["Text, all: 1 of 2 texts are blank, and were left out"]
