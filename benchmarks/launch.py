"""Seconds from a launch to the end of the first step: new and warm ranks, beside torchrun and accelerate.

    python benchmarks/launch.py [--json FILE] [--figure FILE] [--repeats 5] [--ranks 2]

All arms train the same small model on the same tokens with the same loop; only who starts the ranks differs. Each is
called in a Python process of its own, as from a notebook's kernel, in turn with the others. *Cold* is that process's
first launch: the ranks import torch. *Warm* is a later one: in a `lab.Pool`, and with accelerate, whose ranks are
forked from a kernel that has imported everything (and that must never have touched its GPU). torchrun and accelerate
get a run folder that is ready, with tokens; ours checks, tokenizes and writes it within the time that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}

from _results import keep

import collie_lab as lab
from collie_lab.folder import RunFolder, Tail

_ROOT = Path(__file__).resolve().parents[1]
_PARTS = ("logs", "errors", "beats", "checkpoints")
_MADE = ("experiment.yaml", "launch.json", "data", "tokenizer")


def _experiment(ranks: int) -> lab.Experiment:
    return lab.Experiment(model=lab.Model("llama-1m", init="random"), parallel=lab.Parallel(dp=ranks), name="launch",
                          training=lab.Training(steps=2, batch_size=8, export=False))


def _first_step(folder: Path) -> float:
    """Unix time of the end of the first step."""
    return float(next(iter(Tail(folder / "metrics.jsonl").new()))["time"])


# --- the arms, each in a process of its own: seconds to the first step of every launch in it


def _ours(place: Path, ranks: int) -> list[float]:
    began = time.time()
    run = _experiment(ranks).launch(folder=place, show=False)
    return [_first_step(run.folder.path) - began]


def _pool(place: Path, ranks: int) -> list[float]:
    """The first counts from the making of the pool."""
    seconds, began = [], time.time()
    with lab.Pool(ranks) as pool:
        for _ in range(4):
            run = _experiment(ranks).launch(folder=place, show=False, pool=pool)
            seconds.append(_first_step(run.folder.path) - began)
            began = time.time()
    return seconds


def _torchrun(place: Path, ranks: int) -> list[float]:
    folder, began = _ready(place), time.time()
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
                    "-m", "collie_lab.training.worker", str(folder)], check=True, stderr=subprocess.DEVNULL)
    return [_first_step(folder) - began]


def _accelerate(place: Path, ranks: int) -> list[float]:
    seconds = []
    for _ in range(4):
        folder, began = _ready(place), time.time()
        from accelerate import notebook_launcher

        notebook_launcher(_train, (str(folder),), num_processes=ranks)
        seconds.append(_first_step(folder) - began)
        import collie_lab.training.trainer  # noqa: F401  (later ranks are forked with all imports)
    return seconds


def _train(folder: str) -> None:
    from collie_lab.training import worker

    worker.train(RunFolder(folder))


def _ready(place: Path) -> Path:
    """A run folder with everything that ranks need, copied from a run before."""
    source, folder = next(place.glob("launch-*")), Path(tempfile.mkdtemp(dir=place))
    for name in _MADE:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy2
        copy(source / name, folder / name)
    for name in _PARTS:
        (folder / name).mkdir()
    return folder


_ARMS: dict[str, Callable[[Path, int], list[float]]] = {
    "collie_lab": _ours, "Pool": _pool, "torchrun": _torchrun, "notebook_launcher": _accelerate,
}


# --- all of them


def measure(repeats: int, ranks: int) -> dict[str, list[list[float]]]:
    """The arms in turn, so often."""
    found: dict[str, list[list[float]]] = {name: [] for name in _ARMS}
    with tempfile.TemporaryDirectory() as place:
        _experiment(ranks).launch(folder=place, show=False)  # warms the disk's cache, and leaves a folder to copy
        for repeat in range(repeats):
            for name in _ARMS:
                output = subprocess.run([sys.executable, __file__, "--arm", name, place, "--ranks", str(ranks)],
                                        check=True, capture_output=True, text=True, cwd=_ROOT)
                found[name].append(json.loads(output.stdout.splitlines()[-1]))
                print(f"{repeat + 1}/{repeats} {name}: {[round(value, 2) for value in found[name][-1]]}", flush=True)
    return found


def arms(found: dict[str, list[list[float]]]) -> dict[str, list[float]]:
    """What is compared: cold launches, and all later ones in the same process."""
    return {
        "collie_lab, cold": [run[0] for run in found["collie_lab"]],
        "torchrun by hand, cold": [run[0] for run in found["torchrun"]],
        "notebook_launcher, cold": [run[0] for run in found["notebook_launcher"]],
        "collie_lab's Pool, warm": [value for run in found["Pool"] for value in run[1:]],
        "notebook_launcher, warm": [value for run in found["notebook_launcher"] for value in run[1:]],
    }


def report(seconds: dict[str, list[float]]) -> None:
    """A Markdown table."""
    base = statistics.median(seconds["torchrun by hand, cold"])
    print("\n| launch | s to the end of the first step (min–max) | of torchrun |\n|---|---|---|")
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:.2f} ({min(values):.2f}–{max(values):.2f}) | {middle / base:.2f} |")


def main() -> None:
    """Measure, print, keep, draw; or run one arm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        name, place = options.arm
        print(json.dumps(_ARMS[name](Path(place), options.ranks)))
        return
    found = measure(options.repeats, options.ranks)
    report(arms(found))
    keep(options.json, f"launch.py --repeats {options.repeats} --ranks {options.ranks}", found)
    if options.figure:
        from _launch_figure import draw

        draw(arms(found), options.figure)


if __name__ == "__main__":
    main()
