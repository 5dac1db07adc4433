"""The closed form beside the dry run, over many configurations, and how long both take.

    python benchmarks/closed_form.py [--json experiments/results/closed_form_cpu.json] [--only WORD]

Nothing is run for real: the dry run's own errors are in `benchmarks/plans.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _results import keep

import collie_lab as lab

BASE = lab.Experiment(
    model=lab.Model("llama-1m", init="random"), data=lab.RandomTokens(length=256),
    optimizer=lab.AdamW(lr=1e-3), training=lab.Training(steps=3, batch_size=4, export=False))
AUTOCAST = BASE.training.replace(precision="bf16")
PURE = BASE.training.replace(precision="bf16", weights="bf16")
FULL = BASE.training.replace(recompute="full")
ZERO3, ZERO2 = lab.Parallel(dp=4, zero=3), lab.Parallel(dp=4, zero=2)
WIDE = {"vocab_size": 8192, "tie_word_embeddings": False}

CASES: dict[str, lab.Experiment] = {
    "AdamW": BASE,
    "AdamW, one document": BASE.with_("training.batch_size", 1),
    "AdamW, large vocabulary": BASE.with_("model.config", WIDE),
    "AdamW, large vocabulary, recompute": BASE.with_("model.config", WIDE).replace(training=FULL),
    "two micro-batches": BASE.with_("training.micro_batch_size", 2),
    "packing": BASE.replace(data=lab.RandomTokens(length=256, packing=True, max_length=256)),
    "recompute": BASE.replace(training=FULL),
    "autocast": BASE.replace(training=AUTOCAST),
    "autocast, recompute": BASE.replace(training=AUTOCAST.replace(recompute="full")),
    "bf16 weights, master": BASE.replace(training=PURE),
    "bf16 weights, Kahan": BASE.replace(training=PURE, optimizer=lab.AdamW(lr=1e-3, rounding="kahan")),
    "bf16 weights, stochastic": BASE.replace(training=PURE, optimizer=lab.AdamW(lr=1e-3, rounding="stochastic")),
    "clipped": BASE.with_("training.clip_grad_norm", 1.0),
    "SGD": BASE.replace(optimizer=lab.SGD(lr=0.1)),
    "SGD, momentum": BASE.replace(optimizer=lab.SGD(lr=0.1, momentum=0.9)),
    "Lion": BASE.replace(optimizer=lab.Lion(lr=1e-4)),
    "Adan": BASE.replace(optimizer=lab.Adan(lr=1e-3)),
    "Adan, bf16 weights": BASE.replace(training=PURE, optimizer=lab.Adan(lr=1e-3)),
    "Sophia": BASE.replace(optimizer=lab.Sophia(lr=1e-4, hessian_every=2)),
    "Sophia, autocast": BASE.replace(training=AUTOCAST, optimizer=lab.Sophia(lr=1e-4, hessian_every=2)),
    "Sophia, four micro-batches": BASE.replace(optimizer=lab.Sophia(lr=1e-4, hessian_every=2)).with_(
        "training.micro_batch_size", 1),
    "Sophia, bf16 weights": BASE.replace(training=PURE, optimizer=lab.Sophia(lr=1e-4, hessian_every=2)),
    "LOMO": BASE.replace(optimizer=lab.Lomo(lr=0.1)),
    "LOMO, bf16 weights, recompute": BASE.replace(optimizer=lab.Lomo(), training=PURE.replace(recompute="full")),
    "LOMO, clipped in two passes": BASE.replace(optimizer=lab.Lomo(lr=0.1)).with_("training.clip_grad_norm", 1.0),
    "LOMO, held micro-batches": BASE.replace(optimizer=lab.Lomo(lr=0.1, accumulate="hold")).with_(
        "training.micro_batch_size", 2),
    "AdaLomo": BASE.replace(optimizer=lab.AdaLomo(lr=0.01)),
    "AdaLomo, bf16 weights": BASE.replace(training=PURE, optimizer=lab.AdaLomo(lr=0.01)),
    "AdamW in backward": BASE.replace(optimizer=lab.AdamW(lr=1e-3, in_backward=True)),
    "LoRA": BASE.replace(adapter=lab.LoRA(r=8)),
    "LoRA, autocast": BASE.replace(training=AUTOCAST, adapter=lab.LoRA(r=8)),
    "LoRA, bf16 weights": BASE.replace(training=PURE, adapter=lab.LoRA(r=8)),
    "LoRA, bf16 weights, recompute": BASE.replace(training=PURE.replace(recompute="full"), adapter=lab.LoRA(r=8)),
    "LoRA of queries and values": BASE.replace(adapter=lab.LoRA(r=8, targets=("q_proj", "v_proj"))),
    "dp 4": BASE.replace(parallel=lab.Parallel(dp=4)),
    "dp 4, LOMO": BASE.replace(parallel=lab.Parallel(dp=4), optimizer=lab.Lomo(lr=0.1)),
    "dp 2, two micro-batches": BASE.replace(parallel=lab.Parallel(dp=2)).with_("training.micro_batch_size", 1),
    "dp 2, four micro-batches": BASE.replace(parallel=lab.Parallel(dp=2), training=BASE.training.replace(
        batch_size=8, micro_batch_size=1)),
    "dp 2, two micro-batches, LoRA": BASE.replace(
        parallel=lab.Parallel(dp=2), adapter=lab.LoRA(r=8)).with_("training.micro_batch_size", 1),
    "dp 2, two micro-batches, Adan": BASE.replace(
        parallel=lab.Parallel(dp=2), optimizer=lab.Adan(lr=1e-3)).with_("training.micro_batch_size", 1),
    "dp 4, autocast": BASE.replace(parallel=lab.Parallel(dp=4), training=AUTOCAST),
    "ZeRO-2": BASE.replace(parallel=ZERO2),
    "ZeRO-2, bf16": BASE.replace(parallel=ZERO2, training=AUTOCAST),
    "ZeRO-3": BASE.replace(parallel=ZERO3),
    "ZeRO-3, bf16": BASE.replace(parallel=ZERO3, training=AUTOCAST),
    "ZeRO-3, bf16, recompute": BASE.replace(parallel=ZERO3, training=AUTOCAST.replace(recompute="full")),
    "ZeRO-3, bf16 weights": BASE.replace(parallel=ZERO3, training=PURE),
    "ZeRO-3, LOMO": BASE.replace(parallel=ZERO3, optimizer=lab.Lomo(lr=0.1)),
    "ZeRO-3, LoRA": BASE.replace(parallel=ZERO3, adapter=lab.LoRA(r=8)),
    "tp 2": BASE.replace(parallel=lab.Parallel(tp=2)),
    "tp 2, autocast": BASE.replace(parallel=lab.Parallel(tp=2), training=AUTOCAST),
    "tp 2, LOMO": BASE.replace(parallel=lab.Parallel(tp=2), optimizer=lab.Lomo(lr=0.1)),
    "dp 2 × tp 2": BASE.replace(parallel=lab.Parallel(dp=2, tp=2)),
    "ZeRO-3 × tp 2, bf16": BASE.replace(parallel=lab.Parallel(dp=2, tp=2, zero=3), training=AUTOCAST),
}
FAMILIES = {
    "mistral": {"num_key_value_heads": 2, "sliding_window": None}, "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 32},
}


def families(folder: Path) -> dict[str, lab.Experiment]:
    """Small models of other families, by their configurations."""
    found = {}
    for name, fields in FAMILIES.items():
        (folder / name).mkdir()
        whole = {"model_type": name, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 5,
                 "num_attention_heads": 8, "vocab_size": 512, "max_position_embeddings": 512,
                 "tie_word_embeddings": False, **fields}
        (folder / name / "config.json").write_text(json.dumps(whole), encoding="utf-8")
        found[name] = BASE.replace(model=lab.Model(folder / name, init="random", tokenizer="bytes"))
        found[f"{name}, autocast, recompute"] = found[name].replace(training=AUTOCAST.replace(recompute="full"))
    return found


def real() -> dict[str, lab.Experiment]:
    """Models of the sizes that people train."""
    def experiment(model: str, batch_size: int, parallel: lab.Parallel, **more: Any) -> lab.Experiment:
        training = lab.Training(batch_size=batch_size, precision="bf16", recompute="full", **more.pop("training", {}))
        return lab.Experiment(model=lab.Model(model, init="random"), data=lab.RandomTokens(length=2048),
                              parallel=parallel, training=training, **{"optimizer": lab.AdamW(), **more})

    pure = {"training": {"weights": "bf16"}}
    return {
        "7B, ZeRO-3 on 8": experiment("llama-7b", 8, lab.Parallel(dp=8, zero=3)),
        "7B, LoRA": experiment("llama-7b", 1, lab.Parallel(), adapter=lab.LoRA(r=16), **pure),
        "13B, tp 8": experiment("llama-13b", 2, lab.Parallel(tp=8)),
        "65B, LOMO": experiment("llama-65b", 2, lab.Parallel(), optimizer=lab.Lomo(), **pure),
        "65B, ZeRO-3 on 8": experiment("llama-65b", 8, lab.Parallel(dp=8, zero=3)),
        "65B, ZeRO-3 on 1,024": experiment("llama-65b", 1024, lab.Parallel(dp=1024, zero=3)),
        "65B, tp 8 × ZeRO-3 on 128": experiment("llama-65b", 128, lab.Parallel(dp=128, tp=8, zero=3)),
    }


def compare(experiment: lab.Experiment, gpu: str | None) -> dict[str, Any]:
    """Both, in bytes and seconds."""
    began = time.perf_counter()
    found = lab.estimate(experiment, gpu)
    middle = time.perf_counter()
    planned = experiment.plan(gpu).peak_bytes
    return {"planned": planned, "estimated": found.peak_bytes, "error": found.peak_bytes / planned - 1,
            "moment": found.moment, "estimate_seconds": middle - began, "plan_seconds": time.perf_counter() - middle}


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="configurations whose names hold this")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        cases = [(name, case, None) for name, case in {**CASES, **families(Path(folder))}.items()]
        cases += [(name, case, "H100") for name, case in real().items()]
        for name, experiment, gpu in cases:
            if options.only in name:
                found[name] = compare(experiment, gpu)
                row = found[name]
                print(f"{name:36s} planned {row['planned'] / 1e6:12.3f} MB, estimated {row['estimated'] / 1e6:12.3f} MB"
                      f": {100 * row['error']:+.4f}% in {1e3 * row['estimate_seconds']:.0f} ms", flush=True)
                keep(options.json, "closed_form.py", found)
    errors = [abs(row["error"]) for row in found.values()]
    print(f"{len(errors)} configurations: median {100 * statistics.median(errors):.4f}%, "
          f"worst {100 * max(errors):.4f}%; "
          f"{1e3 * statistics.median(row['estimate_seconds'] for row in found.values()):.0f} ms each")


if __name__ == "__main__":
    main()
