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


def _turned(scores: Tensor) -> Tensor:
    return scores.transpose(-1, -2)


def _softmax(scores: Tensor) -> None:
    _turned(scores).requires_grad_().softmax(-1).backward(_turned(scores))


def _log_softmax(scores: Tensor) -> None:
    _turned(scores).requires_grad_().log_softmax(-1).backward(_turned(scores))


def _layer_norm(scores: Tensor) -> None:
    width = scores.shape[1]
    norm = torch.nn.LayerNorm(width)
    norm(_turned(scores).requires_grad_()).backward(_turned(scores))


def _embedding(scores: Tensor) -> None:
    table = torch.ones(100, scores.shape[1], requires_grad=True)
    torch.nn.functional.embedding(torch.zeros(4, 256, dtype=torch.int64), table).backward(_turned(scores))


def _shape_alone(scores: Tensor) -> None:
    shape = torch.empty(SHAPE, device="meta")
    assert (scores * 2).shape == shape.shape


def _attention(length: int, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], None]:
    def work(scores: Tensor) -> None:
        q, k, v = (torch.ones(2, length, 2, 32, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        if dtype == torch.float32:
            out.backward(torch.ones_like(out))

    return work


@pytest.mark.parametrize("work", [
    _masked_attention, _logsumexp, _gather, _sum_of_two, _softmax, _log_softmax, _layer_norm, _embedding, _shape_alone,
    _attention(48), _attention(300), _attention(800), _attention(300, torch.bfloat16)])
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
