"""What the ledger counts of single operators, against the memory that they take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from collie_lab.planning._ledger import Ledger
from collie_lab.training.memory import CpuMemory

SHAPE = (4, 512, 256)


def _masked_attention(scores: Tensor) -> None:
    torch.ops.aten._safe_softmax(scores, -1)


def _logsumexp(scores: Tensor) -> None:
    torch.logsumexp(scores, -1)


def _gather(scores: Tensor) -> None:
    index = torch.zeros(4, 512, 1, dtype=torch.int64)
    scores.requires_grad_().gather(-1, index).sum().backward()


def _sum_of_two(scores: Tensor) -> None:
    scores.requires_grad_()
    (scores.exp() + scores.sin()).sum().backward()


@pytest.mark.parametrize("work", [_masked_attention, _logsumexp, _gather, _sum_of_two])
def test_the_most_that_operators_take_is_counted(work: Callable[[Tensor], None]) -> None:
    work(torch.ones(SHAPE))  # what they take once
    memory = CpuMemory()
    with memory.step():
        work(torch.ones(SHAPE))
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        work(torch.ones(SHAPE))
    sizes: dict[int, int] = {}
    peaks = []
    for event in ledger.events:
        sizes[event.storage] = event.bytes
        peaks.append(sum(sizes.values()))
    assert max(peaks) == pytest.approx(memory.step_bytes, abs=64)
