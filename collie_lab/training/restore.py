"""Going on from a checkpoint: each rank reads the slices that it holds, in whatever layout they were written."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from collie_lab.folder import read_json
from collie_lab.optim import RuleOptimizer
from collie_lab.training._safe_reader import SafeReader
from collie_lab.training._state import (
    NORM,
    model_state,
    optimizer_state,
    parameter_of,
    random_state,
    rank_and_world,
)

__all__ = ["load_checkpoint"]


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *,
                    layout: Mapping[str, int] | None = None, seed: int = 0) -> int:
    """Restore weights, optimizer state and random state in place; the step at which it was written.

    All ranks together. They may be more or fewer than those that wrote it, and sharded otherwise. The random
    state is restored where `layout` and the number of ranks are those of the checkpoint; elsewhere it is
    seeded anew from `seed`, this rank's own, and the step. Nothing is changed unless all ranks can load all.

    Raises:
        ValueError: the checkpoint belongs to another model or optimizer, or is damaged.
    """
    rank, world = rank_and_world()
    header = read_json(path / "state.json")
    same_layout = (header.get("world_size"), header.get("layout", {})) == (world, dict(layout or {}))
    reader, state, problem = SafeReader(path), dict[str, Any](), None
    stored: Mapping[str, Any] = {}
    try:
        if "step" not in header:
            raise ValueError(f"{path} has no state.json: it is no checkpoint of a run")
        metadata = reader.read_metadata()
        stored = metadata.state_dict_metadata
        state = {**_wanted_model_state(model, stored, path),
                 **_wanted_optimizer_state(model, optimizer, stored, path)}
        if same_layout:
            state |= {name: value for name, value in random_state(rank).items() if name in stored}
        _check_shapes(state, stored, path)
        reader.check_files(metadata)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        problem = error
    _agree(problem, model_state(model).keys(), stored, path)
    with warnings.catch_warnings():  # each rank reads for itself; that is no lack of torch.distributed
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(state, storage_reader=reader, no_dist=True)
    _set_optimizer_state(model, optimizer, state)
    torch.manual_seed(int(np.random.default_rng([seed, header["step"]]).integers(2**63)))
    if f"random.{rank}.cpu" in state:  # of a GPU too, if it was written on one
        _set_random_state(rank, state)
    return int(header["step"])


def _wanted_model_state(model: nn.Module, stored: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    wanted = model_state(model)
    if missing := [name for name in wanted if name not in stored]:
        raise ValueError(f"{path} has no {missing[0]!r} (and {len(missing) - 1} more): "
                         "it was written for another model or adapter")
    return wanted


def _wanted_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, Any],
                            path: Path) -> dict[str, Tensor]:
    """Tensors to load into: a rule's own states, in place; for other optimizers new ones.

    Of the stored states those of this rank's parameters: with a pipeline, others have the rest.
    """
    parameters = dict(model.named_parameters())
    own = {name: meta for name, meta in stored.items()
           if name.startswith("optimizer.") and parameter_of(name) in parameters}
    if not isinstance(optimizer, RuleOptimizer):
        return _empty_optimizer_state(parameters, own)
    state = optimizer_state(model, optimizer)
    state.pop(NORM, None)
    if differing := sorted(state.keys() ^ own.keys()):
        raise ValueError(f"{path} and the optimizer differ in {differing[0]!r}: "
                         "it was written for another optimizer or rounding")
    if NORM in stored:
        device = next(model.parameters()).device
        state[NORM] = torch.zeros((), dtype=stored[NORM].properties.dtype, device=device)
    return state


def _empty_optimizer_state(parameters: Mapping[str, Tensor], stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """Laid out as their parameter where they have its shape."""
    state = {}
    for name, meta in stored.items():
        if isinstance(meta, TensorStorageMetadata):
            parameter, dtype = parameters[parameter_of(name)], meta.properties.dtype
            like = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            # Step counts, scalars, stay with the host, as torch's own optimizers keep them.
            other = torch.zeros(meta.size, dtype=dtype, device=parameter.device if meta.size else None)
            state[name] = like if parameter.shape == meta.size else other
    return state


def _check_shapes(state: Mapping[str, Tensor], stored: Mapping[str, Any], path: Path) -> None:
    for name, tensor in state.items():
        size = getattr(stored[name], "size", None)
        if size != tensor.shape:
            raise ValueError(f"{name!r} is {tuple(size or ())} in {path}, and {tuple(tensor.shape)} here: "
                             "it was written for another model or adapter")


def _agree(problem: Exception | None, names: Any, stored: Mapping[str, Any], path: Path) -> None:
    """Raise on all ranks what one has found; and if no rank at all has a parameter that is in the checkpoint."""
    _, world = rank_and_world()
    mine = (None if problem is None else str(problem), set(names))
    everyone: list[Any] = [mine] * world
    if world > 1:
        dist.all_gather_object(everyone, mine)
    if problem is not None:
        raise problem
    for other, (text, _) in enumerate(everyone):
        if text is not None:
            raise ValueError(f"rank {other} cannot load the checkpoint: {text}")
    saved = {name for name in stored if name.startswith("model.")}
    if unknown := sorted(saved.difference(*(theirs for _, theirs in everyone))):
        raise ValueError(f"the model has no {unknown[0]!r} (and {len(unknown) - 1} more), which is in {path}: "
                         "it was written for another model or adapter")


def _set_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    if isinstance(optimizer, RuleOptimizer):
        optimizer.set_norm(state.get(NORM))
        return
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        if name.startswith("optimizer."):
            optimizer.state[parameters[parameter_of(name)]][name.split("|")[1]] = value


def _set_random_state(rank: int, state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state[f"random.{rank}.cpu"])
    if f"random.{rank}.cuda" in state:
        torch.cuda.set_rng_state(state[f"random.{rank}.cuda"])
