"""Tokens per second, MFU and peak memory on one GPU, beside `transformers.Trainer`.

    python benchmarks/gpu_training.py [--model llama-1b] [--length 2048] [--batch-size 4] [--json FILE]
    python benchmarks/gpu_training.py --model llama-65b --arms LOMO --recompute full --batch-size 2 --steps 6

All arms train the same shape from random weights on random tokens, with bf16 arithmetic, and take turns: ours in one
warm process, the Trainer in new ones. The first steps are left out; the clock is that on the wall. AdamW keeps fp32
weights, as the Trainer does, the others bf16 weights (LOMO and AdaLomo in backward, rounded stochastically; LoRA's
are frozen). FLOPs per token: 6·N_matmul + 6·L·d·s (causal), with LoRA 4·N_matmul; MFU against the dense bf16 peak of
a known GPU. Without a GPU it runs on the CPU with `--model llama-tiny`, to show that it runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import collie_lab as lab

WARM_UP = 3
TRAINER = "transformers Trainer AdamW"


def experiment(options: argparse.Namespace) -> lab.Experiment:
    """What every arm of ours has in common."""
    return lab.Experiment(
        model=lab.Model(options.model, init="random"),
        data=lab.RandomTokens(length=options.length, max_length=options.length, documents=64),
        optimizer=lab.AdamW(lr=1e-4),
        training=lab.Training(steps=options.steps, batch_size=options.batch_size, precision="bf16",
                              recompute=options.recompute, export=False),
    )


def ours(options: argparse.Namespace, folder: Path, pool: lab.Pool, **cells: Any) -> dict[str, float]:
    """One run; its figures."""
    run = experiment(options).replace(**cells).launch(show=False, folder=folder, pool=pool)
    metrics = run.metrics
    timed = metrics.iloc[WARM_UP:]
    speed = timed["tokens"].sum() / (metrics["time"].iloc[-1] - metrics["time"].iloc[WARM_UP - 1])
    flops = (timed["mfu"] / timed["tokens_per_second"]).mean()  # a token's share of the peak
    return {"tokens_per_second": float(speed), "mfu": float(speed * flops),
            "peak_bytes": run.summary["peak_bytes"] or 0}


def theirs(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The same with transformers' Trainer, in a process of its own."""
    out = folder / "trainer.json"
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--trainer", str(out)], check=True)
    return json.loads(out.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def train_theirs(options: argparse.Namespace, out: Path) -> None:
    """The process of the Trainer arm."""
    import torch
    import transformers

    from collie_lab.training.flops import StepFlops, peak_flops

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    cell = experiment(options)
    torch.manual_seed(0)
    fields = {**lab.SHAPES[options.model]}
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    tokens = torch.randint(0, config.vocab_size, (options.steps * options.batch_size, options.length))
    ends: list[float] = []

    class Ticks(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if len(ends) in (WARM_UP - 1, options.steps - 1) and gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(), use_cpu=not gpu, bf16=True, per_device_train_batch_size=options.batch_size,
        max_steps=options.steps, optim="adamw_torch_fused", learning_rate=cell.optimizer.lr, max_grad_norm=0.0,
        lr_scheduler_type="constant", gradient_checkpointing=options.recompute == "full", save_strategy="no",
        report_to=[], disable_tqdm=True, logging_strategy="no",
    )
    transformers.Trainer(model=model, args=arguments, callbacks=[Ticks()],
                         train_dataset=[{"input_ids": row, "labels": row} for row in tokens]).train()
    speed = options.batch_size * options.length * (options.steps - WARM_UP) / (ends[-1] - ends[WARM_UP - 1])
    flops = StepFlops.of_model(model).of(options.length, options.length**2) / options.length
    peak = peak_flops(device)
    out.write_text(json.dumps({
        "tokens_per_second": speed, "mfu": speed * flops / peak if peak else float("nan"),
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else 0}), encoding="utf-8")


def main() -> None:
    """Run the arms in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-1b", choices=lab.SHAPES)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recompute", choices=("none", "full"), default="none")
    names = (TRAINER, "AdamW", "LOMO", "AdaLomo", "LoRA")
    parser.add_argument("--arms", nargs="+", choices=names, default=names)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trainer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trainer:
        train_theirs(options, options.trainer)
        return
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
        arms = {TRAINER: functools.partial(theirs, options, folder)} if TRAINER in options.arms else {}
        arms |= {f"collie_lab {name}": functools.partial(ours, options, folder, pool, **cells)
                 for name, cells in variants.items() if name in options.arms}
        for _ in range(options.repeats):
            for arm, measure in arms.items():
                found.setdefault(arm, []).append(measure())
                print(arm, found[arm][-1], flush=True)
        environment = next(iter(folder.glob("*/env.json"))).read_text(encoding="utf-8")
    print(f"\n{'arm':28} {'tokens/s':>10} {'(min–max)':>18} {'MFU':>7} {'peak GB':>8}")
    for arm, runs in found.items():
        speeds = [run["tokens_per_second"] for run in runs]
        spread = f"({min(speeds):,.0f}–{max(speeds):,.0f})"
        mfu, peak = statistics.median(run["mfu"] for run in runs), max(run["peak_bytes"] for run in runs) / 1e9
        print(f"{arm:28} {statistics.median(speeds):10,.0f} {spread:>18} {mfu:7.1%} {peak:8.2f}")
    if options.json:
        options.json.write_text(json.dumps({"options": {key: str(value) for key, value in vars(options).items()
                                                        if key not in ("json", "trainer")},
                                            "environment": json.loads(environment), "arms": found}, indent=1) + "\n",
                                encoding="utf-8")


if __name__ == "__main__":
    main()
