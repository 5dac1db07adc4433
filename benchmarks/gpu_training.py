"""Tokens per second, MFU and peak memory on one GPU, beside `transformers.Trainer`.

    python benchmarks/gpu_training.py [--model llama-1b] [--length 2048] [--batch-size 4] [--json FILE]
    python benchmarks/gpu_training.py --model llama-65b --arms LOMO --recompute full --batch-size 2 --steps 6

All arms train the same shape from random weights on random tokens, with bf16 arithmetic, and take turns: ours in one
warm process, the Trainer in new ones. The first steps are left out; the clock is that on the wall. AdamW keeps fp32
weights, as the Trainer does, the others bf16 weights (LOMO and AdaLomo in backward, rounded stochastically; LoRA's
are frozen). What is "compiled" has its blocks compiled (the Trainer: its whole model); the first steps, which wait for
the compiler, are left out. FLOPs per token: 6·N_matmul + 6·L·d·s (causal), with LoRA 4·N_matmul; MFU against the dense
bf16 peak of a known GPU. Without a GPU it runs on the CPU with `--model llama-tiny`, to show that it runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import collie_lab as lab
from collie_lab.study import peer

WARM_UP = 3
TRAINER = "transformers Trainer AdamW"
COMPILED = ", compiled"


def experiment(options: argparse.Namespace) -> lab.Experiment:
    """What every arm of ours has in common."""
    return lab.Experiment(
        model=lab.Model(options.model, init="random"),
        data=lab.RandomTokens(length=options.length, max_length=options.length, documents=64),
        optimizer=lab.AdamW(lr=1e-4),
        training=lab.Training(steps=options.steps, batch_size=options.batch_size, precision="bf16",
                              recompute=options.recompute, export=False),
    )


def measure(options: argparse.Namespace, folder: Path, launch: dict[str, Any], compiled: bool, **cells: Any
            ) -> dict[str, float]:
    """One run; its figures."""
    arm = experiment(options).replace(**cells).with_("training.compile", compiled)
    run = arm.launch(show=False, folder=folder, **launch)
    metrics = run.metrics
    timed = metrics.iloc[WARM_UP:]
    speed = timed["tokens"].sum() / (metrics["time"].iloc[-1] - metrics["time"].iloc[WARM_UP - 1])
    flops = (timed["mfu"] / timed["tokens_per_second"]).mean()  # a token's share of the peak
    return {"tokens_per_second": float(speed), "mfu": float(speed * flops),
            "peak_bytes": run.summary["peak_bytes"] or 0}


def main() -> None:
    """Run the arms in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-1b", choices=lab.SHAPES)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recompute", choices=("none", "full"), default="none")
    eager = (TRAINER, "AdamW", "LOMO", "AdaLomo", "LoRA")
    names = (*eager, *(f"{name}{COMPILED}" for name in eager if name != "AdaLomo"))
    parser.add_argument("--arms", nargs="+", choices=names, default=names)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bf16 = experiment(options).training.replace(weights="bf16")
    variants: dict[str, dict[str, Any]] = {
        "AdamW": {},
        "LOMO": {"optimizer": lab.Lomo(lr=1e-3), "training": bf16},
        "AdaLomo": {"optimizer": lab.AdaLomo(lr=1e-3), "training": bf16},
        "LoRA": {"adapter": lab.LoRA(r=16), "training": bf16},
    }
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name, lab.Pool(1) as pool:
        folder = Path(name)
        arms = {}
        for arm in options.arms:
            method, compiled = arm.removesuffix(COMPILED), arm.endswith(COMPILED)
            own = method != TRAINER
            arms[f"collie_lab {arm}" if own else arm] = functools.partial(
                measure, options, folder, {"pool": pool} if own else {"_module": peer.MODULE}, compiled,
                **variants.get(method, {}))
        for _ in range(options.repeats):
            for arm, run in arms.items():
                found.setdefault(arm, []).append(run())
                print(arm, found[arm][-1], flush=True)
        environment = next(iter(folder.glob("*/env.json"))).read_text(encoding="utf-8")
    print(f"\n{'arm':36} {'tokens/s':>10} {'(min–max)':>18} {'MFU':>7} {'peak GB':>8}")
    for arm, runs in found.items():
        speeds = [run["tokens_per_second"] for run in runs]
        spread = f"({min(speeds):,.0f}–{max(speeds):,.0f})"
        mfu, peak = statistics.median(run["mfu"] for run in runs), max(run["peak_bytes"] for run in runs) / 1e9
        print(f"{arm:36} {statistics.median(speeds):10,.0f} {spread:>18} {mfu:7.1%} {peak:8.2f}")
    if options.json:
        options.json.write_text(json.dumps({"options": {key: str(value) for key, value in vars(options).items()
                                                        if key != "json"},
                                            "environment": json.loads(environment), "arms": found}, indent=1) + "\n",
                                encoding="utf-8")


if __name__ == "__main__":
    main()
