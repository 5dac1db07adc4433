"""How long plans of LLaMA-65B take, from 8 to 1,024 ranks, the first with the start of the process that makes them.

    python benchmarks/plan_speed.py [--json experiments/results/plan_speed_cpu.json] [--pipelines]

Wall-clock seconds, the processor's seconds of all processes of a plan, and the load of the machine before.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import psutil
from _results import keep

import collie_lab as lab
from collie_lab.planning import _client

BASE = lab.Experiment(
    model=lab.Model("llama-65b", init="random"), data=lab.RandomTokens(length=2048), optimizer=lab.AdamW(),
    training=lab.Training(precision="bf16", recompute="full"))
#: The layout, and sequences a step.
LAYOUTS: dict[str, tuple[lab.Parallel, int]] = {
    "8: FSDP2, the first plan": (lab.Parallel(dp=8, zero=3), 8),
    "8: FSDP2": (lab.Parallel(dp=8, zero=3), 8),
    "8: tensor parallel": (lab.Parallel(tp=8), 1),
    "1,024: FSDP2": (lab.Parallel(dp=1024, zero=3), 1024),
    "1,024: tensor parallel 8 × FSDP2 128": (lab.Parallel(dp=128, tp=8, zero=3), 128),
}
PIPELINES: dict[str, tuple[lab.Parallel, int]] = {
    "8: pipeline, 8 micro-batches": (lab.Parallel(pp=8, micro_batches=8), 8),
    "1,024: pipeline 8 × tensor parallel 8 × FSDP2 16": (
        lab.Parallel(pp=8, tp=8, dp=16, zero=2, micro_batches=8), 128),
}


def timed(layout: lab.Parallel, batch_size: int) -> dict[str, Any]:
    """One plan."""
    experiment = BASE.replace(parallel=layout).with_("training.batch_size", batch_size)
    load, before, began = os.getloadavg()[0], _processor_seconds(), time.perf_counter()
    plan = experiment.plan("H100")
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "processor_seconds": _processor_seconds() - before, "load": load,
            "peak_bytes": plan.peak_bytes, "layers_run": plan.worst["layers_run"]}


def _processor_seconds() -> float:
    """Of the process of the dry runs and of those that it has ended."""
    process = _client._IDLE[False].queue[-1].process
    if process is None:
        return 0.0
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def main() -> None:
    """All of it, in this order: the first plan starts the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pipelines", action="store_true", help="those too, of which every layer is run")
    options = parser.parse_args()
    found = {}
    for name, (layout, batch_size) in {**LAYOUTS, **(PIPELINES if options.pipelines else {})}.items():
        found[name] = row = timed(layout, batch_size)
        print(f"{name:52s} {row['seconds']:6.1f} s, {row['processor_seconds']:6.1f} s of processors, load "
              f"{row['load']:.1f}: {row['peak_bytes'] / 1e9:.2f} GB", flush=True)
        keep(options.json, "plan_speed.py", found)


if __name__ == "__main__":
    main()
