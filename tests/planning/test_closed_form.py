"""The closed form against dry runs of small models, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import collie_lab as lab
from collie_lab.planning import plan

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
BASE = lab.Experiment(
    model=lab.Model("llama-1m", init="random", config={"num_hidden_layers": 2}), data=lab.RandomTokens(length=96),
    optimizer=lab.AdamW(lr=1e-3), training=lab.Training(steps=3, batch_size=4, export=False))
SHORT = lab.RandomTokens(length=16)
SOPHIA = lab.Sophia(lr=1e-4, hessian_every=2)
PURE = BASE.training.replace(precision="bf16", weights="bf16")
CASES = {
    "fp32": BASE,
    "deep": BASE.with_("model.config", {"num_hidden_layers": 7}),
    "autocast, recompute": BASE.replace(training=BASE.training.replace(precision="bf16", recompute="full")),
    "bf16 weights, Kahan": BASE.replace(training=PURE, optimizer=lab.AdamW(lr=1e-3, rounding="kahan")),
    "LOMO, one document": BASE.replace(optimizer=lab.Lomo(lr=0.1)).with_("training.batch_size", 1),
    "LoRA beside bf16": BASE.replace(training=PURE, adapter=lab.LoRA(r=4)),
    "micro-batches": BASE.with_("training.micro_batch_size", 1),
    "held micro-batches": BASE.replace(optimizer=lab.Lomo(lr=0.1, accumulate="hold"), data=SHORT).with_(
        "training.micro_batch_size", 1),
    "Sophia, micro-batches": BASE.replace(optimizer=SOPHIA).with_("training.micro_batch_size", 2),
    "Sophia, its update": BASE.with_("model.config", {"num_hidden_layers": 2, "vocab_size": 32_000}).replace(
        optimizer=SOPHIA, data=SHORT).with_("training.batch_size", 1),
    "Sophia, bf16 weights, few tokens": BASE.replace(
        optimizer=SOPHIA, training=PURE.replace(batch_size=1), data=lab.RandomTokens(length=8)),
    "tensor parallel": BASE.replace(parallel=lab.Parallel(tp=4)),
    "replicas": BASE.replace(parallel=lab.Parallel(dp=4)),
    "replicas, micro-batches": BASE.replace(parallel=lab.Parallel(dp=2)).with_("training.micro_batch_size", 1),
    "replicas, micro-batches, few tokens": BASE.replace(
        parallel=lab.Parallel(dp=2), data=SHORT, training=BASE.training.replace(batch_size=8, micro_batch_size=1)),
    "replicas, micro-batches, LoRA": BASE.replace(
        parallel=lab.Parallel(dp=2), adapter=lab.LoRA(r=4)).with_("training.micro_batch_size", 1),
    "replicas, micro-batches, Sophia": BASE.replace(
        parallel=lab.Parallel(dp=2), optimizer=SOPHIA).with_("training.micro_batch_size", 1),
    "few tokens": BASE.replace(data=lab.RandomTokens(length=32)).with_("training.batch_size", 1),
    "ZeRO-3, bf16": BASE.replace(parallel=lab.Parallel(dp=4, zero=3)).with_("training.precision", "bf16"),
}


@pytest.mark.parametrize(("name", "gpu"), [*((name, None) for name in CASES), ("fp32", "H200")])
def test_it_is_the_plan(name: str, gpu: str | None) -> None:
    found, planned = lab.estimate(CASES[name], gpu), plan(CASES[name], gpu)
    assert found.peak_bytes == pytest.approx(planned.peak_bytes, rel=1e-4)
    assert sum(found.components.values()) == found.peak_bytes
    for role in ("weights", "optimizer"):
        assert found.components[role] == planned.components[role].max(), role


def test_other_families(tmp_path: Path) -> None:
    fields = {"model_type": "qwen3", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3,
              "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 320}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    experiment = BASE.replace(model=lab.Model(tmp_path, init="random", tokenizer="bytes"))
    assert lab.estimate(experiment).peak_bytes == pytest.approx(plan(experiment).peak_bytes, rel=2e-5)


def _measured() -> list[Any]:
    """What one H200 measured, by torch's own allocator: experiments and bytes."""
    rows = [row for size in ("1b", "7b") for row in
            json.loads((RESULTS / f"gpu_h200_memory_{size}.json").read_text(encoding="utf-8"))["results"]]
    return [pytest.param(row, id=f"{row['model']}, {row['method']}") for row in rows]


@pytest.mark.parametrize("row", _measured())
def test_it_is_what_a_gpu_measured(row: dict[str, Any]) -> None:
    fp32, pure = {"weights": "fp32", "precision": "bf16"}, {"weights": "bf16", "precision": "bf16"}
    cells: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "AdamW": ({"optimizer": lab.AdamW()}, fp32), "Lion": ({"optimizer": lab.Lion()}, fp32),
        "Adan": ({"optimizer": lab.Adan()}, fp32), "Sophia": ({"optimizer": lab.Sophia(hessian_every=2)}, fp32),
        "AdamW, bf16 weights + master": ({"optimizer": lab.AdamW(rounding="master")}, pure),
        "AdamW in backward, bf16, stochastic": (
            {"optimizer": lab.AdamW(rounding="stochastic", in_backward=True)}, pure),
        "LOMO": ({"optimizer": lab.Lomo()}, pure), "AdaLomo": ({"optimizer": lab.AdaLomo()}, pure),
        "LoRA": ({"optimizer": lab.AdamW(), "adapter": lab.LoRA(r=16)}, pure)}
    chosen, training = cells[row["method"]]
    experiment = lab.Experiment(model=lab.Model(row["model"], init="random"), **chosen,
                                data=lab.RandomTokens(length=row["length"]),
                                training=lab.Training(batch_size=row["batch_size"], **training))
    assert lab.estimate(experiment, "H200").peak_bytes == pytest.approx(row["allocated"], rel=5e-4)


def test_the_largest_model_on_one_gpu() -> None:
    """LLaMA-65B by LOMO took 138,212,464,640 bytes of an H200."""
    experiment = lab.Experiment(
        model=lab.Model("llama-65b", init="random"), data=lab.RandomTokens(length=2048), optimizer=lab.Lomo(),
        training=lab.Training(batch_size=2, precision="bf16", weights="bf16", recompute="full"))
    found = lab.estimate(experiment, "H200")
    assert found.peak_bytes == pytest.approx(138_212_464_640, rel=1e-4)
    assert found.moment in repr(found)


def test_a_gpu_adds_its_workspace_and_context() -> None:
    experiment = BASE.replace(model=lab.Model("llama-7b", init="random"))
    found = lab.estimate(experiment, "3090")
    assert found.components["workspace"] == lab.GPUS["RTX 3090"].workspace
    assert found.process_bytes is not None
    assert found.process_bytes > found.peak_bytes
    assert found.fits is False
    assert lab.estimate(experiment).fits is None


def test_neither_torch_nor_a_process_is_needed() -> None:
    script = "import sys, collie_lab as lab\n" \
        "exp = lab.Experiment(model=lab.Model('llama-65b', init='random'), data=lab.RandomTokens(length=2048))\n" \
        "print(lab.estimate(exp).peak_bytes, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"


@pytest.mark.parametrize(("change", "message"), [
    ({"adapter": lab.IA3()}, "no formula for IA3"), ({"optimizer": lab.Muon(lr=1e-3)}, "no formula for Muon"),
    ({"parallel": lab.Parallel(dp=4, zero=3, shard=2)}, "replicas of shards"),
    ({"model": lab.Model("llama-1m", init="random", config={"attention_dropout": 0.1})}, "masks"),
    ({"adapter": lab.LoRA(dropout=0.1)}, "dropout"),
])
def test_what_it_does_not_know_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(lab.CellError, match=message):
        lab.estimate(BASE.replace(**change))


def test_a_configuration_without_sizes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 512}', encoding="utf-8")
    with pytest.raises(lab.CellError, match="hidden_size"):
        lab.estimate(BASE.replace(model=lab.Model(tmp_path, init="random", tokenizer="bytes")))
