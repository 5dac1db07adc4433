"""Tokenization by blocks: the same documents as one by one, whether they stay in memory or go to files."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from collie_lab import Experiment, Instructions, Model, Text
from collie_lab.data import Documents, Tokenizer, documents, prepare, read_documents, save_tokenizer, tokenize
from collie_lab.data.documents import Writer
from collie_lab.data.records import Document
from collie_lab.folder import RunFolder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return save_tokenizer(Model("llama-tiny"), tmp_path / "tokenizer")


def _one_by_one(items: list[Document], tokenizer: Tokenizer, max_length: int, overlong: str) -> Iterator[
        tuple[list[int], list[bool]]]:
    """The definition: prefix, segments, end; cut where it is too long; left out where nothing is to be learned."""
    for item in items:
        pairs = [(token, learn) for text, learn in item.segments for token in tokenizer.encode([text])[0]]
        pairs += [(tokenizer.eos_id, True)]  # type: ignore[list-item]
        room = max_length - len(tokenizer.prefix)
        if overlong == "drop" and len(pairs) > room:
            continue
        for begin in range(0, len(pairs) if overlong == "split" else 1, room):
            window = [(token, False) for token in tokenizer.prefix] + pairs[begin : begin + room]
            window[0] = (window[0][0], False)
            if any(learn for _, learn in window):
                yield [token for token, _ in window], [learn for _, learn in window]


@pytest.mark.parametrize("overlong", ["truncate", "drop", "split"])
@pytest.mark.parametrize("prefix", [[256], []])
def test_blocks_are_the_documents_one_by_one(overlong: str, prefix: list[int], tokenizer: Tokenizer,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "_DOCUMENTS", 7)
    tokenizer.prefix = prefix
    rng = random.Random(0)
    items = [Document((("q" * rng.randrange(14), False), ("a" * rng.randrange(9), True)), "a") for _ in range(100)]
    found, _ = tokenize.tokenize(items, tokenizer, 12, overlong)
    expected = list(_one_by_one(items, tokenizer, 12, overlong))
    assert [(found.tokens[a:b].tolist(), found.learned[a:b].tolist())
            for a, b in itertools.pairwise(found.offsets)] == expected
    starts = [len(mask) - mask[::-1].index(True) - 1 for _, mask in expected]
    starts = [next(place for place in range(start, -1, -1) if not mask[place]) + 1
              for start, (_, mask) in zip(starts, expected, strict=True)]
    assert found.prompt_lengths.tolist() == starts


def test_files_hold_what_memory_does(tokenizer: Tokenizer, tmp_path: Path) -> None:
    items = read_documents(Instructions([{"prompt": str(n), "completion": "x" * n} for n in range(90)]), "train")
    whole, _ = tokenize.tokenize(items, tokenizer, 64, "truncate")
    writer = Writer(tmp_path / "files", limit=500)
    for block in tokenize.tokenize_into(tokenize.Tally(), items, tokenizer, 64, "truncate"):
        for begin in range(0, len(block), 10):
            a, b = block.offsets[begin], block.offsets[min(begin + 10, len(block))]
            writer.add(Documents(block.tokens[a:b], block.learned[a:b], block.offsets[begin : begin + 11] - a,
                                 block.prompt_lengths[begin : begin + 10], block.answers[begin : begin + 10]))
    mapped = writer.finish()
    assert mapped.folder == tmp_path / "files"
    assert isinstance(mapped.tokens, np.memmap)
    for name in ("tokens", "learned", "offsets", "prompt_lengths", "answers", "lengths", "targets"):
        np.testing.assert_array_equal(getattr(mapped, name), getattr(whole, name))
    assert mapped.fingerprint == whole.fingerprint
    mapped.save(tmp_path / "again")
    assert (tmp_path / "again/tokens.npy").stat().st_ino == (tmp_path / "files/tokens.npy").stat().st_ino


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python and numpy hold at most, from the file to the run folder, for eight times the corpus."""
    monkeypatch.setattr(documents, "_IN_MEMORY", 20_000)
    monkeypatch.setattr(tokenize, "_DOCUMENTS", 20)
    peaks, runs = [], []
    for count in (150, 150, 1200):  # the first one also fills the caches of what it imports
        file = tmp_path / f"{count}.jsonl"
        file.write_text("".join(json.dumps({"text": f"{n} " * 250}) + "\n" for n in range(count)), encoding="utf-8")
        runs.append(RunFolder.create(tmp_path, "run"))
        experiment = Experiment(model=Model("llama-tiny", init="random"), data=Text(file, max_length=512))
        tracemalloc.start()
        prepare(experiment, runs[-1])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    size = (runs[-1].path / "data/train/tokens.npy").stat().st_size
    assert peaks[2] < 1.5 * peaks[1] < size / 2
    monkeypatch.undo()
    prepare(experiment, again := RunFolder.create(tmp_path, "again"))
    assert runs[-1].read("data/index.json") == again.read("data/index.json")
