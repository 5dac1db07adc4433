"""What a rank of a pool keeps of the last model: its part of the first weights, in the host's memory.

Variants of an experiment mostly begin with the same weights. A process of its own, which runs once, keeps nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from collie_lab.cells import Model
from collie_lab.data import Extension
from collie_lab.training.memory import uncounted

__all__ = ["keep", "recall", "remember"]

#: The share of the host's free memory that the ranks of a machine may keep together.
_SHARE: Final = 0.25

Origin = tuple[Model, Extension | None]
"""What weights come from, apart from the seed."""

_keeps = False
_key = ""
_values: dict[str, Tensor] = {}


def keep() -> None:
    """Have `remember` keep models from now on."""
    global _keeps
    _keeps = True


def recall(model: nn.Module, origin: Origin, seed: int, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Give `parameters`, and all buffers of `model`, their first values, if this was the last model that was filled.

    On all ranks together: it is so on all of them, or on none.
    """
    known = bool(_values) and _key == _key_of(model, origin, seed, parameters)
    if _keeps and dist.is_initialized():
        agreed: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(agreed, known)
        known = all(agreed)
    if known:
        with torch.no_grad():
            for name, values in _locals(model, parameters).items():
                values.copy_(_values[name])
    return known


def remember(model: nn.Module, origin: Origin, seed: int, parameters: Mapping[str, nn.Parameter]) -> None:
    """Keep first values for the next `recall`, where they have room, instead of those before."""
    global _key, _values
    if not _keeps:
        return
    _key, _values = "", {}
    tensors = _locals(model, parameters)
    size = sum(values.nbytes for values in tensors.values()) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if size < _SHARE * psutil.virtual_memory().available:
        _key = _key_of(model, origin, seed, parameters)
        with uncounted():
            _values = {name: values.to("cpu", copy=True) for name, values in tensors.items()}


def _locals(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """This rank's pieces of the parameters, and the buffers."""
    tensors: dict[str, Tensor] = {**dict(model.named_buffers()), **parameters}
    return {name: (values.to_local() if isinstance(values, DTensor) else values).detach()
            for name, values in tensors.items()}


def _key_of(model: nn.Module, origin: Origin, seed: int, parameters: Mapping[str, nn.Parameter]) -> str:
    """All that the values depend on: the cell, the state of its files, the seed, buffers and this rank's pieces."""
    cell, _ = origin
    facts: list[Any] = [repr(origin), seed if cell.init == "random" else None]
    folder = Path(cell.source).expanduser()
    if cell.init == "pretrained" and folder.is_dir():
        facts += sorted((file.name, state.st_ino, state.st_size, state.st_mtime_ns)
                        for file in folder.iterdir() for state in [file.stat()])
    facts += [(name, buffer.shape, buffer.dtype) for name, buffer in model.named_buffers()]
    for name, values in parameters.items():
        place = (values.placements, values.device_mesh.shape, values.device_mesh.get_coordinate()) \
            if isinstance(values, DTensor) else ()
        facts.append((name, values.shape, values.dtype, place))
    return repr(facts)
