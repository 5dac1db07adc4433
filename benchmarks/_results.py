"""What the benchmarks say of the machine, and how they keep what they found."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from collie_lab.planning.calibration import processor
from collie_lab.training.provenance import provenance

__all__ = ["RESULTS", "ask_for_parts", "h200_memory", "keep", "machine"]

RESULTS = Path(__file__).parents[1] / "experiments" / "results"


def machine() -> dict[str, Any]:
    """The provenance of a run on this machine, its processor and how many cores it has."""
    return {**provenance(0), "cpu": processor(), "cores": os.cpu_count()}


def keep(file: Path | None, command: str, results: Any) -> None:
    """Write results with the command and the machine that they come from; nothing where there is no file."""
    if file is not None:
        content = {"command": f"python benchmarks/{command}", "environment": machine(), "results": results}
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def ask_for_parts(description: str, parts: Iterable[str]) -> tuple[list[str], Path | None, dict[str, Any]]:
    """What the command line asks for: parts, by default all, and a file for results; and the results that are in it,
    for parts that are not asked for stay."""
    parser, names = argparse.ArgumentParser(description=description), list(parts)
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    there = options.json is not None and options.json.is_file()
    return options.parts, options.json, json.loads(options.json.read_text(encoding="utf-8"))["results"] if there else {}


def h200_memory() -> dict[str, dict[str, Any]]:
    """What gpu_memory.py found on one H200, by model and method."""
    files = [RESULTS / f"gpu_h200_memory_{size}.json" for size in ("1b", "7b")]
    return {f"{row['model']}, {row['method']}": row
            for file in files for row in json.loads(file.read_text(encoding="utf-8"))["results"]
            if not row.get("out_of_memory")}
