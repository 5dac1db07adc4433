"""The optimizers' CUDA kernels against the eager reference, on the device and against the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from collie_lab import AdaLomo, AdamW, Adan, Lion, Lomo, Sophia, optim
from collie_lab.cells import RuleCell

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

CELLS = [Lomo(lr=0.1), AdamW(lr=1e-2), Lion(lr=1e-2), Adan(lr=1e-2), Sophia(lr=1e-2), AdaLomo(lr=1e-2)]


def _train(cell: RuleCell, engine: str, dtype: torch.dtype, device: str, steps: int = 5) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(100, 96), nn.Linear(96, 777), nn.LayerNorm(777), nn.Linear(777, 100))
    model = model.to(device, dtype)
    optimizer = optim.build(cell, model, engine=engine, max_value=0.5)
    gradients = torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = sum((parameter * torch.randn(parameter.shape, generator=gradients).to(device, dtype)).sum()
                   for parameter in model.parameters())
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().float().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("engine", ["eager", "triton", "compile"])
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.kind)
def test_kernels_equal_the_eager_reference(cell: RuleCell, engine: str, in_backward: bool) -> None:
    cell = cell.replace(in_backward=in_backward)
    reference = _train(cell, "eager", torch.float32, "cpu")
    for one, two in zip(_train(cell, engine, torch.float32, "cuda"), reference, strict=True):
        torch.testing.assert_close(one, two, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "master"])
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.kind)
def test_bf16_weights_are_rounded_alike(cell: RuleCell, rounding: str) -> None:
    cell = cell.replace(rounding=rounding)
    for one, two in zip(_train(cell, "triton", torch.bfloat16, "cuda"), _train(cell, "eager", torch.bfloat16, "cuda"),
                        strict=True):
        differing = (one != two).float().mean()
        assert differing < 2e-3  # the last bit of the fp32 value may tip a rounding
        torch.testing.assert_close(one, two, atol=1e-3, rtol=2**-7)


def test_a_step_does_not_wait_for_the_device() -> None:
    for cell in CELLS:
        model = nn.Linear(64, 64, device="cuda")
        optimizer = optim.build(cell, model, max_norm=1.0 if not cell.in_backward else None)
        for mode in ("default", "error"):  # the first step compiles
            torch.cuda.set_sync_debug_mode(mode)
            try:
                model.weight.sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_in_backward_needs_the_memory_of_one_gradient() -> None:
    peaks = {}
    for in_backward in (False, True):
        layers = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16))).to("cuda")
        optimizer = optim.build(Lomo(lr=1e-3, in_backward=in_backward), layers)
        x = torch.randn(8, 1024, device="cuda")
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            layers(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks[in_backward] = torch.cuda.max_memory_allocated() - before
        del layers, optimizer
    tensor = 1024 * 1024 * 4
    assert peaks[False] > 16 * tensor
    assert peaks[True] < 4 * tensor
