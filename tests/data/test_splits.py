"""Nothing stands in train and test at once, and what is there anyway is counted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collie_lab import CellError, Experiment, Instructions, Model, Perplexity, Text
from collie_lab.data import prepare, read_documents
from collie_lab.data.records import hold_out
from collie_lab.folder import RunFolder


def _index(folder: Path, data: Any, evaluated: Any = None) -> dict[str, Any]:
    run, perplexity = RunFolder.create(folder, "run"), Perplexity(data=evaluated)
    prepare(Experiment(model=Model("llama-tiny", init="random"), data=data, evaluate=[perplexity]), run)
    return run.read("data/index.json")


def test_without_repeats_the_draw_stands() -> None:
    test, moved = hold_out(np.random.default_rng(0).permutation(1000).astype(np.uint64), 0.05)
    assert np.flatnonzero(test).tolist() == sorted(random.Random(0).sample(range(1000), 50))
    assert moved == 0


def test_repeats_go_where_the_first_is() -> None:
    keys = np.random.default_rng(0).integers(0, 60, 400).astype(np.uint64)
    test, moved = hold_out(keys, 0.3)  # no key is there more than 120 times
    drawn = np.isin(np.arange(400), random.Random(0).sample(range(400), 120))
    first = [keys.tolist().index(key) for key in keys.tolist()]
    assert test.tolist() == drawn[first].tolist()
    assert moved == int((test != drawn).sum()) > 0
    assert not set(keys[test]) & set(keys[~test])


def test_what_would_be_all_of_the_test_split_stays_in_train(tmp_path: Path) -> None:
    keys = np.array([7] * 90 + list(range(100, 110)), dtype=np.uint64)
    test, _ = hold_out(keys, 0.2)
    assert not test[:90].any()
    assert test[90:].any()
    same = Instructions([{"prompt": "Tell a story.", "completion": str(n)} for n in range(40)])
    prepare(Experiment(model=Model("llama-tiny", init="random"), data=same), RunFolder.create(tmp_path, "run"))
    with pytest.raises(CellError, match="nothing is held out to evaluate on: 2 of those drawn for it repeat records"):
        _index(tmp_path, same)


@pytest.mark.parametrize("kind", ["prompts", "texts", "chats", "empty prompts"])
def test_what_repeats_stays_together(kind: str, tmp_path: Path) -> None:
    rng = random.Random(1)
    names = [str(rng.randrange(60)) for _ in range(200)]
    records: dict[str, Any] = {
        "prompts": Instructions([{"prompt": name, "completion": f"{rng.random()}"} for name in names], holdout=0.2),
        "texts": Text([f"{name} " for name in names], holdout=0.2),
        "chats": Instructions([{"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": "x"},
                                             {"role": "user", "content": str(rng.random())},
                                             {"role": "assistant", "content": "y"}]} for name in names], holdout=0.2),
        "empty prompts": Instructions([{"prompt": " ", "completion": name} for name in names], holdout=0.2),
    }
    train, test = ({document.key for document in read_documents(records[kind], split)} for split in ("train", "test"))
    assert train
    assert test
    assert not train & test
    (warning,) = _index(tmp_path, records[kind])["warnings"]
    assert "records that repeat another one went where that is" in warning


def test_a_test_split_that_leaks_is_told(tmp_path: Path) -> None:
    rows = [[f"query {number}", "intent"] for number in range(20)]
    (tmp_path / "clinc.json").write_text(json.dumps({"train": rows, "test": [*rows[:3], ["new", "intent"]]}))
    expected = "3 of 4 documents to evaluate on ask, or are, what also stands in the training data"
    assert _index(tmp_path, Instructions(tmp_path / "clinc.json"))["warnings"] == [f"Instructions, test: {expected}"]
    train = [{"prompt": str(number), "completion": "x"} for number in range(9)]
    other = Instructions([*train[:3], {"prompt": "new", "completion": "x"}])
    assert _index(tmp_path, Instructions(train, holdout=0), other)["warnings"] == [f"Instructions, all: {expected}"]


def test_the_two_of_clinc(shared: Path) -> None:
    cell = Instructions(shared / "data/clinc150/data_full.json")
    train, test = ([document.key for document in read_documents(cell, split)] for split in ("train", "test"))
    assert np.isin(test, train).sum() == 2


def test_documents_without_anything_to_learn_are_counted(tmp_path: Path) -> None:
    records = [{"prompt": "a" * length, "completion": "b"} for length in (3, 40, 50)]
    assert _index(tmp_path, Instructions(records, max_length=20), Instructions(records[:1]))["warnings"][:2] == [
        "Instructions, train: 2 of 3 documents longer than 20 tokens were truncated",
        "Instructions, train: 2 of 3 documents have nothing to learn within 20 tokens, and were left out"]
