"""Peak memory of a step on one GPU, method by method: as allocated, as reserved, and of the whole process.

    python benchmarks/gpu_memory.py [--models llama-1b llama-7b] [--json FILE]

Random weights, random tokens, bf16 arithmetic, in one warm process, from which every run's memory goes back before the
next begins. `allocated` are the bytes of live tensors, `reserved` what torch's allocator holds for them, `process` what
the driver says is taken, the CUDA context included; each the most that the last step has seen. Nothing waits for the
GPU between two steps, for the speed is told too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from _results import keep

import collie_lab as lab

STEPS = 8
MASTER: dict[str, Any] = {"precision": "bf16", "weights": "fp32"}
PURE: dict[str, Any] = {"precision": "bf16", "weights": "bf16"}

#: What is trained, its optimizer and how its weights are kept.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AdamW": ({"optimizer": lab.AdamW(lr=1e-4)}, MASTER),
    "AdamW, bf16 weights + master": ({"optimizer": lab.AdamW(lr=1e-4, rounding="master")}, PURE),
    "Lion": ({"optimizer": lab.Lion(lr=1e-5)}, MASTER),
    "Adan": ({"optimizer": lab.Adan(lr=1e-4)}, MASTER),
    "Sophia": ({"optimizer": lab.Sophia(lr=1e-5, hessian_every=2)}, MASTER),
    "AdamW in backward, bf16, stochastic": (
        {"optimizer": lab.AdamW(lr=1e-4, rounding="stochastic", in_backward=True)}, PURE),
    "LOMO": ({"optimizer": lab.Lomo(lr=1e-3)}, PURE),
    "AdaLomo": ({"optimizer": lab.AdaLomo(lr=1e-3)}, PURE),
    "LoRA": ({"optimizer": lab.AdamW(lr=1e-4), "adapter": lab.LoRA(r=16)}, PURE),
}


def watch(trainer: Any) -> None:
    """A callback: the memory of the last step, as an event."""
    import torch

    if trainer.device.type == "cuda" and trainer.step == STEPS:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        trainer.event("memory", allocated=torch.cuda.max_memory_allocated(),
                      reserved=torch.cuda.max_memory_reserved(), process=total - free)


def measure(pool: lab.Pool, model: str, method: str, *, length: int, batch_size: int, recompute: str
            ) -> dict[str, Any]:
    """The figures of one configuration; `out of memory` is one."""
    cells, weights = METHODS[method]
    experiment = lab.Experiment(
        model=lab.Model(model, init="random"), **cells, callbacks=(watch,),
        data=lab.RandomTokens(length=length, max_length=length, documents=4 * batch_size),
        training=lab.Training(steps=STEPS, batch_size=batch_size, recompute=recompute, export=False, **weights))
    case = {"model": model, "method": method, "length": length, "batch_size": batch_size, "recompute": recompute}
    try:
        run = experiment.launch(show=False, pool=pool)
    except lab.RankError as error:
        if "out of memory" not in str(error):
            raise
        return {**case, "out_of_memory": True}
    lines = (run.folder.path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    seen = next((event for event in map(json.loads, lines) if event["kind"] == "memory"), {})
    return {**case, **{name: seen.get(name) for name in ("allocated", "reserved", "process")},
            "parameters": run.summary["parameters"],
            "tokens_per_second": run.summary["tokens_per_second"]}


def main() -> None:
    """Every method on every model, without and with recomputation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["llama-1b", "llama-7b"], choices=lab.SHAPES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--recompute", nargs="+", default=["none", "full"], choices=("none", "full"))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    with lab.Pool(1) as pool:
        for model in options.models:
            for recompute in options.recompute:
                for method in options.methods:
                    found.append(measure(pool, model, method, length=options.length, batch_size=options.batch_size,
                                         recompute=recompute))
                    print(line(found[-1]), flush=True)
                    keep(options.json, "gpu_memory.py", found)


def line(case: dict[str, Any]) -> str:
    """A configuration and its figures in GB, and bytes a parameter."""
    head = f"{case['model']:10} {case['method']:36} recompute {case['recompute']:5}"
    if case.get("out_of_memory"):
        return f"{head} out of memory"
    if case["allocated"] is None:
        return f"{head} no GPU"
    figures = "  ".join(f"{name} {case[name] / 1e9:7.2f} GB" for name in ("allocated", "reserved", "process"))
    return (f"{head} {figures}  {case['allocated'] / case['parameters']:6.2f} bytes a parameter  "
            f"{case['tokens_per_second']:7,.0f} tokens/s")


if __name__ == "__main__":
    main()
