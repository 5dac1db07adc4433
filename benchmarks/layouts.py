"""Seconds a step and to the first step under every layout, on CPU ranks; a pipeline's idle time beside its theory.

    python benchmarks/layouts.py [--json FILE] [--figure FILE] [--repeats 3] [--steps 10]

Every layout of two ranks trains the same model on the same tokens as one process, launched like any run, arms in turn.
A rank is one thread, so that two ranks have twice the arithmetic of one process: half its time is the best there is.
Reported are the median step (the first three are left out) and the time from `launch` to the end of the first step.

The bubble: a step of M micro-batches of one sequence each, on a pipeline of two ranks. Gloo sleeps while it waits, so
the share of the wall clock in which a rank's process uses no CPU is the share in which it waits for the other rank. It
is the mean of both ranks; the optimizer, which does not wait, is in the step too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}

from _results import keep

import collie_lab as lab
from collie_lab.folder import Tail

_ROOT = Path(__file__).resolve().parents[1]
MODEL = lab.Model("llama-5m", init="random", config={"num_hidden_layers": 8})
LAYOUTS: dict[str, lab.Parallel] = {
    "one process": lab.Parallel(),
    "dp2": lab.Parallel(dp=2),
    "dp2 zero2": lab.Parallel(dp=2, zero=2),
    "dp2 zero3": lab.Parallel(dp=2, zero=3),
    "tp2": lab.Parallel(tp=2),
    "tp2 sequence": lab.Parallel(tp=2, sequence_parallel=True),
    "pp2 gpipe": lab.Parallel(pp=2, schedule="gpipe"),
    "pp2 1f1b": lab.Parallel(pp=2),
    "pp2 interleaved": lab.Parallel(pp=2, schedule="interleaved"),
    "pp2 zero bubble": lab.Parallel(pp=2, schedule="zero_bubble"),
    "deepspeed zero1": lab.Parallel(dp=2, zero=1),
    "deepspeed zero2": lab.Parallel(dp=2, zero=2, engine="deepspeed"),
    "deepspeed zero3": lab.Parallel(dp=2, zero=3, engine="deepspeed"),
}
_COUNTS = (4, 8, 16)
# Idle share of M micro-batches on P ranks with V stages each (Narayanan et al., arXiv 2104.04473, section 2.2).
_THEORY: dict[str, Callable[[int], float]] = {
    "gpipe": lambda m: 1 / (m + 1),
    "1f1b": lambda m: 1 / (m + 1),
    "interleaved": lambda m: 1 / (2 * m + 1),
    "zero_bubble": lambda m: 0.0,
}
_SKIPPED = 3


def _experiment(parallel: lab.Parallel, batch_size: int, steps: int, callback: Callable[[Any], None]) -> lab.Experiment:
    return lab.Experiment(
        model=MODEL, data=lab.RandomTokens(length=256, documents=4 * batch_size), optimizer=lab.AdamW(lr=1e-4),
        parallel=parallel, callbacks=(callback,), name="layouts",
        training=lab.Training(steps=steps, batch_size=batch_size, export=False,
                              micro_batch_size=1 if parallel.pp > 1 else None))


def _note_clocks(trainer: Any) -> None:
    """After every step, on every rank: the wall clock and the CPU time."""
    with (trainer.folder.path / f"clock-{trainer.rank}.jsonl").open("a") as file:
        file.write(json.dumps([time.time(), time.process_time()]) + "\n")


def _run(parallel: lab.Parallel, batch_size: int, steps: int) -> dict[str, float]:
    """Seconds to the first step, of the median step, and the mean idle share of the ranks."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        began = time.time()
        run = _experiment(parallel, batch_size, steps, _note_clocks).launch(show=False, folder=folder)
        clocks = [list(Tail(run.folder.path / f"clock-{rank}.jsonl").new()) for rank in range(parallel.world_size)]
    seconds, idle = [], []
    for clock in clocks:
        for (wall, cpu), (later, more) in itertools.pairwise(clock[_SKIPPED:]):
            seconds.append(later - wall)
            idle.append(1 - (more - cpu) / (later - wall))
    return {"first_step": clocks[0][0][0] - began, "step": statistics.median(seconds), "idle": statistics.median(idle)}


def measure(repeats: int, steps: int) -> dict[str, Any]:
    """All layouts in turn, so often; then the pipeline schedules over numbers of micro-batches."""
    layouts: dict[str, list[dict[str, float]]] = {name: [] for name in LAYOUTS}
    for repeat in range(repeats):
        for name, parallel in LAYOUTS.items():
            layouts[name].append(_run(parallel, 8, steps))
            print(f"{repeat + 1}/{repeats} {name}: {layouts[name][-1]}", flush=True)
    bubble: dict[str, dict[int, float]] = {schedule: {} for schedule in _THEORY}
    for schedule in _THEORY:
        for count in _COUNTS:
            found = _run(lab.Parallel(pp=2, schedule=schedule), count, steps)  # type: ignore[arg-type]
            bubble[schedule][count] = found["idle"]
            print(f"{schedule}, {count} micro-batches: idle {found['idle']:.3f}, theory {_THEORY[schedule](count):.3f}",
                  flush=True)
    return {"layouts": layouts, "bubble": bubble,
            "theory": {schedule: {count: share(count) for count in _COUNTS} for schedule, share in _THEORY.items()}}


def report(results: dict[str, Any]) -> None:
    """Markdown tables."""
    alone = statistics.median(run["step"] for run in results["layouts"]["one process"])
    print("\n| layout | ms a step | of one process | s to the first step |\n|---|---|---|---|")
    for name, runs in results["layouts"].items():
        steps = [run["step"] for run in runs]
        print(f"| {name} | {1000 * statistics.median(steps):.0f} ({1000 * min(steps):.0f}–{1000 * max(steps):.0f}) | "
              f"{statistics.median(steps) / alone:.2f} | {statistics.median(run['first_step'] for run in runs):.1f} |")
    print("\n| schedule | " + " | ".join(f"M={count}" for count in _COUNTS) + " |")
    print("|---" * (len(_COUNTS) + 1) + "|")
    for schedule, found in results["bubble"].items():
        cells = [f"{100 * found[count]:.0f}% ({100 * results['theory'][schedule][count]:.0f}%)" for count in _COUNTS]
        print(f"| {schedule} | " + " | ".join(cells) + " |")


def main() -> None:
    """Measure, print, keep, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    results = measure(options.repeats, options.steps)
    report(results)
    keep(options.json, f"layouts.py --repeats {options.repeats} --steps {options.steps}", results)
    if options.figure:
        from _layouts_figure import draw

        draw(results, options.figure)


if __name__ == "__main__":
    main()
