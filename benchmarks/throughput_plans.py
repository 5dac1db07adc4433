"""Planned speed beside measured speed: on this CPU, on an H200 whose figures were kept, and what others published.

    python benchmarks/throughput_plans.py [--parts cpu h200 published] [--json FILE]

`cpu` calibrates this machine first (matrix products, copies, messages: no training), then runs every configuration and
compares its best steps with the plan. One process of one thread goes by processor time, which other work on the machine
disturbs less than the clock on the wall; several ranks go by that clock, so leave the machine alone. `h200` needs no
GPU: two of the H200's rates were set by rows of an earlier measurement, the bandwidth of element-wise kernels by
"AdamW, 4 x 2,048" and the host's time for an operation by "LoRA, 2 x 2,048", which are not scored; the others are.
`published` plans *our* step on the hardware of others' figures: their kernels are fused or compiled, ours are
transformers' own, so the ratio is no error of the plan alone.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _results import RESULTS, ask_for_parts, h200_memory, keep
from gpu_memory import METHODS

import collie_lab as lab

BASE = lab.Experiment(
    model=lab.Model("llama-5m", init="random"), data=lab.RandomTokens(length=256, documents=64),
    optimizer=lab.AdamW(lr=1e-3), training=lab.Training(steps=10, batch_size=8, export=False))
TINY = BASE.replace(model=lab.Model("llama-tiny", init="random"))
CPU: dict[str, lab.Experiment] = {
    "llama-5m, AdamW": BASE,
    "llama-1m, AdamW": BASE.replace(model=lab.Model("llama-1m", init="random")),
    "llama-tiny, AdamW": TINY,
    "llama-tiny, 16 x 512": TINY.replace(data=lab.RandomTokens(length=512, documents=64)).with_(
        "training.batch_size", 16),
    "llama-5m, four micro-batches": BASE.with_("training.micro_batch_size", 2),
    "llama-5m, recompute": BASE.with_("training.recompute", "full"),
    "llama-5m, Adan": BASE.replace(optimizer=lab.Adan(lr=1e-3)),
    "llama-5m, LOMO": BASE.replace(optimizer=lab.Lomo(lr=0.01)),
    "llama-5m, AdaLomo": BASE.replace(optimizer=lab.AdaLomo(lr=0.01)),
    "llama-5m, LoRA": BASE.replace(adapter=lab.LoRA(r=8)),
    "llama-5m, dp 2": BASE.replace(parallel=lab.Parallel(dp=2)),
    "llama-5m, ZeRO-3": BASE.replace(parallel=lab.Parallel(dp=2, zero=3)),
    "llama-5m, tp 2": BASE.replace(parallel=lab.Parallel(tp=2)),
    "llama-5m, pp 2": BASE.replace(parallel=lab.Parallel(pp=2)),
}
WARM_UP = 3
#: Rows of the H200 that are not scored: those whose first measurement set rates.
SET_RATES = ("llama-1b, AdamW, 4 x 2,048", "llama-1b, LoRA, 2 x 2,048")


def clocks(trainer: Any) -> None:
    """A callback: the processor time of this rank, step by step."""
    import os
    import time

    if int(os.environ.get("RANK", "0")) == 0:
        trainer.log({"processor_seconds": time.process_time(), "wall_seconds": time.perf_counter()})


def on_cpu() -> dict[str, dict[str, Any]]:
    """Every configuration: tokens a second planned and measured."""
    began = time.perf_counter()
    rates = lab.calibrate([1, 2])
    found: dict[str, dict[str, Any]] = {"calibration": {
        "seconds": time.perf_counter() - began, "rates": {ranks: each.to_json() for ranks, each in rates.items()}}}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            with lab.Pool(ranks) as pool:
                for name, experiment in CPU.items():
                    if experiment.parallel.world_size == ranks:
                        found[name] = beside_run(experiment, pool, folder)
                        tell(name, found[name])
    return found


def beside_run(experiment: lab.Experiment, pool: lab.Pool, folder: str) -> dict[str, Any]:
    """One configuration."""
    plan = experiment.plan()
    assert plan.speed is not None
    run = experiment.replace(callbacks=(clocks,)).launch(show=False, pool=pool, folder=folder)
    clock = "processor_seconds" if experiment.parallel.world_size == 1 else "wall_seconds"
    seconds = run.metrics[clock].diff().iloc[WARM_UP:]
    tokens = run.metrics["tokens"].iloc[-1]
    return {**row(plan, tokens / seconds.min()), "clock": clock, "median": float(tokens / seconds.median())}


def row(plan: lab.Plan, measured: float) -> dict[str, Any]:
    """Planned beside measured, tokens of all ranks a second."""
    assert plan.speed is not None
    assert plan.tokens_per_second is not None
    tokens = plan.tokens_per_second * plan.speed.seconds
    return {"measured": float(measured), "planned": plan.tokens_per_second, "low": tokens / plan.speed.high,
            "high": tokens / plan.speed.low, "error": plan.tokens_per_second / measured - 1, "mfu": plan.mfu,
            "parts": plan.speed.parts}


def on_h200() -> dict[str, dict[str, Any]]:
    """The steps that one H200 took (gpu_training.py, gpu_memory.py)."""
    cases: dict[str, tuple[lab.Experiment, float]] = {}
    large = {"weights": "bf16"}
    arms: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "AdamW": ({"optimizer": lab.AdamW(lr=1e-4)}, {}), "LOMO": ({"optimizer": lab.Lomo(lr=1e-3)}, large),
        "AdaLomo": ({"optimizer": lab.AdaLomo(lr=1e-3)}, large), "LoRA": ({"adapter": lab.LoRA(r=16)}, large)}
    measured = json.loads((RESULTS / "gpu_h200_training_1b.json").read_text(encoding="utf-8"))["arms"]
    for name, (cells, training) in arms.items():
        cases[f"llama-1b, {name}, 4 x 2,048"] = (gpu_case("llama-1b", 4, cells, training),
                                       measured[f"collie_lab {name}"][0]["tokens_per_second"])
    giant = json.loads((RESULTS / "gpu_h200_training_65b.json").read_text(encoding="utf-8"))["arms"]
    cases["llama-65b, LOMO, recompute, 2 x 2,048"] = (
        gpu_case("llama-65b", 2, arms["LOMO"][0], {**large, "recompute": "full"}),
        giant["collie_lab LOMO"][0]["tokens_per_second"])
    for name, each in h200_memory().items():
        cells, training = METHODS[each["method"]]
        cases[f"{name}, 2 x 2,048"] = gpu_case(each["model"], 2, cells, training), each["tokens_per_second"]
    found = {}
    for name, (experiment, speed) in cases.items():
        scored = "set rates" if name in SET_RATES else None
        found[name] = {**row(experiment.plan("H200"), speed), "not_scored": scored}
        tell(name + (f" ({scored})" if scored else ""), found[name])
    return found


def gpu_case(model: str, batch_size: int, cells: dict[str, Any], training: dict[str, Any]) -> lab.Experiment:
    """A step of documents of 2,048 tokens in bf16 arithmetic."""
    return lab.Experiment(model=lab.Model(model, init="random"), data=lab.RandomTokens(length=2048), **cells,
                          training=lab.Training(**{"batch_size": batch_size, "precision": "bf16", **training}))


def published() -> dict[str, dict[str, Any]]:
    """Others' tokens per GPU and second: llm-foundry (scripts/train/benchmarking), torchtitan (benchmarks, H100 of
    500 W and 2.4 TB/s), CoLLiE (8 GPUs, batch 128; its micro-batches are not told: 2 with recomputation are taken)."""
    eight = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
    found = {}
    titan = dataclasses.replace(lab.GPUS["H100"], bandwidth=2.4e12, memory=95 * 2**30)
    cases: dict[str, tuple[str | lab.GPU, str, int, int, dict[str, Any], float]] = {
        "llm-foundry 1B, 8 x H100": ("H100", "llama-1b", 8, 14, {}, 45_455),
        "llm-foundry 7B, 8 x H100": ("H100", "llama-7b", 8, 6, {}, 10_643),
        "llm-foundry 13B, 8 x H100": ("H100", "llama-13b", 8, 2, {}, 4_792),
        "llm-foundry 13B, 64 x H100": ("H100", "llama-13b", 64, 2, {}, 4_800),
        "llm-foundry 30B, recompute, 8 x H100": ("H100", "llama-30b", 8, 3, {"recompute": "full"}, 2_002),
        "llm-foundry 7B, 8 x A100": ("A100", "llama-7b", 8, 6, {}, 4_641),
        "llm-foundry 13B, 8 x A100": ("A100", "llama-13b", 8, 2, {}, 2_262),
        "torchtitan 8B, 8 x H100": (titan, "8b", 8, 2, {}, 5_762),
        "CoLLiE ZeRO-3 7B, 8 x A100": ("A100", "llama-7b", 8, 2, {"recompute": "full"}, 3_332),
        "CoLLiE ZeRO-3 13B, 8 x A100": ("A100", "llama-13b", 8, 2, {"recompute": "full"}, 1_617),
        "CoLLiE ZeRO-3 7B, 8 x 3090": ("RTX 3090", "llama-7b", 8, 2, {"recompute": "full"}, 101),
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(eight), encoding="utf-8")
        for name, (gpu, model, ranks, micro, training, speed) in cases.items():
            length = 8192 if model == "8b" else 2048
            cell = lab.Model(folder, init="random", tokenizer="bytes") if model == "8b" else \
                lab.Model(model, init="random")
            experiment = lab.Experiment(
                model=cell, data=lab.RandomTokens(length=length, max_length=length),
                parallel=lab.Parallel(dp=ranks, zero=3),
                training=lab.Training(batch_size=ranks * micro, precision="bf16", **training))
            found[name] = row(experiment.plan(gpu), ranks * speed)
            tell(name, found[name])
    return found


def tell(name: str, found: dict[str, Any]) -> None:
    """A line."""
    print(f"{name:48s} {found['measured']:10,.0f} tokens/s, planned {found['planned']:10,.0f} "
          f"({found['low']:,.0f} to {found['high']:,.0f}): {100 * found['error']:+6.1f}%", flush=True)


def main() -> None:
    """The parts asked for."""
    parts = {"cpu": on_cpu, "h200": on_h200, "published": published}
    chosen, file, found = ask_for_parts(__doc__.splitlines()[0], parts)
    for part in chosen:
        found[part] = parts[part]()
        rows = [each for name, each in found[part].items() if name != "calibration" and not each.get("not_scored")]
        errors = [abs(each["error"]) for each in rows]
        within = sum(each["low"] <= each["measured"] <= each["high"] for each in rows)
        print(f"{part}: {len(errors)} configurations, median {100 * statistics.median(errors):.1f}%, worst "
              f"{100 * max(errors):.1f}%, {within} within the stated range\n")
        keep(file, "throughput_plans.py", found)


if __name__ == "__main__":
    main()
