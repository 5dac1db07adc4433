"""A catalogue of GPUs: what a data sheet says of them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from collie_lab.cells import CellError, Problem
from collie_lab.machine import gpu_model

__all__ = ["GPU", "GPUS", "find_gpu", "gpu_of_device", "on_machine"]

_GIB: Final = 2**30


@dataclass(frozen=True)
class GPU:
    """One kind of GPU; make your own for one that is not in `GPUS`, or change one: `dataclasses.replace`.

    Attributes:
        memory: bytes that a process can have.
        bandwidth: of its memory, bytes a second.
        flops: dense 16-bit peak of its tensor cores (bf16; fp16 where there is none), a second. MFU refers to it.
        link: to the other GPUs of the machine, bytes a second in one direction.
        workspace: bytes that cuBLAS takes from torch's allocator; 71 MB were measured on an H200 (torch 2.11).
        fp32: peak without tensor cores, a second: torch's fp32 products use no TF32 unless told to. None: not known.
        bf16: whether it computes in bf16.
        network: its share of the link to other machines, bytes a second in one direction.
        per_machine: GPUs of a machine.

    Raises:
        CellError: a figure that no GPU has.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    link: float
    workspace: int = 2 * 8_519_680
    fp32: float | None = None
    bf16: bool = True
    network: float = 25e9
    per_machine: int = 8

    def __post_init__(self) -> None:
        known = [*_FIGURES, *(["fp32"] if self.fp32 is not None else [])]
        problems = [Problem("GPU", name, f"{getattr(self, name)!r} is no such figure of a GPU", "a number above 0")
                    for name in known if not _positive(getattr(self, name))]
        if problems:
            raise CellError(problems)

    def peak(self, dtype: str) -> float | None:
        """FLOP/s of matrix products of a type: `bf16`, `fp16` or `fp32`; None where it has none, or it is not known."""
        if dtype == "fp32":
            return self.fp32
        return self.flops if dtype == "fp16" or (dtype == "bf16" and self.bf16) else None


#: What every GPU has more than none of.
_FIGURES: Final = ("memory", "bandwidth", "flops", "link", "network", "per_machine")


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


_HOPPER: Final = 2 * 32 * 2**20  # cuBLAS's workspace from compute capability 9.0 on

#: Vendors' data sheets, dense (half of what they print "with sparsity"); of GeForce and RTX cards NVIDIA's whitepapers,
#: with fp32 accumulation. `link` is NVLink or Infinity Fabric where there is one, else PCIe: in one direction, half of
#: what the sheets print. `network`: 400 Gb/s a GPU where machines are sold so (H100 and later on DGX and HGX boards),
#: 200 Gb/s with A100s, else 100 Gb/s for the machine.
GPUS: Final[dict[str, GPU]] = {gpu.name: gpu for gpu in (
    GPU("B200", 179 * _GIB, 8.0e12, 2250e12, 900e9, _HOPPER, 75e12, network=50e9),
    GPU("H200", 139 * _GIB, 4.8e12, 989e12, 450e9, _HOPPER, 67e12, network=50e9),
    GPU("H200 NVL", 139 * _GIB, 4.8e12, 835e12, 450e9, _HOPPER, 60e12),
    GPU("H100", 79 * _GIB, 3.35e12, 989e12, 450e9, _HOPPER, 67e12, network=50e9),
    GPU("H100 NVL", 93 * _GIB, 3.9e12, 835e12, 300e9, _HOPPER, 60e12),
    GPU("H100 PCIe", 79 * _GIB, 2.0e12, 756e12, 64e9, _HOPPER, 51e12),
    GPU("H20", 95 * _GIB, 4.0e12, 148e12, 450e9, _HOPPER, 44e12, network=50e9),
    GPU("H800", 79 * _GIB, 3.35e12, 989e12, 200e9, _HOPPER, 67e12, network=50e9),
    GPU("A100", 79 * _GIB, 2.04e12, 312e12, 300e9, fp32=19.5e12),
    GPU("A100-40GB", 39 * _GIB, 1.56e12, 312e12, 300e9, fp32=19.5e12),
    GPU("A800", 79 * _GIB, 2.04e12, 312e12, 200e9, fp32=19.5e12),
    GPU("A40", 44 * _GIB, 0.696e12, 150e12, 32e9, fp32=37.4e12, network=1.6e9),
    GPU("A10", 22 * _GIB, 0.6e12, 125e12, 32e9, fp32=31.2e12, network=1.6e9),
    GPU("A10G", 22 * _GIB, 0.6e12, 70e12, 32e9, fp32=35e12, network=1.6e9),
    GPU("A6000", 47 * _GIB, 0.768e12, 155e12, 32e9, fp32=38.7e12, network=1.6e9),
    GPU("RTX 6000 Ada", 47 * _GIB, 0.96e12, 364e12, 32e9, fp32=91.1e12, network=1.6e9),
    GPU("L40S", 44 * _GIB, 0.86e12, 362e12, 32e9, fp32=91.6e12, network=1.6e9),
    GPU("L4", 22 * _GIB, 0.3e12, 121e12, 32e9, fp32=30.3e12, network=1.6e9),
    GPU("RTX 5090", 31 * _GIB, 1.79e12, 209e12, 64e9, fp32=105e12, network=1.6e9),
    GPU("RTX 4090", 47 * _GIB // 2, 1.01e12, 165e12, 32e9, fp32=82.6e12, network=1.6e9),
    GPU("RTX 3090", 47 * _GIB // 2, 0.94e12, 71e12, 32e9, fp32=35.6e12, network=1.6e9),
    GPU("V100", 31 * _GIB, 0.9e12, 125e12, 150e9, fp32=15.7e12, bf16=False, network=12.5e9),
    GPU("V100-16GB", 31 * _GIB // 2, 0.9e12, 125e12, 150e9, fp32=15.7e12, bf16=False, network=12.5e9),
    GPU("T4", 29 * _GIB // 2, 0.32e12, 65e12, 16e9, fp32=8.1e12, bf16=False, network=1.6e9),
    GPU("MI300X", 191 * _GIB, 5.3e12, 1307e12, 448e9, fp32=163e12, network=50e9),
    GPU("MI250X", 63 * _GIB, 1.6e12, 192e12, 100e9, fp32=47.9e12),
)}


#: What a name may have beside the model: makers, families and boards.
_BESIDE: Final = re.compile(r"NVIDIA|AMD|TESLA|GEFORCE|QUADRO|INSTINCT|GENERATION|RTX|SXM\d?|HBM\d?E?|[^A-Z0-9]")
_SIZE: Final = re.compile(r"\b(\d+) ?G(?:I?B)?\b")
#: GB in a name are all that the chips have: up to so much more than a process can have in GiB.
_ALL: Final = 1.125


def find_gpu(gpu: GPU | str) -> GPU:
    """The entry of a name, however it is written: `h200`, `RTX-3090`, `3090`, `A100 80GB`, `NVIDIA H100 80GB HBM3`.

    Raises:
        CellError: none of that name, or none with the memory that it tells; no name at all.
    """
    if isinstance(gpu, GPU):
        return gpu
    own = "GPU(name, memory, bandwidth, flops, link)"
    if not isinstance(gpu, str):
        raise CellError([Problem("plan", "gpu", f"{gpu!r} is no GPU",
                                 f'a name of `lab.GPUS`, as "H100", or one of your own: {own}')])
    of_model = _of_model(gpu)
    found = _with_memory(of_model, gpu)
    if found is not None:
        return found
    if of_model:
        there = ", ".join(f"{each.name} ({each.memory / 1e9:.0f} GB for a process)" for each in of_model)
        raise CellError([Problem("plan", "gpu", f"no GPU {gpu!r} of this memory in the catalogue",
                                 f"there are: {there}; another memory: dataclasses.replace(lab.GPUS"
                                 f"[{of_model[0].name!r}], memory=...)")])
    close = difflib.get_close_matches(_model(gpu), models := [_model(name) for name in GPUS], n=1)
    raise CellError([Problem("plan", "gpu", f"no GPU {gpu!r} in the catalogue",
                             f"did you mean {list(GPUS)[models.index(close[0])]!r}?" if close
                             else "there are: " + ", ".join(GPUS) + f"; or make one: {own}")])


def on_machine(env: Mapping[str, Any]) -> GPU | None:
    """The entry of the GPU that a run's `env.json` names, or, where there is none yet, of this machine's first.

    None for a CPU, and for a GPU that is not in the catalogue.
    """
    return gpu_of_device(str(env["gpu"] or "") if env else gpu_model())


def gpu_of_device(name: str) -> GPU | None:
    """The entry of what the driver calls `NVIDIA A100-SXM4-40GB`; None for one that is not in the catalogue."""
    return _with_memory(_of_model(name), name)


def _of_model(name: str) -> list[GPU]:
    """The entries of a model. That a card is for PCIe counts where the catalogue has this card apart."""
    model = _model(name)
    for wanted in (model, model.replace("PCIE", "")):
        if found := [gpu for gpu in GPUS.values() if _model(gpu.name) == wanted]:
            return found
    return []


def _with_memory(of_model: list[GPU], name: str) -> GPU | None:
    """The one that has the memory that a name tells; the first where it tells none."""
    sizes = [int(size) * _GIB for size in _SIZE.findall(_upper(name))]
    return next((gpu for gpu in of_model if all(gpu.memory <= size < _ALL * gpu.memory for size in sizes)), None)


def _model(name: str) -> str:
    """What is left of a name without makers, boards and memory: `A100` of `NVIDIA A100-SXM4-80GB`."""
    return _BESIDE.sub("", _SIZE.sub("", _upper(name)))


def _upper(name: str) -> str:
    return name.upper().replace("_", " ")
