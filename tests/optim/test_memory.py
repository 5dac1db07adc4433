"""The bytes per parameter that the README states are those that the states take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from collie_lab import SGD, AdaLomo, AdamW, Adan, Lion, Lomo, Sophia, optim
from collie_lab.cells import RuleCell

M, N = 300, 500
BYTES = {  # fp32 weights; bf16 with a master copy; bf16 with stochastic rounding
    AdamW: (12, 14, 10), Lion: (8, 10, 6), Adan: (20, 22, 18), Sophia: (12, 14, 10), SGD: (4, 6, 2), Lomo: (4, 6, 2),
    AdaLomo: (4, 6, 2),
}


@pytest.mark.parametrize("cell", BYTES, ids=lambda cell: cell.__name__)
def test_bytes_per_parameter(cell: type[RuleCell]) -> None:
    for (dtype, rounding), expected in zip([(torch.float32, None), (torch.bfloat16, "master"),
                                            (torch.bfloat16, "stochastic")], BYTES[cell], strict=True):
        model = nn.Linear(N, M, bias=False, dtype=dtype)
        optimizer = optim.build(cell(rounding=rounding), model)
        model(torch.ones(1, N, dtype=dtype)).sum().backward()
        optimizer.step()
        tensors = [model.weight, *optimizer.state[model.weight].values()]
        found = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.ndim)
        factors = 4 * (M + N) if cell is AdaLomo else 0
        assert found == expected * M * N + factors
