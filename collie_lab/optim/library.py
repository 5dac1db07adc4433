"""Optimizers of torch and of optional libraries, imported when asked for.

The libraries' own classes take the steps. What is added: between steps their states are tensors alone, which a
checkpoint can keep, where the libraries keep numbers, objects and tensors of special classes.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from collie_lab import cells

__all__ = ["Chained", "averaged", "block_matrices", "build_library_optimizer"]

Groups = list[dict[str, Any]]


def build_library_optimizer(cell: cells.LibraryOptimizer, model: nn.Module, groups: Groups) -> torch.optim.Optimizer:
    """The optimizer of a cell for `groups`, as `parameter_groups` makes them.

    Raises:
        ImportError: the library is not installed.
        ValueError: the optimizer and the model do not go together; the message says why.
    """
    name = type(cell).__name__
    if cell.in_backward:
        raise ValueError(f"{name} updates all parameters at once, after the backward pass: leave in_backward out")
    if not cell.shardable and any(isinstance(p, DTensor) for group in groups for p in group["params"]):
        raise ValueError(f"{name} cannot update sharded parameters: {cell.why_whole}. Keep them whole "
                         "(Parallel(zero=0)), or use an optimizer of collie_lab (AdaLomo, AdamW, Lion, ...)")
    match cell:
        case cells.Adafactor():
            # torch takes eps1 from the weights' type; that of bf16, .0078, would swallow every real gradient.
            return torch.optim.Adafactor(groups, lr=cell.lr, beta2_decay=cell.beta2_decay, d=cell.clip_threshold,
                                         eps=(torch.finfo(torch.float32).eps, 1e-3))
        case cells.Muon():
            return _muon(cell, model, groups)
        case cells.GaLore():
            return _galore(cell, model, groups)
        case cells.Apollo():
            return _apollo(cell, model, groups)
        case cells.ScheduleFree():
            return _schedule_free(cell, groups)
        case cells.AdamW8bit():
            return _adamw8bit(cell, groups)
    raise TypeError(f"no optimizer for the cell {name}")


class Chained(torch.optim.Optimizer):
    """Several optimizers as one: their groups one after the other, their states in one mapping.

    Groups and states are the very objects of the parts: what a scheduler or a checkpoint sets here, the parts see.
    """

    def __init__(self, *parts: torch.optim.Optimizer):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            self.state.update(part.state)
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's own; the parts share the new groups and states again."""
        super().load_state_dict(state_dict)
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            start = end


def block_matrices(model: nn.Module) -> set[Tensor]:
    """The 2-D parameters inside blocks, which are what `nn.ModuleList`s hold: no embeddings, no output head."""
    embeddings = {parameter for module in model.modules() if isinstance(module, nn.Embedding)
                  for parameter in module.parameters(recurse=False)}
    return {parameter for module in model.modules() if isinstance(module, nn.ModuleList)
            for parameter in module.parameters() if parameter.ndim == 2 and parameter not in embeddings}


def _split(cell: cells.LibraryOptimizer, model: nn.Module, groups: Groups) -> tuple[Groups, Groups]:
    """Each group in two: the matrices of the blocks and the rest; what is empty is left out."""
    matrices = block_matrices(model)
    chosen, rest = ([{**group, "params": params} for group in groups
                     if (params := [p for p in group["params"] if (p in matrices) is inside])]
                    for inside in (True, False))
    if not chosen:
        raise ValueError(f"{type(cell).__name__} is for the matrices of blocks, and none is trained: the model has no "
                         "nn.ModuleList with 2-D weights. Use AdamW, or put the blocks in an nn.ModuleList")
    return chosen, rest


def _muon(cell: cells.Muon, model: nn.Module, groups: Groups) -> Chained:
    matrices, rest = _split(cell, model, groups)
    parts: list[torch.optim.Optimizer] = [torch.optim.Muon(
        matrices, lr=cell.lr, momentum=cell.momentum, nesterov=cell.nesterov, ns_steps=cell.ns_steps,
        adjust_lr_fn="match_rms_adamw")]
    if rest:
        # Not fused: its step counts would have to lie on the device, and a checkpoint returns them to the host.
        parts.append(torch.optim.AdamW(rest, lr=cell.lr, betas=cell.betas, foreach=True))
    return Chained(*parts)


def _galore(cell: cells.GaLore, model: nn.Module, groups: Groups) -> torch.optim.Optimizer:
    library = _import(cell, "galore_torch")
    projector = _import(cell, "galore_torch.galore_projector").GaLoreProjector
    matrices, rest = _split(cell, model, groups)
    low_rank = {"rank": cell.rank, "update_proj_gap": cell.update_proj_gap, "scale": cell.scale, "proj_type": "std"}
    # The notice is Hugging Face's, of the class from which the authors copied theirs.
    optimizer: torch.optim.Optimizer = library.GaLoreAdamW(
        [{**group, **low_rank} for group in matrices] + rest, lr=cell.lr, betas=cell.betas, eps=cell.eps,
        no_deprecation_warning=True)
    return _low_rank_states(optimizer, projector, low_rank)


def _apollo(cell: cells.Apollo, model: nn.Module, groups: Groups) -> torch.optim.Optimizer:
    library = _import(cell, "apollo_torch")
    projector = _import(cell, "apollo_torch.random_projector").GradientProjector
    matrices, rest = _split(cell, model, groups)
    low_rank = {"rank": cell.rank, "update_proj_gap": cell.update_proj_gap, "scale": cell.scale, "proj_type": "std"}
    own = {**low_rank, "proj": "random", "scale_type": cell.scale_type}
    optimizer: torch.optim.Optimizer = library.APOLLOAdamW(
        [{**group, **own} for group in matrices] + rest, lr=cell.lr, betas=cell.betas, eps=cell.eps)
    return _low_rank_states(optimizer, projector, low_rank)


@contextlib.contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within it the weights are those to judge a model by: Schedule-Free trains at one point, and its model is another,
    the average of its steps. All other optimizers have one point."""
    switch: Any = optimizer
    if not hasattr(optimizer, "eval"):
        yield
        return
    switch.eval()
    try:
        yield
    finally:
        switch.train()


def _schedule_free(cell: cells.ScheduleFree, groups: Groups) -> torch.optim.Optimizer:
    optimizer = _import(cell, "schedulefree").AdamWScheduleFree(
        groups, lr=cell.lr, betas=cell.betas, eps=cell.eps, warmup_steps=cell.warmup_steps)

    @contextlib.contextmanager
    def step() -> Iterator[None]:
        # The library counts per group; here one parameter of each group holds the counts.
        for group in optimizer.param_groups:
            holder: dict[str, Tensor] = next((s for p in group["params"] if "k" in (s := optimizer.state[p])), {})
            group.update({key: number.item() for key in ("k", "weight_sum", "lr_max")
                          if (number := holder.get(key)) is not None})
            group["k"] = int(group["k"])
        yield
        for group in optimizer.param_groups:
            states = [s for p in group["params"] if "z" in (s := optimizer.state[p])]
            if states:
                holder = next((s for s in states if "k" in s), states[0])
                holder.update({key: torch.tensor(group[key], dtype=torch.float64)
                               for key in ("k", "weight_sum", "lr_max")})

    optimizer.train()
    return _around_step(optimizer, step)


def _adamw8bit(cell: cells.AdamW8bit, groups: Groups) -> torch.optim.Optimizer:
    library = _import(cell, "torchao.optim")
    quantized = _import(cell, "torchao.optim.subclass_8bit").OptimState8bit
    rates = [group["lr"] for group in groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    half = any(parameter.dtype is torch.bfloat16 for parameter in parameters)
    optimizer = library.AdamW8bit(groups, lr=cell.lr, betas=cell.betas, eps=cell.eps, block_size=cell.block_size,
                                  bf16_stochastic_round=half)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate

    def pack(rates: list[float]) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for _, _, state in _states(optimizer):
            for key in ("exp_avg", "exp_avg_sq"):
                if isinstance(value := state.get(key), quantized):
                    del state[key]
                    state.update({f"{key}.{part}": getattr(value, part) for part in quantized.tensor_attrs})

    @contextlib.contextmanager
    def step() -> Iterator[None]:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = torch.as_tensor(rate, dtype=torch.float32)  # the library takes nothing else
        for _, parameter, state in _states(optimizer):
            for key in ("exp_avg", "exp_avg_sq"):
                if f"{key}.codes" in state:
                    parts = {part: state.pop(f"{key}.{part}") for part in quantized.tensor_attrs}
                    state[key] = quantized.__tensor_unflatten__(parts, (key == "exp_avg", parameter.dtype))
        with contextlib.ExitStack() as contexts:
            if parameters[0].device.type == "cpu":  # there, compiling takes longer than it saves, and needs g++
                contexts.enter_context(torch.compiler.set_stance("force_eager"))
            if half:  # replicas must round alike, and a resumed run like one that went on
                contexts.enter_context(_same_random_numbers(optimizer, parameters[0].device))
            try:
                yield
            finally:
                pack(rates)

    return _around_step(optimizer, step)


@contextlib.contextmanager
def _same_random_numbers(optimizer: torch.optim.Optimizer, device: torch.device) -> Iterator[None]:
    """Random numbers that depend on the step alone."""
    done = next((int(state["step"].item()) for _, _, state in _states(optimizer)), 0)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(done)
        yield


def _low_rank_states(optimizer: torch.optim.Optimizer, projector: Callable[..., Any],
                     options: dict[str, Any]) -> torch.optim.Optimizer:
    """Between steps, counts and seeds become 0-d tensors, projectors their matrix and seed."""

    def pack() -> None:
        for _, _, state in _states(optimizer):
            if (object_ := state.pop("projector", None)) is not None:
                state["projection"] = object_.ortho_matrix
                if hasattr(object_, "seed"):
                    state["projection_seed"] = object_.seed
            state.update({key: torch.tensor(value) for key, value in state.items() if isinstance(value, int)})

    @contextlib.contextmanager
    def step() -> Iterator[None]:
        for _, _, state in _states(optimizer):
            state.update({key: int(state[key].item()) for key in ("step", "seed", "projection_seed") if key in state})
            if "projection" in state:
                state["projector"] = object_ = projector(**options)
                object_.ortho_matrix = state.pop("projection")
                if "projection_seed" in state:
                    object_.seed = state.pop("projection_seed")
        try:
            yield
        finally:
            pack()

    pack()
    return _around_step(optimizer, step)


def _states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], Tensor, dict[str, Any]]]:
    """Group, parameter and state of all parameters that have one."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if state := optimizer.state.get(parameter):
                yield group, parameter, state


def _around_step(optimizer: Any, context: Callable[[], AbstractContextManager[None]]) -> torch.optim.Optimizer:
    """Run every step inside `context`, and let `load_state_dict` take the states as they are."""
    inner = optimizer.step

    def step(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:  # before the context, where the states are still what a checkpoint may keep
            with torch.enable_grad():
                loss = closure()
        with context():
            inner()
        return loss

    def take(self: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        # torch turns all states to the type of their parameter: codes, seeds and counts would be lost.
        loaded.clear()
        loaded.update(state_dict["state"])

    def put(self: torch.optim.Optimizer) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, state in loaded.items():
            device = parameters[index].device
            self.state[parameters[index]] = {
                key: value.clone().to(device if value.ndim else value.device) for key, value in state.items()}
        loaded.clear()

    loaded: dict[int, dict[str, Tensor]] = {}
    optimizer.step = types.MethodType(step, optimizer)  # bound, as torch's schedulers expect it
    optimizer.register_load_state_dict_pre_hook(take)
    optimizer.register_load_state_dict_post_hook(put)
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def _import(cell: cells.LibraryOptimizer, module: str) -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao tells of kernels for other machines; they are not used
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{type(cell).__name__} needs the package {cell.library} ({error}): "
                          f"pip install {cell.library}") from error
    finally:
        logging.disable(before)
