"""Grids of toy arms, and programs that stand for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.processes import MARK

__all__ = ["ROOT", "diary", "fake_command", "start", "toy_grid"]

ROOT = Path(__file__).resolve().parents[2]


def toy_grid(seeds: Iterable[int], **keys: Any) -> dict[str, Any]:
    """An arm for each seed; by `tests.study.ranks` the seed says what goes wrong."""
    training = {"steps": 3, "batch_size": 1, "export": False, **keys.pop("training", {})}
    base = {"model": "llama-tiny", "data": {"kind": "random_tokens", "length": 16, "documents": 16},
            "training": training, "runner": "tests.study.ranks"}
    return {"name": "toy", "base": base, "seeds": [*seeds], **keys}


def fake_command(folder: Path) -> list[str]:
    """Stands for `collie_lab.study.executor.command`: no kernel, no ranks."""
    return [sys.executable, "-S", str(Path(__file__).with_name("fake_arm.py")), str(folder)]


def diary(folder: Path) -> list[str]:
    """What a fake arm did."""
    path = folder / "diary"
    return path.read_text().splitlines() if path.exists() else []


def start(mark: str, *command: str) -> subprocess.Popen[bytes]:
    """A Python process that carries a mark."""
    env = {**os.environ, MARK: mark, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
