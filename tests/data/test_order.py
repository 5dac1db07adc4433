"""Packing and the order of documents over steps and ranks."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from collie_lab import Experiment, Instructions, Model, Skills, Training
from collie_lab.data import Documents, Order, pack, prepare, read_documents, save_tokenizer
from collie_lab.data.prepare import tokenize
from collie_lab.folder import RunFolder


def _documents(count: int = 100) -> Documents:
    lengths = np.random.default_rng(0).integers(5, 60, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    learned = np.ones(offsets[-1], dtype=np.bool_)
    learned[offsets[:-1]] = False
    return Documents(np.zeros(offsets[-1], dtype=np.int32), learned, offsets, np.zeros(0, dtype=np.int64))


def test_packing_keeps_every_document_once_and_fits() -> None:
    documents = _documents(500)
    sequences = pack(documents.lengths, np.random.default_rng(1).permutation(500), 64)
    assert sorted(np.concatenate(sequences).tolist()) == list(range(500))
    totals = np.array([documents.lengths[sequence].sum() for sequence in sequences])
    assert totals.max() <= 64
    # Johnson 1974: best fit decreasing needs at most 11/9 of the best; the sum of the lengths bounds the best.
    assert len(sequences) <= np.ceil(documents.lengths.sum() / 64) * 11 / 9 + 1


def test_packing_fills_real_instructions(shared: Path, tmp_path: Path) -> None:
    records = read_documents(Instructions(shared / "data/alpaca-subsets/random_9k.json"), "train")
    documents, cut = tokenize(records, save_tokenizer(Model("llama-tiny"), tmp_path), 1024, "truncate")
    assert cut < len(records) / 10
    sequences = pack(documents.lengths, np.arange(len(documents)), 1024)
    assert documents.lengths.sum() / (len(sequences) * 1024) >= 0.98


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("packing", "group"), [(None, False), (64, False), (None, True)])
def test_ranks_share_the_batches_of_one_process(packing: int | None, group: bool, size: int) -> None:
    documents = _documents()
    options = {"batch_size": 8, "seed": 3, "packing": packing, "group_by_length": group}
    alone = list(islice(Order(documents, micro_batch_size=8, **options).steps(), 30))
    ranks = [list(islice(Order(documents, micro_batch_size=2, dp_rank=rank, dp_size=size, **options).steps(), 30))
             for rank in range(size)]
    for one, *parts in zip(alone, *ranks, strict=True):
        assert all((part.tokens, part.targets) == (one.tokens, one.targets) for part in parts)
        dealt = np.concatenate([micro_batch for part in parts for micro_batch in part.micro_batches])
        assert sorted(dealt.tolist()) == sorted(np.concatenate(one.micro_batches).tolist())
        assert one.tokens == documents.lengths[np.concatenate(one.micro_batches)].sum()


@pytest.mark.parametrize("packing", [False, True])
def test_steps_for_an_epoch_see_every_document(packing: bool, tmp_path: Path) -> None:
    experiment = Experiment(model=Model("llama-tiny", init="random"), training=Training(batch_size=4, seed=5),
                            data=Skills(size=90, test_size=10, packing=packing, max_length=96))
    prepare(experiment, RunFolder(tmp_path))
    documents = Documents.load(tmp_path / "data" / "train")
    order = Order(documents, batch_size=4, micro_batch_size=4, seed=5, packing=96 if packing else None)
    count = experiment.steps_for(epochs=1)
    steps = [np.concatenate(step.micro_batches) for step in islice(order.steps(), count)]
    assert set(np.concatenate(steps)) == set(range(len(documents)))
    assert set(np.concatenate(steps[:-1])) != set(range(len(documents)))
    assert experiment.steps_for(epochs=2.5) == math.ceil(2.5 * order.sequences() / 4)
    with pytest.raises(ValueError, match="a positive number of passes"):
        experiment.steps_for(epochs=0)


@pytest.mark.parametrize("group", [False, True])
def test_every_epoch_sees_every_document_in_another_order(group: bool) -> None:
    documents = _documents(42)  # no multiple of the batch: a step belongs to two epochs
    steps = islice(Order(documents, batch_size=4, micro_batch_size=4, group_by_length=group).steps(), 21)
    seen = np.concatenate([step.micro_batches[0] for step in steps])
    first, second = seen[:42].tolist(), seen[42:].tolist()
    assert sorted(first) == sorted(second) == list(range(42))
    assert first != second


@pytest.mark.parametrize("shuffle", [True, False])
def test_steps_of_documents_of_like_length(shuffle: bool) -> None:
    documents = _documents(1003)
    order = Order(documents, batch_size=8, micro_batch_size=8, shuffle=shuffle, group_by_length=True)
    spans = [np.ptp(documents.lengths[step.micro_batches[0]]) for step in islice(order.steps(), 250)]
    assert np.median(spans) <= 1  # 5 to 59 tokens, in steps of 8 out of windows of 400 documents
    mixed = [index for index, span in enumerate(spans) if span > 12]
    assert len(mixed) <= 3  # those that two epochs share: the others are never cut across


@pytest.mark.parametrize(("packing", "group"), [(64, False), (None, True)])
def test_order_goes_on_in_mid_epoch_from_a_step_number(packing: int | None, group: bool) -> None:
    order = Order(_documents(), batch_size=8, micro_batch_size=4, packing=packing, group_by_length=group)
    whole = list(islice(order.steps(), 30))
    for one, two in zip(whole[17:], order.steps(17), strict=False):
        assert all((a == b).all() for a, b in zip(one.micro_batches, two.micro_batches, strict=True))
