"""What a study adds to each of its arms: seconds and processor seconds beyond those of the bare run.

    python benchmarks/grid.py [--json FILE] [--repeats 5] [--arms 3]

*Study*: `study.run()` on a grid of so many arms, one at a time: for each a process, its kernel, a notebook executed by
papermill with its panel and figure, the verdict, the provenance. *Bare*: the same experiments, each in a Python process
that launches it and reads its summary. Neither makes plans. Both in turn, so often.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}

from _results import keep

import collie_lab as lab

_BARE = """
import sys, collie_lab as lab
lab.Experiment.from_yaml(sys.argv[1]).launch(folder=sys.argv[2], show=False, plan=False).summary
"""


def _grid(arms: int) -> dict[str, Any]:
    """Steps that take no time to speak of: what is left is the machinery."""
    return {"name": "overhead", "seeds": [*range(arms)], "base": {
        "model": "llama-tiny", "data": {"kind": "random_tokens", "length": 16},
        "training": {"steps": 3, "batch_size": 1, "export": False}}}


def _study(place: Path, arms: int) -> None:
    frame = lab.Study(_grid(arms), results=place / "results").run(progress=False)
    assert set(frame["status"]) == {"ok"}


def _bare(place: Path, arms: int) -> None:
    for arm in lab.Study(_grid(arms), results=place / "results").arms:
        arm.experiment.to_yaml(place / "experiment.yaml")
        subprocess.run([sys.executable, "-c", _BARE, str(place / "experiment.yaml"), str(place / "runs")], check=True)


def _timed(action: Any, arms: int) -> dict[str, float]:
    """Seconds an arm, and processor seconds of all processes that were begun."""
    with tempfile.TemporaryDirectory() as place:
        before, began = _processor_seconds(), time.perf_counter()
        action(Path(place), arms)
        return {"seconds": (time.perf_counter() - began) / arms, "cpu": (_processor_seconds() - before) / arms}


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--arms", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for repeat in range(options.repeats):
        pair = {"bare": _timed(_bare, options.arms), "study": _timed(_study, options.arms), "load": os.getloadavg()[0]}
        found.append(pair)
        print(f"{repeat + 1}/{options.repeats}: {pair}", flush=True)
    print("\n| an arm | bare run | study | beyond (min–max) |\n|---|---|---|---|")
    for key, name in (("seconds", "seconds"), ("cpu", "processor seconds")):
        bare, study = ([pair[kind][key] for pair in found] for kind in ("bare", "study"))
        beyond = [more - less for less, more in zip(bare, study, strict=True)]
        print(f"| {name} | {statistics.median(bare):.2f} | {statistics.median(study):.2f} | "
              f"{statistics.median(beyond):.2f} ({min(beyond):.2f}–{max(beyond):.2f}) |")
    keep(options.json, f"grid.py --repeats {options.repeats} --arms {options.arms}", found)


if __name__ == "__main__":
    main()
