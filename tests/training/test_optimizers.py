"""What the loop does for its optimizers: Sophia's Hessian, bf16 weights, memory in backward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from collie_lab import (
    AdaLomo,
    AdamW,
    Experiment,
    Lion,
    Lomo,
    Model,
    Optimizer,
    Perplexity,
    ScheduleFree,
    Skills,
    Sophia,
    Training,
)
from collie_lab.training.model import build_model
from tests.ranks import losses, run_here

BASE = Experiment(
    model=Model("llama-tiny", init="random"), data=Skills(size=60, test_size=20, packing=True, max_length=96),
    training=Training(steps=8, batch_size=4, export=False),
)


def test_sophia_refreshes_its_hessian_and_tells_the_unclipped_share(tmp_path: Path) -> None:
    run = run_here(BASE.replace(optimizer=Sophia(lr=1e-3, hessian_every=4, rho=1.0)), tmp_path / "run")
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shares = {row["step"]: row["unclipped_share"] for row in rows if "unclipped_share" in row}
    assert list(shares) == [4, 8]
    assert all(0 < share < 1 for share in shares.values())


def test_weights_in_bf16_are_exported_so_and_rotary_frequencies_stay_exact(tmp_path: Path) -> None:
    bf16 = BASE.replace(optimizer=AdaLomo(lr=5e-2), training=Training(
        steps=8, batch_size=4, precision="bf16", weights="bf16"))
    run = run_here(bf16, tmp_path / "run")
    assert {tensor.dtype for tensor in load_file(run.path / "model" / "model.safetensors").values()} == {torch.bfloat16}
    assert losses(run)[-1] < losses(run)[0] - 0.2
    model, *_ = build_model(bf16, torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())


@pytest.mark.parametrize("optimizer", [Lion(lr=1e-4), AdamW(lr=1e-4), Lomo(lr=1e-2), AdaLomo(lr=1e-3)],
                         ids=lambda cell: cell.kind)
def test_in_backward_saves_the_gradients(optimizer: Optimizer, tmp_path: Path) -> None:
    """Few tokens and many weights: gradients are what the peak is made of."""
    big = BASE.replace(model=Model("llama-1m", init="random"), data=Skills(size=8, test_size=2, max_length=32),
                       training=Training(steps=3, batch_size=1, export=False))
    peaks, curves, parameters = {}, {}, 0
    for in_backward in (False, True):
        run = run_here(big.replace(optimizer=optimizer.replace(in_backward=in_backward)), tmp_path / str(in_backward))
        result = run.read("result.json")
        peaks[in_backward], curves[in_backward], parameters = result["peak_bytes"], losses(run), result["parameters"]
    assert curves[True] == curves[False]
    assert peaks[True] < peaks[False] - 0.6 * 4 * parameters


def test_schedule_free_is_judged_at_its_average(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    cell = BASE.replace(optimizer=ScheduleFree(lr=1e-2), evaluate=[Perplexity(every=4)])
    run = run_here(cell, tmp_path / "run")
    other = run_here(cell.replace(evaluate=[]), tmp_path / "other")
    # Evaluation goes to the average and back again, up to rounding.
    assert losses(run) == pytest.approx(losses(other), abs=1e-5)
    assert run.read("result.json")["perplexity"] < 300
