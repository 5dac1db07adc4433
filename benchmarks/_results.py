"""What the benchmarks say of the machine, and how they keep what they found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from collie_lab.planning.calibration import processor
from collie_lab.training.provenance import provenance

__all__ = ["keep", "machine"]


def machine() -> dict[str, Any]:
    """The provenance of a run on this machine, its processor and how many cores it has."""
    return {**provenance(0), "cpu": processor(), "cores": os.cpu_count()}


def keep(file: Path | None, command: str, results: Any) -> None:
    """Write results with the command and the machine that they come from; nothing where there is no file."""
    if file is not None:
        content = {"command": f"python benchmarks/{command}", "environment": machine(), "results": results}
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
