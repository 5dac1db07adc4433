"""A catalogue of GPUs: what a data sheet says of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from collie_lab.cells import CellError, Problem
from collie_lab.check import visible_gpus

__all__ = ["GPU", "GPUS", "find_gpu", "on_machine"]

_GIB: Final = 2**30


@dataclass(frozen=True)
class GPU:
    """One kind of GPU; make your own for one that is not in `GPUS`.

    Attributes:
        memory: bytes that a process can have.
        bandwidth: of its memory, bytes a second.
        flops: dense bf16 (V100: fp16) peak of its tensor cores, a second.
        link: to the other GPUs of the machine, bytes a second in one direction.
        workspace: bytes that cuBLAS takes from torch's allocator; 71 MB were measured on an H200 (torch 2.11).
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    link: float
    workspace: int = 2 * 8_519_680


#: Vendors' data sheets; `link` is NVLink where there is one, else PCIe.
GPUS: Final[dict[str, GPU]] = {gpu.name: gpu for gpu in (
    GPU("H200", 139 * _GIB, 4.8e12, 989e12, 450e9, workspace=2 * 32 * 2**20),
    GPU("H100", 79 * _GIB, 3.35e12, 989e12, 450e9, workspace=2 * 32 * 2**20),
    GPU("A100", 79 * _GIB, 2.04e12, 312e12, 300e9),
    GPU("A100-40GB", 39 * _GIB, 1.56e12, 312e12, 300e9),
    GPU("A800", 79 * _GIB, 2.04e12, 312e12, 200e9),
    GPU("L40S", 44 * _GIB, 0.86e12, 362e12, 32e9),
    GPU("RTX 4090", 47 * _GIB // 2, 1.01e12, 165e12, 32e9),
    GPU("RTX 3090", 47 * _GIB // 2, 0.94e12, 71e12, 32e9),
    GPU("V100", 31 * _GIB, 0.9e12, 125e12, 150e9),
)}


def find_gpu(gpu: GPU | str) -> GPU:
    """The entry of a name, however it is written: `h200`, `RTX-3090`, `3090`.

    Raises:
        CellError: none, or several, of that name.
    """
    if isinstance(gpu, GPU):
        return gpu
    wanted = _plain(gpu)
    found = [each for each in GPUS.values() if _plain(each.name) == wanted]
    found = found or [each for each in GPUS.values() if wanted and _plain(each.name).endswith(wanted)]
    if len(found) == 1:
        return found[0]
    close = difflib.get_close_matches(gpu, GPUS, n=1)
    raise CellError([Problem("plan", "gpu", f"no GPU {gpu!r} in the catalogue",
                             f"did you mean {close[0]!r}?" if close else "there are: " + ", ".join(GPUS)
                             + "; or make one: GPU(name, memory, bandwidth, flops, link)")])


def on_machine(env: Mapping[str, Any]) -> GPU | None:
    """The entry of the GPU that a run's `env.json` names, or, where there is none yet, of this machine's first.

    None for a CPU, and for a GPU that is not in the catalogue.
    """
    name = str(env["gpu"] or "") if env else next(map(_model, visible_gpus()), "")
    words = set(re.findall(r"\w+", name.upper()))
    found = [gpu for gpu in GPUS.values() if set(re.findall(r"\w+", gpu.name.upper())) <= words]
    return max(found, key=lambda gpu: len(gpu.name), default=None)


def _model(folder: Path) -> str:
    """What the driver calls a GPU: `NVIDIA GeForce RTX 3090`."""
    text = (folder / "information").read_text(encoding="utf-8")
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("Model:")), "")


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
