"""Schedule, FLOPs, peak memory, custom losses: against formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import MixtralConfig, MixtralForCausalLM

from collie_lab import AdamW, Experiment, Model, RandomTokens, Skills, Training
from collie_lab.training.flops import StepFlops
from collie_lab.training.model import build_model
from collie_lab.training.probe import ModelWarning
from collie_lab.training.schedule import learning_rate_factor
from tests.ranks import losses, run_here

BASE = Experiment(model=Model("llama-tiny", init="random"), data=Skills(size=40, test_size=10),
                  optimizer=AdamW(lr=1e-3), training=Training(steps=3, batch_size=4, export=False))


def test_schedules() -> None:
    def curve(**fields: object) -> list[float]:
        training = Training(steps=11, **fields)  # type: ignore[arg-type]
        return [learning_rate_factor(training, step) for step in range(1, 12)]

    assert curve() == [1.0] * 11
    assert curve(schedule="linear") == pytest.approx([1 - k / 10 for k in range(11)])
    assert curve(schedule="cosine", final_lr=0.1) == pytest.approx(
        [0.1 + 0.9 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(11)])
    assert curve(warmup=4)[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert curve(warmup=0.2, schedule="linear")[1:4] == pytest.approx([2 / 3, 1.0, 7 / 8])
    assert curve(warmup=2, schedule="wsd", decay=4, final_lr=0.2) == pytest.approx(
        [1 / 3, 2 / 3, *[1.0] * 5, 0.8, 0.6, 0.4, 0.2])
    assert curve(warmup=8, schedule="wsd", decay=0.9) == curve(warmup=8, schedule="linear")


def test_flops_by_hand() -> None:
    model, *_ = build_model(Experiment(model=Model("llama-7b", init="random", config={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "vocab_size": 100})), torch.device("cpu"))
    matmul = 3 * (4 * 64 * 64 + 3 * 64 * 96) + 100 * 64
    attention = 6 * 3 * 64 * 2 * 25**2
    assert StepFlops.of_model(model).of(tokens=50, attended=2 * 25**2) == 6 * matmul * 50 + attention
    model.requires_grad_(False)
    assert StepFlops.of_model(model).of(tokens=50, attended=2 * 25**2) == 4 * matmul * 50 + attention


def test_of_experts_those_count_that_a_token_goes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 100, "num_local_experts": 8, "num_experts_per_tok": 2}
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**sizes))
    matmul = 2 * (4 * 64 * 64 + 8 * 64 + 2 * 3 * 64 * 96) + 100 * 64
    assert StepFlops.of_model(model).per_token == 6 * matmul
    monkeypatch.setattr("collie_lab.training.flops._experts", lambda _: (1, 1))  # of a family that does not say
    with pytest.warns(ModelWarning, match="mixtral does not say to how many experts"):
        assert StepFlops.of_model(model).per_token > 6 * matmul


def test_peak_memory_holds_weights_gradients_and_states(tmp_path: Path) -> None:
    peaks = {}
    for length in (16, 256):
        data = RandomTokens(length=length, documents=8)
        run = run_here(BASE.replace(data=data), tmp_path / str(length))
        peaks[length] = run.read("result.json")["peak_bytes"]
    model, *_ = build_model(BASE, torch.device("cpu"))
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert 4 * weights < peaks[16] < 6 * weights  # weights, gradients, two states; and little for few tokens
    assert peaks[256] > peaks[16] + (256 - 16) * 4 * 64 * 4 * 10  # activations grow with the tokens


def test_a_custom_loss_and_a_callback(tmp_path: Path) -> None:
    seen = []
    smooth = BASE.with_("training.loss", lambda logits, labels: F.cross_entropy(
        logits, labels, reduction="none", label_smoothing=0.2))
    plain = run_here(BASE.replace(callbacks=(lambda trainer: seen.append(trainer.step),)), tmp_path / "plain")
    smoothed = run_here(smooth, tmp_path / "smooth")
    assert seen == [1, 2, 3]
    assert losses(smoothed)[0] != pytest.approx(losses(plain)[0], abs=1e-4)


def test_bf16_follows_fp32(tmp_path: Path) -> None:
    fp32 = losses(run_here(BASE, tmp_path / "fp32"))
    bf16 = losses(run_here(BASE.with_("training.precision", "bf16"), tmp_path / "bf16"))
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=0.01)


def test_metrics_have_the_documented_columns(tmp_path: Path) -> None:
    run = run_here(BASE.with_("training.clip_grad_norm", 0.01), tmp_path / "run")
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert set(records[0]) == {"step", "time", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu",
                               "memory_allocated"}
    assert all(record["grad_norm"] > 0.01 and record["tokens"] > 0 for record in records)
