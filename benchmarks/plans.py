"""Plans beside what runs measure: peak bytes of live tensors on a CPU, and an H200's figures that were kept.

    python benchmarks/plans.py [--parts cases h200] [--json experiments/results/plans_cpu.json]

Every configuration runs for real, on as many gloo processes as its layout has, and is planned without running.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _results import ask_for_parts, h200_memory, keep
from gpu_memory import METHODS

import collie_lab as lab

BASE = lab.Experiment(
    model=lab.Model("llama-5m", init="random"), data=lab.RandomTokens(length=256, documents=64),
    optimizer=lab.AdamW(lr=1e-3), training=lab.Training(steps=3, batch_size=8, export=False))
PURE = BASE.training.replace(precision="bf16", weights="bf16")
FAMILIES = {
    "gpt2": {"model_type": "gpt2", "n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 320, "n_positions": 512},
    "qwen3": {"model_type": "qwen3", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4,
              "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 320},
    "gemma2": {"model_type": "gemma2", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4,
               "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 320},
    "mixtral": {"model_type": "mixtral", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4,
                "num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 4, "vocab_size": 320},
}
CASES: dict[str, lab.Experiment] = {
    "AdamW": BASE,
    "two micro-batches": BASE.with_("training.micro_batch_size", 4),
    "eight micro-batches": BASE.with_("training.micro_batch_size", 1),
    "packing": BASE.replace(data=lab.RandomTokens(length=256, documents=64, packing=True, max_length=256)),
    "packing of short documents": BASE.replace(data=lab.RandomTokens(length=48, documents=400, packing=True,
                                                                     max_length=256)),
    "recompute": BASE.with_("training.recompute", "full"),
    "autocast": BASE.with_("training.precision", "bf16"),
    "bf16 weights, master": BASE.replace(training=PURE),
    "bf16 weights, Kahan": BASE.replace(training=PURE, optimizer=lab.AdamW(lr=1e-3, rounding="kahan")),
    "clipped": BASE.with_("training.clip_grad_norm", 1.0),
    "SGD, momentum": BASE.replace(optimizer=lab.SGD(lr=0.1, momentum=0.9)),
    "Lion": BASE.replace(optimizer=lab.Lion(lr=1e-4)),
    "Adan": BASE.replace(optimizer=lab.Adan(lr=1e-3)),
    "Sophia": BASE.replace(optimizer=lab.Sophia(lr=1e-4, hessian_every=2)),
    "LOMO": BASE.replace(optimizer=lab.Lomo(lr=0.1)),
    "LOMO, clipped in two passes": BASE.replace(optimizer=lab.Lomo(lr=0.1)).with_("training.clip_grad_norm", 1.0),
    "AdaLomo": BASE.replace(optimizer=lab.AdaLomo(lr=0.01)),
    "Adafactor": BASE.replace(optimizer=lab.Adafactor(lr=0.01)),
    "AdamW in backward": BASE.replace(optimizer=lab.AdamW(lr=1e-3, in_backward=True)),
    "LoRA": BASE.replace(adapter=lab.LoRA(r=8)),
    "LoRA, recompute": BASE.replace(adapter=lab.LoRA(r=8)).with_("training.recompute", "full"),
    "IA3": BASE.replace(adapter=lab.IA3()),
    "OFT": BASE.replace(adapter=lab.OFT(block_size=32)),
    "Prompt": BASE.replace(adapter=lab.Prompt(tokens=20)),
    "P-tuning": BASE.replace(adapter=lab.PTuning(tokens=20, hidden=64)),
    "Prefix": BASE.replace(adapter=lab.Prefix(tokens=20)),
    "Freeze": BASE.replace(adapter=lab.Freeze(("*norm*",))),
    "dp 2": BASE.replace(parallel=lab.Parallel(dp=2)),
    "dp 2, four micro-batches": BASE.replace(parallel=lab.Parallel(dp=2)).with_("training.micro_batch_size", 1),
    "dp 2, LOMO": BASE.replace(parallel=lab.Parallel(dp=2), optimizer=lab.Lomo(lr=0.1)),
    "ZeRO-2": BASE.replace(parallel=lab.Parallel(dp=2, zero=2)),
    "ZeRO-3": BASE.replace(parallel=lab.Parallel(dp=2, zero=3)),
    "ZeRO-3, four micro-batches": BASE.replace(parallel=lab.Parallel(dp=2, zero=3)).with_(
        "training.micro_batch_size", 1),
    "ZeRO-3, autocast": BASE.replace(parallel=lab.Parallel(dp=2, zero=3)).with_("training.precision", "bf16"),
    "ZeRO-3, AdaLomo": BASE.replace(parallel=lab.Parallel(dp=2, zero=3), optimizer=lab.AdaLomo(lr=0.01)),
    "ZeRO-3, LoRA": BASE.replace(parallel=lab.Parallel(dp=2, zero=3), adapter=lab.LoRA(r=8)),
    "ZeRO-3 on 4": BASE.replace(parallel=lab.Parallel(dp=4, zero=3)),
    "tp 2": BASE.replace(parallel=lab.Parallel(tp=2)),
    "tp 2, sequence": BASE.replace(parallel=lab.Parallel(tp=2, sequence_parallel=True)),
    "pp 2, GPipe": BASE.replace(parallel=lab.Parallel(pp=2, schedule="gpipe")),
    "pp 2, 1F1B": BASE.replace(parallel=lab.Parallel(pp=2)),
    "pp 2, 1F1B, 32 micro-batches": BASE.replace(parallel=lab.Parallel(pp=2)).replace(
        training=BASE.training.replace(batch_size=32, micro_batch_size=1)),
    "pp 2, interleaved, 16 micro-batches": BASE.replace(parallel=lab.Parallel(pp=2, schedule="interleaved")).replace(
        training=BASE.training.replace(batch_size=16, micro_batch_size=1)),
    "pp 2, zero bubble, 16 micro-batches": BASE.replace(parallel=lab.Parallel(pp=2, schedule="zero_bubble")).replace(
        training=BASE.training.replace(batch_size=16, micro_batch_size=1)),
    "pp 2, recompute, LoRA": BASE.replace(
        parallel=lab.Parallel(pp=2), adapter=lab.LoRA(r=8),
        training=BASE.training.replace(micro_batch_size=2, recompute="full")),
    "tp 2 × ZeRO-3": BASE.replace(parallel=lab.Parallel(dp=2, tp=2, zero=3)),
    "pp 2 × tp 2": BASE.replace(parallel=lab.Parallel(pp=2, tp=2)),
}


def families(folder: Path) -> dict[str, lab.Experiment]:
    """Small models of other families, by their configurations."""
    for name, fields in FAMILIES.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return {name: BASE.replace(model=lab.Model(folder / name, init="random", tokenizer="bytes")) for name in FAMILIES}


def compare(experiment: lab.Experiment, pool: lab.Pool) -> dict[str, Any]:
    """What a run measured, and what the plan says; bytes and seconds."""
    began = time.perf_counter()
    plan = experiment.plan()
    seconds = time.perf_counter() - began
    planned = plan.peak_bytes
    measured = int(experiment.launch(show=False, pool=pool).summary["peak_bytes"])
    # When gloo's threads free their copies of what they gather is chance: so much more may be measured.
    copies = int(plan.components["communication"].max()) if experiment.parallel.zero == 3 else 0
    excess = measured - planned
    error = 0.0 if 0 <= excess <= copies else -(excess - copies if excess > 0 else excess) / measured
    return {"measured": measured, "planned": planned, "error": error, "excess": excess, "copies": copies,
            "plan_seconds": seconds, "ranks": experiment.parallel.world_size}


def on_gpu() -> dict[str, dict[str, Any]]:
    """Plans beside what an H200 measured, method by method."""
    rows = {}
    for name, row in h200_memory().items():
        cells, weights = METHODS[row["method"]]
        experiment = lab.Experiment(
            model=lab.Model(row["model"], init="random"), **cells, data=lab.RandomTokens(length=row["length"]),
            training=lab.Training(batch_size=row["batch_size"], recompute=row["recompute"], **weights))
        plan = experiment.plan("H200")
        rows[name] = {
            "measured": row["allocated"], "planned": plan.peak_bytes, "error": plan.peak_bytes / row["allocated"] - 1,
            "reserved_error": plan.reserved_bytes / row["reserved"] - 1,
            "process_error": plan.process_bytes / row["process"] - 1}
        found = rows[name]
        print(f"H200, {name:46s} {found['measured'] / 1e9:.3f} GB: allocated {100 * found['error']:+.3f}%, reserved "
              f"{100 * found['reserved_error']:+.2f}%, process {100 * found['process_error']:+.2f}%", flush=True)
    return rows


def on_cpu() -> dict[str, dict[str, Any]]:
    """Every configuration, run and planned."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        cases = {**families(Path(folder)), **CASES}
        for ranks in (1, 2, 4):
            with lab.Pool(ranks) as pool:
                for name, experiment in cases.items():
                    if experiment.parallel.world_size == ranks:
                        found[name] = compare(experiment, pool)
                        print(f"{name:28s} measured {found[name]['measured'] / 1e6:8.2f} MB, planned "
                              f"{found[name]['planned'] / 1e6:8.2f} MB: {100 * found[name]['error']:+.3f}%"
                              + (f" (gloo's copies: up to {found[name]['copies'] / 1e6:.2f} MB)"
                                 if found[name]["copies"] else ""), flush=True)
    errors = [abs(row["error"]) for row in found.values()]
    print(f"{len(errors)} configurations: median {100 * statistics.median(errors):.3f}%, "
          f"worst {100 * max(errors):.3f}%")
    return found


def main() -> None:
    """The parts asked for."""
    parts = {"cases": on_cpu, "h200": on_gpu}
    chosen, file, found = ask_for_parts(__doc__.splitlines()[0], parts)
    for part in chosen:
        found[part] = parts[part]()
    keep(file, "plans.py", found)


if __name__ == "__main__":
    main()
