"""Checkpoints by `torch.distributed.checkpoint`: tensors only, whole or not there, no pickle trusted.

A checkpoint holds the trained weights, the optimizer's state by parameter name and every rank's random
state, and beside them a JSON file with the step. What is frozen is not kept: the model cell makes it again.
"""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from collie_lab.folder import checkpoints_in, read_json, write_json
from collie_lab.optim import RuleOptimizer

__all__ = ["load_checkpoint", "save_checkpoint"]

_NORM = "norm"

_SAFE_MODULES = ("torch.distributed.checkpoint.", "torch.distributed.checkpoint", "collections", "pathlib")
_SAFE_NAMES = {("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("builtins", "set")}


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int,
                    identity: dict[str, Any]) -> Path:
    """Write `folder/step-<step>` on all ranks together and remove all but the newest `keep`.

    `identity` is what a run that resumes from it must share; it stands in `state.json`.
    """
    final = folder / f"step-{step:06d}"
    partial = folder / f".{final.name}.partial"
    rank, world = _rank_and_world()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    _barrier()
    state = {**_model_state(model), **_optimizer_state(model, optimizer), **_random_state(rank)}
    save(state, checkpoint_id=partial, no_dist=world == 1)
    if rank == 0:
        write_json(partial / "state.json", {"step": step, "world_size": world, "identity": identity})
        if final.exists():  # written before, by the run that this one resumed
            shutil.rmtree(final)
        partial.rename(final)
        for old in checkpoints_in(folder)[:-keep]:
            shutil.rmtree(old)
    _barrier()
    return final


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore weights, optimizer state and random state in place; the step at which it was written.

    Another number of ranks, or another sharding, than the one that wrote it is fine; the random state is
    then left as it is.

    Raises:
        ValueError: the checkpoint belongs to another model or optimizer.
    """
    rank, world = _rank_and_world()
    reader = _SafeReader(path)
    stored = reader.read_metadata().state_dict_metadata
    wanted = _model_state(model)
    if missing := [name for name in wanted if name not in stored]:
        raise ValueError(f"{path} has no {missing[0]!r} (and {len(missing) - 1} more): "
                         "it was written for another model or adapter")
    state: dict[str, Any] = {**wanted, **_wanted_optimizer_state(model, optimizer, stored, path)}
    random_state = {name: value for name, value in _random_state(rank).items() if name in stored}
    same_world = read_json(path / "state.json")["world_size"] == world
    if same_world:
        state |= random_state
    load(state, storage_reader=reader, no_dist=world == 1)
    _set_optimizer_state(model, optimizer, state)
    if same_world:
        _set_random_state(rank, state)
    return int(read_json(path / "state.json")["step"])


def _model_state(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()
            if parameter.requires_grad}


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state = {f"optimizer.{names[parameter]}|{key}": value
             for parameter, entries in optimizer.state.items() for key, value in entries.items() if value is not None}
    if isinstance(optimizer, RuleOptimizer) and optimizer.norm is not None:
        state[_NORM] = optimizer.norm  # the next gradient may be clipped by it
    return state


def _wanted_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, Any],
                            path: Path) -> dict[str, Tensor]:
    """Tensors to load into: a rule's own states, in place; for other optimizers new ones."""
    if not isinstance(optimizer, RuleOptimizer):
        return _empty_optimizer_state(model, stored)
    state = _optimizer_state(model, optimizer)
    saved = {name for name in stored if name.startswith("optimizer.")}
    if differing := sorted(state.keys() ^ saved):
        raise ValueError(f"{path} and the optimizer differ in {differing[0]!r}: "
                         "it was written for another optimizer or rounding")
    if _NORM in stored:
        device = next(model.parameters()).device
        state[_NORM] = torch.zeros((), dtype=stored[_NORM].properties.dtype, device=device)
    return state


def _empty_optimizer_state(model: nn.Module, stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """Laid out as their parameter where they have its shape."""
    parameters = dict(model.named_parameters())
    state = {}
    for name, meta in stored.items():
        if name.startswith("optimizer.") and isinstance(meta, TensorStorageMetadata):
            parameter = parameters[name.removeprefix("optimizer.").split("|")[0]]
            dtype = meta.properties.dtype
            like = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            # Step counts, scalars, stay with the host, as torch's own optimizers keep them.
            other = torch.zeros(meta.size, dtype=dtype, device=parameter.device if meta.size else None)
            state[name] = like if parameter.shape == meta.size else other
    return state


def _set_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    if isinstance(optimizer, RuleOptimizer):
        optimizer.set_norm(state.get(_NORM))
        return
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        if name.startswith("optimizer."):
            parameter, key = name.removeprefix("optimizer.").split("|")
            optimizer.state[parameters[parameter]][key] = value


def _random_state(rank: int) -> dict[str, Tensor]:
    state = {f"random.{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"random.{rank}.cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(rank: int, state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state[f"random.{rank}.cpu"])
    if f"random.{rank}.cuda" in state:
        torch.cuda.set_rng_state(state[f"random.{rank}.cuda"])


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _SAFE_MODULES or module.startswith(_SAFE_MODULES[0]) or (module, name) in _SAFE_NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a checkpoint's metadata may not name {module}.{name}")


class _SafeReader(FileSystemReader):
    """Reads the metadata, which torch pickles, with nothing allowed but the classes that belong there."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        data = (Path(self.path) / ".metadata").read_bytes()
        metadata: Metadata = _SafeUnpickler(io.BytesIO(data)).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()  # type: ignore[attr-defined]
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


def _rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
