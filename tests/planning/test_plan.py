"""Plans against what runs measure, against a GPU's own figures, and against themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import collie_lab as lab
from collie_lab.planning import GPU, Plan, find_gpu, plan
from collie_lab.planning.plan import longest_document
from collie_lab.planning.summary import forecast
from collie_lab.training.batch import collate
from tests.ranks import run_here, run_ranks

ROOT = Path(__file__).parents[2]
MODEL = lab.Model("llama-1m", init="random", config={"num_hidden_layers": 2})
BASE = lab.Experiment(
    model=MODEL, data=lab.RandomTokens(length=192, documents=32),
    optimizer=lab.AdamW(lr=1e-3), training=lab.Training(steps=3, batch_size=4, export=False))
ALONE = {
    "adamw": BASE,
    "micro-batches": BASE.with_("training.micro_batch_size", 1),
    "recompute": BASE.with_("training.recompute", "full"),
    "autocast": BASE.with_("training.precision", "bf16"),
    "bf16 weights, master copy": BASE.replace(training=BASE.training.replace(precision="bf16", weights="bf16")),
    "clipped in two passes": BASE.replace(optimizer=lab.Lomo(lr=0.1)).with_("training.clip_grad_norm", 1.0),
    "adalomo": BASE.replace(optimizer=lab.AdaLomo(lr=0.01)),
    "sophia": BASE.replace(optimizer=lab.Sophia(lr=1e-4, hessian_every=2)),
    "adan": BASE.replace(optimizer=lab.Adan(lr=1e-3)),
    "adafactor": BASE.replace(optimizer=lab.Adafactor()),
    "lora": BASE.replace(adapter=lab.LoRA(r=4)),
    "prompt": BASE.replace(adapter=lab.Prompt(tokens=4)),
    "p-tuning": BASE.replace(adapter=lab.PTuning(tokens=4, hidden=16)),
    "prefix": BASE.replace(adapter=lab.Prefix(tokens=4)),
    # So few tokens that the most is there when the embedding's two gradients, as it is the head too, are added up.
    "tied embedding": BASE.replace(model=lab.Model("llama-tiny", init="random"),
                                   data=lab.RandomTokens(length=32, documents=4)).with_("training.batch_size", 1),
}
MANY = BASE.with_("training.micro_batch_size", 1)
LAYOUTS = {
    "dp": BASE.replace(parallel=lab.Parallel(dp=2)), "zero2": BASE.replace(parallel=lab.Parallel(dp=2, zero=2)),
    "zero3": BASE.replace(parallel=lab.Parallel(dp=2, zero=3)), "tp": BASE.replace(parallel=lab.Parallel(tp=2)),
    "dp, micro-batches": MANY.replace(parallel=lab.Parallel(dp=2)),
    "gpipe": BASE.replace(parallel=lab.Parallel(pp=2, schedule="gpipe")),
    # Messages that wait for the end of the step hold their tensors.
    "1f1b": MANY.replace(parallel=lab.Parallel(pp=2)).with_("training.batch_size", 8),
    "interleaved": MANY.replace(parallel=lab.Parallel(pp=2, schedule="interleaved"))
    .with_("model.config", {"num_hidden_layers": 4}),
    # Layers cut off, adapters and all, leave nothing; those that recompute keep the state of the random numbers.
    "1f1b, lora, recompute": MANY.replace(parallel=lab.Parallel(pp=2), adapter=lab.LoRA(r=8)).with_(
        "training.recompute", "full"),
}


@pytest.mark.parametrize("name", ALONE)
def test_the_peak_is_that_of_the_run(name: str, tmp_path: Path) -> None:
    measured = run_here(ALONE[name], tmp_path / "run").read("result.json")
    found = forecast(ALONE[name], longest_document(ALONE[name]))
    assert max(found.first, found.peak) == pytest.approx(measured["peak_bytes"], rel=2e-3)
    for role, held in found.held.items():
        assert held == pytest.approx(measured[f"{role}_bytes"], abs=2e-4 * measured["peak_bytes"]), role
    assert sum(found.components.values()) == found.peak


def test_the_pass_for_sophias_hessian_counts(tmp_path: Path) -> None:
    experiment = BASE.replace(optimizer=lab.Sophia(lr=1e-4, hessian_every=4)).with_("training.steps", 4)
    measured = run_here(experiment, tmp_path / "run").read("result.json")["peak_bytes"]
    assert plan(experiment).peak_bytes == pytest.approx(measured, rel=2e-3)


def test_other_machines_and_tokenizers_that_do_not_exist_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collie_lab.check._gpus", lambda _: iter([lab.Problem("Parallel", "dp", "no GPUs")]))
    model = MODEL.replace(tokenizer=lab.TrainTokenizer(vocab_size=640))
    found = plan(BASE.replace(model=model, data=lab.Skills(max_length=192), parallel=lab.Parallel(dp=4, zero=3)))
    smaller = plan(BASE.replace(parallel=lab.Parallel(dp=4, zero=3)))
    assert found.components["weights"].max() - smaller.components["weights"].max() == 320 * 128 * 4 // 4


def test_one_layout_leaves_nothing_for_the_next() -> None:
    layouts = [lab.Parallel(dp=4, zero=3), lab.Parallel(dp=2, tp=2)]
    first = [plan(BASE.replace(parallel=layout)).peak_bytes for layout in layouts]
    assert [plan(BASE.replace(parallel=layout)).peak_bytes for layout in reversed(layouts)] == first[::-1]


def _train(folder: str) -> None:
    for name, experiment in LAYOUTS.items():
        run_here(experiment, Path(folder) / name)


@pytest.mark.ranks
def test_the_peak_of_the_worst_rank_is_that_of_the_run(tmp_path: Path) -> None:
    run_ranks(_train, 2, str(tmp_path))
    for name, experiment in LAYOUTS.items():
        result, layout = json.loads((tmp_path / name / "result.json").read_text()), experiment.parallel
        ranks = range(layout.pp)  # the stages; others are alike
        found = [forecast(experiment, 192, rank=rank) for rank in ranks]
        worst = max(found, key=lambda each: each.peak)
        # Gloo's threads copy what they reduce over shards, and free the copy when they get to it.
        copies = worst.components["communication"] if layout.zero else 0
        assert worst.peak * (1 - 1e-3) <= result["peak_bytes"] <= worst.peak * (1 + 1e-3) + copies, name
        for role, held in worst.held.items():
            assert held == pytest.approx(result[f"{role}_bytes"], abs=1e-3 * worst.peak), (name, role)


def test_experts_are_planned_and_take_adapters(tmp_path: Path) -> None:
    fields = {"model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "num_local_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    experts = BASE.replace(model=lab.Model(tmp_path, init="random", tokenizer="bytes"))
    for name, experiment in {"all": experts, "lora": experts.replace(adapter=lab.LoRA(r=4))}.items():
        measured = run_here(experiment, tmp_path / name).read("result.json")["peak_bytes"]
        assert forecast(experiment, 192).peak == pytest.approx(measured, rel=2e-3), name


def test_gradients_of_what_is_indexed_are_added_up_in_place(tmp_path: Path) -> None:
    fields = {"model_type": "bert", "is_decoder": True, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 320,
              "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    experiment = BASE.replace(model=lab.Model(tmp_path, init="random", tokenizer="bytes"),
                              data=lab.RandomTokens(length=48, documents=8)).with_("training.batch_size", 2)
    measured = run_here(experiment, tmp_path / "run").read("result.json")["peak_bytes"]
    assert forecast(experiment, 48).peak == pytest.approx(measured, abs=64)


def test_gradients_that_wait_for_a_launch_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lomo = BASE.replace(optimizer=lab.Lomo(lr=0.1), data=lab.RandomTokens(length=8, documents=8)).with_(
        "training.batch_size", 1)
    at_once = forecast(lomo, 8).peak
    monkeypatch.setattr("collie_lab.optim.native.Native.together", True)  # as kernels on a GPU
    measured = run_here(lomo, tmp_path / "run").read("result.json")["peak_bytes"]
    planned = forecast(lomo, 8, on_gpu=True).peak
    assert planned == pytest.approx(measured, rel=5e-3)
    assert planned > 1.1 * at_once


def test_what_waits_is_no_line_over_the_depth() -> None:
    config = {"num_hidden_layers": 8, "vocab_size": 8192}
    lomo = BASE.replace(model=MODEL.replace(config=config, tokenizer=None), optimizer=lab.Lomo(lr=0.1)).with_(
        "training.batch_size", 1).with_("training.recompute", "full")
    assert forecast(lomo, 8, on_gpu=True).peak == forecast(lomo, 8, on_gpu=True, course=True).peak


def test_what_hides_the_filling_of_rows_counts_where_there_is_some(tmp_path: Path) -> None:
    fields = {"model_type": "stablelm", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    full = BASE.replace(model=lab.Model(tmp_path, init="random", tokenizer="bytes"))
    texts = ["x" * 400, "y" * 189] * 4
    filled = full.replace(data=lab.Text(texts, max_length=192, overlong="truncate", holdout=0.0, shuffle=False))
    one_by_one = filled.with_("training.micro_batch_size", 1)
    planned = {}
    for name, experiment in {"full": full, "filled": filled, "one by one": one_by_one}.items():
        measured = run_here(experiment, tmp_path / name).read("result.json")["peak_bytes"]
        planned[name] = experiment.plan().peak_bytes
        assert planned[name] == pytest.approx(measured, rel=5e-3), name
    # A mask of numbers, 4 x 192 x 192, is kept of each layer.
    assert planned["filled"] - planned["full"] > 2 * 4 * 4 * 192**2


def test_packed_random_tokens_fill_rows(tmp_path: Path) -> None:
    experiment = BASE.replace(data=lab.RandomTokens(length=48, documents=100, packing=True, max_length=100))
    measured = run_here(experiment, tmp_path / "run").read("result.json")["peak_bytes"]
    assert longest_document(experiment) == 96
    assert forecast(experiment, 96).peak == pytest.approx(measured, rel=2e-3)


@pytest.mark.parametrize("zero", [0, 3])
def test_replicas_and_shards_take_micro_batches(zero: int) -> None:
    whole = BASE.replace(parallel=lab.Parallel(dp=2, zero=zero))
    found = forecast(whole.with_("training.micro_batch_size", 1), 64)
    assert found.held == forecast(whole, 64).held | {"gradients": found.held["gradients"]}
    assert found.held["gradients"] >= found.held["weights"] * 0.99


@pytest.mark.parametrize("parallel", [lab.Parallel(), lab.Parallel(dp=2, zero=3), lab.Parallel(pp=2)],
                         ids=["alone", "zero3", "pp"])
def test_micro_batches_that_are_alike_are_run_once(parallel: lab.Parallel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their place few run, and their work counts as often as there are micro-batches."""
    experiment = BASE.replace(parallel=parallel, training=lab.Training(batch_size=18 * parallel.dp, micro_batch_size=2))
    ran: list[int] = []
    monkeypatch.setattr("collie_lab.training.step.collate",
                        lambda *args, **kwargs: ran.append(1) or collate(*args, **kwargs))
    few = forecast(experiment, 64)
    assert len(ran) <= 2 * (3 + 4 + 5)
    ran.clear()
    monkeypatch.setattr("collie_lab.planning.dry_run._without_alike", lambda step: step)
    monkeypatch.setattr("collie_lab.planning.summary._by_fewer_micro_batches", lambda *_: None)
    whole = forecast(experiment, 64)
    assert len(ran) == 2 * 9
    assert (few.first, few.peak, few.held, few.components) == (whole.first, whole.peak, whole.held, whole.components)
    works = [{str(row[:5]): row[6] for row in each.work if row[1] != "view"} for each in (few, whole)]
    assert works[0] == works[1]


@pytest.mark.parametrize("experiment", [BASE, BASE.replace(optimizer=lab.Lomo(), adapter=None)], ids=["adamw", "lomo"])
def test_alike_layers_are_counted_once(experiment: lab.Experiment) -> None:
    deep = experiment.with_("model.config", {"num_hidden_layers": 9})
    short, whole = forecast(deep, 128), forecast(deep, 128, course=True)
    assert short.layers_run == (5, 9)
    assert whole.layers_run == (9, 9)
    assert (short.first, short.peak, short.components) == (whole.first, whole.peak, whole.components)
    assert short.flops == whole.flops
    for phase in ("forward", "loss", "backward", "optimizer"):
        for field in (3, 4):  # FLOPs, bytes
            sums = [sum(row[field] * row[6] for row in each.work if row[0] == phase) for each in (short, whole)]
            assert sums[0] == pytest.approx(sums[1], rel=1e-6), phase


def _measured() -> list[Any]:
    """What one H200 measured, by torch's own allocator."""
    results = ROOT / "experiments" / "results"
    memory = json.loads((results / "gpu_h200_memory_1b.json").read_text())["results"]
    return [pytest.param(row, id=row["method"]) for row in memory if row["method"] in ("Lion", "LoRA")]


@pytest.mark.parametrize("row", _measured())
def test_a_plan_is_what_a_gpu_measured(row: dict[str, Any]) -> None:
    cells = {"Lion": {"optimizer": lab.Lion(lr=1e-5)},
             "LoRA": {"optimizer": lab.AdamW(lr=1e-4), "adapter": lab.LoRA(r=16)}}[row["method"]]
    experiment = lab.Experiment(
        model=lab.Model(row["model"], init="random"), **cells, data=lab.RandomTokens(length=row["length"]),
        training=lab.Training(batch_size=row["batch_size"], precision="bf16",
                              weights="fp32" if row["method"] == "Lion" else "bf16"))
    found = plan(experiment, "H200")
    assert found.peak_bytes == pytest.approx(row["allocated"], rel=1e-3)
    assert found.reserved_bytes == pytest.approx(row["reserved"], rel=3e-2)
    assert found.process_bytes == pytest.approx(row["process"], rel=3e-2)
    assert found.fits
    assert found.components["total"].max() == found.peak_bytes


def test_the_largest_model_and_many_ranks(tmp_path: Path) -> None:
    """LLaMA-65B by LOMO took 138,212,464,640 bytes of an H200; on 1,024 ranks nobody has to have it."""
    experiment = lab.Experiment(
        model=lab.Model("llama-65b", init="random"), data=lab.RandomTokens(length=2048), optimizer=lab.Lomo(),
        training=lab.Training(batch_size=2, precision="bf16", weights="bf16", recompute="full"))
    assert plan(experiment, "H200").peak_bytes == pytest.approx(138_212_464_640, rel=1e-3)
    many = experiment.replace(parallel=lab.Parallel(dp=1024, zero=3), optimizer=lab.AdamW()).replace(
        training=experiment.training.replace(batch_size=1024, weights="fp32"))
    found = plan(many, "A100-40GB")
    sharded = 65_285_660_672 / 1024
    assert found.components["weights"].max() == pytest.approx(4 * sharded, rel=2e-2)
    assert found.components["optimizer"].max() == pytest.approx(8 * sharded, rel=2e-2)
    assert found.fits


def test_planning_leaves_torch_out_of_the_kernel_and_no_process_behind(tmp_path: Path) -> None:
    script = "import sys, collie_lab as lab; from collie_lab.planning import _client\n" \
        "exp = lab.Experiment(model=lab.Model('llama-tiny', init='random'), data=lab.Instructions('missing.json'))\n" \
        "print(exp.plan().peak_bytes, 'torch' in sys.modules, _client._IDLE[False].queue[-1].process.pid)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    peak, torch, process = done.stdout.split()
    assert int(peak) > 1e6
    assert torch == "False"
    assert not Path(f"/proc/{process}").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"gpu": "H2000"}, "did you mean"), ({"gpu": ""}, "catalogue"),
    ({"parallel": lab.Parallel(tp=3)}, "cannot share"), ({"model": lab.Model("no/such folder")}, "neither a folder"),
    ({"parallel": lab.Parallel(dp=2, zero=2, engine="deepspeed")}, "DeepSpeed"),
    ({"adapter": lab.AdaLoRA(), "training": lab.Training(steps=20)}, "by values"),
    ({"data": lab.RandomTokens(length=5000)}, "do not fit"),
    ({"adapter": lab.Prompt(tokens=20), "data": lab.RandomTokens(length=500)}, "do not fit"),
])
def test_mistakes_are_told(change: dict[str, Any], message: str) -> None:
    gpu = change.pop("gpu", None)
    with pytest.raises(lab.CellError, match=message):
        plan(BASE.replace(**change), gpu)


def test_gpus_are_found_by_what_people_call_them() -> None:
    assert find_gpu("3090").name == find_gpu("rtx-3090").name == "RTX 3090"
    own = GPU("mine", 10**9, 1e12, 1e14, 1e10)
    assert find_gpu(own) is own
    assert isinstance(plan(BASE, own), Plan)


def test_of_a_compiled_run_the_uncompiled_step_is_forecast_and_that_is_said() -> None:
    eager, compiled = plan(BASE), plan(BASE.with_("training.compile", True))
    assert compiled.peak_bytes == eager.peak_bytes
    assert "of steps without compile=True" in repr(compiled)
    assert "compile" not in repr(eager)
    assert "of steps without compile=True" in repr(lab.estimate(compiled.experiment))
    assert list(eager.compare(compiled).plans) == ["not compiled", "compiled (not forecast)"]
