"""Time per optimizer step of every rule, beside torch, pytorch_optimizer, optimi and the bandwidth of memory.

    python benchmarks/optimizers.py [--quick] [--json FILE] [--figure FILE] [--dtype fp32 | bf16] [--model 50m]
    python benchmarks/optimizers.py --draw FILE.json --figure FILE.png      (an earlier result, nothing is measured)

All arms update the same Llama-shaped tensors (51 M parameters in 101 tensors by default) with the same prescribed
gradients; no model is run. The floor is the bytes that a rule must move (weights and states read and written,
gradients read) over the bandwidth measured between the arms: the faster of a copy and of scaling in place. (On a
CPU a copy is no bound: a core reads a line before it overwrites it, which in-place updates need anyway.) A CPU's
bandwidth changes with what else its host does: each round has its own. A GPU's does not, but may be seen too low after
a pause: the highest of all rounds counts.

Arms take turns. A turn builds the optimizer, makes one step that does not count and some that do, and frees it;
its time is the median of those. Ratios are taken within a round of turns; tables give the median over the rounds
(and minimum–maximum). With one thread the clock is `time.process_time`, which a busy machine disturbs less; with
more it is the clock on the wall, on a GPU its own events.

Before anything is timed, each arm makes three steps on small fp32 tensors and is compared with our eager engine;
a library that follows another formula is left out. With bf16 weights, ours keep fp32 states, and round
stochastically or hold an fp32 master copy; libraries do it their own way (states in bf16; nearest rounding,
optimi with Kahan's compensation), so they move other bytes, and have a floor of their own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Before torch reads them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _optimizers_arms import CASES, Arm, Case, agreement, bytes_of_library, library_arms, our_arms, shapes
from _results import machine
from torch import Tensor, nn

from collie_lab.cells import SHAPES

_AGREE_WITHIN = 1e-3  # of the movement; fp32 weights resolve about 1e-5 of it
_PACKAGES = ("pytorch_optimizer", "torch-optimi", "triton")


class Bench:
    """The tensors, and the clock of their device.

    Args:
        steps: that count, in each turn of an arm.
    """

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device, repeats: int, steps: int):
        self.device, self.repeats, self.steps = device, repeats, steps
        random = torch.Generator(device).manual_seed(0)

        def draw(shape: tuple[int, ...], size: float) -> Tensor:
            return torch.randn(shape, generator=random, device=device, dtype=dtype).mul_(size)

        self.weights = [draw(shape, 0.02) for shape in shapes(model)]
        self.gradients = [draw(shape, 1e-3) for shape in shapes(model)]
        self.numbers = sum(weight.numel() for weight in self.weights)
        size = min(self.numbers * 4, 2**31)
        self._from, self._to = (torch.ones(size // 4, device=device) for _ in range(2))

    def bandwidth(self) -> dict[str, float]:
        """Bytes a second."""
        moved = 2 * self._from.numel() * self._from.element_size()
        return {"copy": moved / min(self.seconds(lambda: self._to.copy_(self._from)) for _ in range(3)),
                "in place": moved / min(self.seconds(lambda: self._to.mul_(0.5)) for _ in range(3))}

    def seconds(self, work: Callable[[], Any]) -> float:
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / 1e3
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        work()
        return clock() - start

    def turn(self, case: Case, arm: Arm) -> dict[str, float]:
        """Build, step, free. Milliseconds a step, its temporaries on a GPU, and a library's bytes a parameter."""
        parameters = [nn.Parameter(weight) for weight in self.weights]

        def give() -> None:  # some optimizers drop the gradients they have used
            for parameter, gradient in zip(parameters, self.gradients, strict=True):
                parameter.grad = gradient

        give()
        optimizer, step = arm.build(parameters)
        step()
        found, times, gpu = {}, [], self.device.type == "cuda"
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            resident = torch.cuda.memory_allocated()
        for _ in range(self.steps):
            give()
            times.append(self.seconds(step))
        if gpu:
            found["temporaries"] = float(torch.cuda.max_memory_allocated() - resident)
        if not arm.ours:
            found["bytes"] = bytes_of_library(case, optimizer, parameters)
        return {"ms": statistics.median(times) * 1e3, **found}

    def free(self) -> None:
        """What a turn left."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


# --- one rule -------------------------------------------------------------------------------------


def compare(case: Case, arms: list[Arm], bench: Bench, rounding: str) -> dict[str, Any]:
    """Check that all arms follow the same rule, then let them take turns."""
    arms = list(_agreeing(case, arms, bench.device))
    turns: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
    bandwidths: list[dict[str, float]] = []
    for _ in range(bench.repeats):
        bandwidths.append(bench.bandwidth())
        for arm in list(arms):
            try:
                turns[arm.name].append(bench.turn(case, arm))
            except torch.OutOfMemoryError:
                print(f"  {case.name}: {arm.name} does not fit into memory: left out")
                arms.remove(arm)
                del turns[arm.name]
            bench.free()
    return {
        "bytes": case.bytes(rounding), "bandwidth": bandwidths,
        "auto": next((arm.name for arm in arms if arm.auto), None),
        "arms": {name: {key: [turn[key] for turn in found] for key in found[0]} for name, found in turns.items()},
    }


def floors(results: dict[str, dict[str, Any]], numbers: int, *, steady: bool) -> None:
    """Add each rule's floor, round by round; of a steady bandwidth the highest that was seen is the bound."""
    seen = {name: [max(each.values()) for each in found["bandwidth"]] for name, found in results.items()}
    highest = max(max(bandwidths) for bandwidths in seen.values())
    for name, found in results.items():
        found["floor_ms"] = [found["bytes"] * numbers / (highest if steady else bandwidth) * 1e3
                             for bandwidth in seen[name]]


def _agreeing(case: Case, arms: list[Arm], device: torch.device) -> Iterator[Arm]:
    for arm in arms:
        try:
            difference = agreement(case, arm, device)
        except Exception as error:
            if arm.ours:
                raise
            print(f"  {case.name}: {arm.name} fails and is left out: {type(error).__name__}: {error}")
            continue
        if difference <= _AGREE_WITHIN:
            yield arm
        elif arm.ours:
            raise SystemExit(f"{case.name}: {arm.name} is not the rule: it differs by {difference:.1e} of the movement")
        else:
            print(f"  {case.name}: {arm.name} follows another formula (differs by {difference:.1e}) and is left out")


# --- the report -----------------------------------------------------------------------------------


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def ratios(over: list[float], under: list[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """Our engine and the fastest library, with their ratios round by round."""
    arms = found["arms"]
    libraries = [name for name in arms if not name.startswith("collie_lab")]
    best = min(libraries, key=lambda name: statistics.median(arms[name]["ms"]), default=None)
    ours = arms[found["auto"]]["ms"] if found["auto"] else None
    return {
        "best_library": best, "over_floor": ratios(ours, found["floor_ms"]) if ours else None,
        "over_library": ratios(ours, arms[best]["ms"]) if ours and best else None,
        "library_over_its_floor": [ms / floor * found["bytes"] / own for ms, floor, own in zip(
            arms[best]["ms"], found["floor_ms"], arms[best]["bytes"], strict=True)] if best else None,
    }


def report(title: str, results: dict[str, dict[str, Any]]) -> None:
    """The table of one section, then all arms."""
    rows = [("rule", "B/param", "floor ms", "collie_lab ms", "engine", "× floor", "best library", "ms", "B/param",
             "× its floor", "ours ÷ theirs")]
    for name, found in results.items():
        best, ours, arms = found["best_library"], found["auto"], found["arms"]
        theirs = (best, spread(arms[best]["ms"], 1), f"{arms[best]['bytes'][0]:.0f}",
                  spread(found["library_over_its_floor"], 2)) if best else ("none here", "", "", "")
        rows.append((
            name, str(found["bytes"]), f"{statistics.median(found['floor_ms']):.1f}",
            spread(arms[ours]["ms"], 1) if ours else "no memory", ours.split()[-1] if ours else "",
            spread(found["over_floor"], 2) if ours else "", *theirs,
            spread(found["over_library"], 2) if found["over_library"] else ""))
    print(f"\n{title}; median (min–max)")
    for row in rows:
        print("  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, _widths(rows), strict=True)).rstrip())
    print("\n  all arms, ms a step; on a GPU also GB of temporaries")
    for name, found in results.items():
        for arm, values in found["arms"].items():
            memory = f"  {max(values['temporaries']) / 1e9:7.2f} GB" if "temporaries" in values else ""
            print(f"  {name:14} {arm:34} {spread(values['ms'], 1)}{memory}", flush=True)


def _widths(rows: list[tuple[str, ...]]) -> list[int]:
    return [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]


# --- all of it ------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Every section (a type and a rounding), every rule."""
    bench = Bench(options.model, {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype], device,
                  options.repeats, options.steps)
    print(f"{options.model}: {bench.numbers:,} parameters in {len(bench.weights)} tensors, "
          f"{options.repeats} rounds of {options.steps} steps", flush=True)
    for package in library_arms(CASES[0], device)[1]:
        print(f"{package} is not installed: left out")
    sections = {}
    for rounding in ("exact",) if options.dtype == "fp32" else options.rounding:
        results: dict[str, dict[str, Any]] = {}
        for case in [case for case in CASES if not options.rules or case.name in options.rules]:
            arms = [*our_arms(case, device, rounding, in_backward=options.in_backward,
                              only_auto=options.quick), *library_arms(case, device)[0]]
            results[case.name] = compare(case, arms, bench, rounding)
        floors(results, bench.numbers, steady=device.type == "cuda")
        results = {name: found | summarize(found) for name, found in results.items()}
        name = options.dtype if rounding == "exact" else f"{options.dtype}, {rounding}"
        bandwidth = {kind: [each[kind] / 1e9 for found in results.values() for each in found["bandwidth"]]
                     for kind in ("copy", "in place")}
        report(f"{name}: {' and '.join(f'{kind} {spread(found, 1)} GB/s' for kind, found in bandwidth.items())}",
               results)
        sections[name] = results
    return {"model": options.model, "parameters": bench.numbers, "tensors": len(bench.weights),
            "dtype": options.dtype, "rounds": options.repeats, "steps": options.steps, "sections": sections}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small tensors, one round, one engine: does it run?")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--figure", type=Path, help="draw them into this file (.png, .svg, .pdf)")
    parser.add_argument("--draw", type=Path, help="draw this JSON file and measure nothing")
    parser.add_argument("--model", choices=("50m", *SHAPES), help="whose tensors; 50m, on a GPU llama-1b")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the weights; fp32, on a GPU bf16")
    parser.add_argument("--rounding", nargs="+", choices=("stochastic", "kahan", "master"),
                        default=("stochastic", "master"), help="how ours keeps bf16 weights")
    parser.add_argument("--rules", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--in-backward", action="store_true",
                        help="one more arm: our hooks in backward, called one after the other without a backward pass")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, help="rounds; 7, with --quick 1")
    parser.add_argument("--steps", type=int, help="in a turn; 3, on a GPU 10, with --quick 1")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    options = parser.parse_args()
    content = json.loads(options.draw.read_text(encoding="utf-8")) if options.draw else run(options)
    if options.json and not options.draw:
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.figure:
        from _optimizers_figure import draw

        draw(content, options.figure)


def run(options: argparse.Namespace) -> dict[str, Any]:
    warnings.filterwarnings("ignore", message="SophiaG's Hessian")  # prescribed gradients have none
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    torch.set_num_threads(options.threads)
    options.dtype = options.dtype or ("bf16" if gpu else "fp32")
    options.model = options.model or ("quick" if options.quick else "llama-1b" if gpu else "50m")
    options.repeats = options.repeats or (1 if options.quick else 7)
    options.steps = options.steps or (1 if options.quick else 10 if gpu else 3)
    environment = {**machine(), "device": str(device), "libraries": dict(map(_version, _PACKAGES))}
    print(json.dumps(environment, indent=1))
    return {"environment": environment, "results": measure(options, device)}


def _version(package: str) -> tuple[str, str | None]:
    try:
        return package, version(package)
    except PackageNotFoundError:
        return package, None


if __name__ == "__main__":
    main()
