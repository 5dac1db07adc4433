"""A model's weights, read or drawn on each rank in the slices that it holds, and nowhere whole.

`blueprint` builds a model without weights: parameters on torch's meta device, buffers real. The layout cuts and
shards it. `fill` then gives every parameter that is still on meta its values, unit by unit; a unit is a repeated
block or, outside of blocks, one module's own parameters. Random values depend on the seed, the unit's name and the
device's model alone, never on the layout: every rank draws the unit whole and keeps its slice.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from collie_lab.cells import SHAPES, Model
from collie_lab.data import Extension
from collie_lab.training import last_model
from collie_lab.training.quantize import quantized_layers, set_quantized
from collie_lab.training.weight_files import Source, pretrained_source

__all__ = ["blueprint", "configuration", "copy_into", "fill", "materialise"]

_Region = tuple[slice, ...]


def blueprint(cell: Model, extension: Extension | None = None) -> PreTrainedModel:
    """The cell's causal LM without weights: parameters on meta (fp32, tied where the family ties them), buffers real.

    With an `extension` it has that many rows for tokens.

    Raises:
        ValueError: `Model.config` overrides a field that the family does not have.
    """
    config = configuration(cell)
    if extension is not None:
        config.get_text_config().vocab_size = extension.rows
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32,
                                                                  trust_remote_code=cell.trust_remote_code)
    model.tie_weights()
    if cell.init == "pretrained" and model.can_generate():
        model.generation_config = _generation_config(cell)
    return model


def fill(model: nn.Module, cell: Model, seed: int, device: torch.device, dtype: torch.dtype = torch.float32,
         extension: Extension | None = None) -> None:
    """Give every parameter of `model` that is on meta its values, on `device` in `dtype`; move the rest to `device`.

    `model` is that of `blueprint`, or what a layout made of it: modules cut out, parameters as DTensors, FSDP2, peft's
    wrapper. What is real already, an adapter say, keeps its values and type. Parameter objects may be replaced (so
    build optimizers later); ties and FSDP2's bookkeeping hold. On all ranks together.

    Raises:
        ValueError: weights that the checkpoint lacks or holds in another shape, that the family's initialisation
            leaves out, or that are none of the family's.
    """
    whole = blueprint(cell, extension)
    owners, wrapper = _canonical_names(whole), _wrapper(model)
    wanted: dict[str, list[str]] = {}  # the name in the whole model -> the names in this one
    for name, parameter in model.named_parameters(remove_duplicate=True):
        if parameter.device.type == "meta":
            plain = _plain_name(name, wrapper)
            if plain not in owners:
                raise ValueError(f"{name} has no values, and is no weight of {type(whole).__name__}")
            wanted.setdefault(owners[plain], []).append(name)
    quantized = quantized_layers(model)
    with _set_aside(quantized):
        materialise(model, _storage(device, dtype))
    mine = {name: model.get_parameter(name) for names in wanted.values() for name in names}
    # Drawing is faster on a GPU than reading from the host's memory; four-bit weights come from whole ones.
    drawn = bool(quantized) or (cell.init == "random" and device.type == "cuda")
    if not drawn and last_model.recall(model, (cell, extension), seed, mine):
        return
    ordered = {owner: wanted[owner] for owner in dict.fromkeys(owners.values()) if owner in wanted}  # unit by unit
    buffers = {_plain_name(name, wrapper): buffer for name, buffer in model.named_buffers()}
    with torch.no_grad(), _source(cell, seed, device, whole, owners, ordered, buffers, dtype, extension) as source:
        for owner, names in ordered.items():
            for name in names:
                if name in quantized:
                    set_quantized(quantized[name], source(owner)[...].to(dtype), device)
                else:
                    copy_into(source(owner), model.get_parameter(name))  # no name here, which would outlive its unit
    if drawn and device.type == "cuda":
        torch.cuda.empty_cache()  # the pieces that units were drawn in: a model may need all of the memory that is left
    elif not drawn:
        last_model.remember(model, (cell, extension), seed, mine)


def configuration(cell: Model) -> PretrainedConfig:
    """transformers' configuration of the cell's model, with what the cell overrides.

    Raises:
        ValueError: `Model.config` overrides a field that the family does not have.
    """
    if cell.is_shape:
        fields = {**SHAPES[cell.source], **cell.overrides}
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    else:
        config = AutoConfig.from_pretrained(cell.location, revision=cell.revision,
                                            trust_remote_code=cell.trust_remote_code, **cell.overrides)
    if unknown := [name for name in cell.config if not hasattr(type(config)(), name)]:
        raise ValueError(f"Model.config: {type(config).__name__} has no field {unknown[0]!r}")
    return config


def _generation_config(cell: Model) -> GenerationConfig:
    """As `from_pretrained` finds it: a file of its own, else (old checkpoints) what `config.json` says."""
    try:
        return GenerationConfig.from_pretrained(cell.location, revision=cell.revision)
    except OSError:
        return GenerationConfig.from_pretrained(cell.location, "config.json", revision=cell.revision,
                                                _from_model_config=True)


def _canonical_names(whole: PreTrainedModel) -> dict[str, str]:
    """Of every parameter's name, the first name of the same parameter; they differ for tied ones."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(parameter), name)
            for name, parameter in whole.named_parameters(remove_duplicate=False)}


def _wrapper(model: nn.Module) -> str:
    """What peft's wrapper, if there is one, puts before the names of the model in it."""
    config = getattr(model, "active_peft_config", None)
    if config is None:
        return ""
    return "base_model." if config.is_prompt_learning else "base_model.model."


def _plain_name(name: str, wrapper: str) -> str:
    """The name without what peft adds to it."""
    return re.sub(r"(\.base_layer)+\.", ".", name.removeprefix(wrapper))


def materialise(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Put `make(tensor)` in the place of every parameter and buffer. `Module.to_empty` would drop all values.

    `_apply` is the one way to do it that FSDP2 follows. It keeps ties of DTensors, and undoes those of tensors.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    model._apply(make)
    for first, *others in names.values():
        parameter = model.get_parameter(first)
        for other in others:
            module, _, leaf = other.rpartition(".")
            if model.get_parameter(other) is not parameter:
                model.get_submodule(module).register_parameter(leaf, parameter)


def _storage(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What gives storage, without values, to what is on meta; everything else moves."""
    made: dict[int, Tensor] = {}

    def make(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta":
            return tensor.to(device)
        if id(tensor) not in made:  # tied ones once
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            made[id(tensor)] = torch.empty_like(tensor, device=device, dtype=kind)
        return made[id(tensor)]

    return make


@contextlib.contextmanager
def _set_aside(layers: dict[str, Any]) -> Iterator[None]:
    """Within it the layers have no weights, and nobody makes room for them in full precision."""
    weights = {name: layer.weight for name, layer in layers.items()}
    for layer in layers.values():
        layer.weight = None
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.weight = weights[name]


def copy_into(values: Any, parameter: nn.Parameter) -> None:
    """`values` [whole shape], a tensor or a slice of a file, into this rank's part of `parameter`."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    for here, there in _regions(parameter, local.shape):
        local[here].copy_(values[there] if there else values[...])


def _regions(parameter: nn.Parameter, local_shape: torch.Size) -> list[tuple[_Region, _Region]]:
    """The rectangles of this rank's part: where each lies in the part, and where in the whole parameter."""
    sides = [_runs(_indices(parameter, dim)) for dim in range(parameter.ndim)]
    if any(sum(there.stop - there.start for _, there in side) != size
           for side, size in zip(sides, local_shape, strict=True)):
        raise RuntimeError(f"a shard of shape {tuple(local_shape)} does not follow from its placements")
    corners = itertools.product(*sides)
    return [(tuple(here for here, _ in corner), tuple(there for _, there in corner)) for corner in corners]


def _indices(parameter: nn.Parameter, dim: int) -> Tensor:
    """The indices along `dim` that this rank holds."""
    index = torch.arange(parameter.shape[dim])
    if not isinstance(parameter, DTensor):
        return index
    for mesh_dim, placement in enumerate(parameter.placements):
        if not isinstance(placement, Shard | _StridedShard) or placement.dim != dim:
            continue
        size, rank = parameter.device_mesh.size(mesh_dim), parameter.device_mesh.get_local_rank(mesh_dim)
        # FSDP2 cuts what tensor parallelism has cut before, though its mesh axis comes first: a share of every piece.
        pieces = index.chunk(int(placement.split_factor)) if isinstance(placement, _StridedShard) else (index,)
        index = torch.cat([chunk[rank] for piece in pieces if rank < len(chunk := piece.chunk(size))] or [index[:0]])
    return index


def _runs(index: Tensor) -> list[tuple[slice, slice]]:
    """Consecutive indices as slices, and where each slice lies among the indices."""
    if not len(index):
        return [(slice(0, 0), slice(0, 0))]
    breaks = [0, *((index.diff() != 1).nonzero().flatten() + 1).tolist(), len(index)]
    return [(slice(start, stop), slice(int(index[start]), int(index[start]) + stop - start))
            for start, stop in itertools.pairwise(breaks)]


@contextlib.contextmanager
def _source(cell: Model, seed: int, device: torch.device, whole: PreTrainedModel, owners: dict[str, str],
            wanted: dict[str, list[str]], buffers: dict[str, Tensor], dtype: torch.dtype,
            extension: Extension | None) -> Iterator[Source]:
    if cell.init == "random":
        # A core draws 100 million numbers a second: 65 billion would take it eleven minutes, a GPU some seconds.
        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):
            yield _Drawn(whole, seed, device if gpus else torch.device("cpu"))
    else:
        with pretrained_source(cell, whole, owners, list(wanted), buffers, dtype, extension) as source:
            yield source


class _Drawn:
    """Random weights of one unit at a time, by the family's own initialisation."""

    def __init__(self, whole: PreTrainedModel, seed: int, device: torch.device):
        self._whole, self._seed, self._device = whole, seed, device
        self._generators = [torch.default_generator]  # some families draw on the CPU whatever the device is
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index])
        self._blocks = set(whole._no_split_modules or ())
        self._unit: str | None = None
        self._modules: list[nn.Module] = []

    def __call__(self, name: str) -> Tensor:
        unit = self._unit_of(name)
        if unit != self._unit:
            self._give(lambda parameter: torch.empty_like(parameter, device="meta"))
            self._draw(unit)
        values: Tensor = self._whole.get_parameter(name).detach()
        return values

    def _unit_of(self, name: str) -> str:
        path = name.split(".")[:-1]
        prefixes = [".".join(path[:depth]) for depth in range(1, len(path) + 1)]
        return next((prefix for prefix in prefixes if self._is_block(self._whole.get_submodule(prefix))),
                    ".".join(path))

    def _is_block(self, module: nn.Module) -> bool:
        return type(module).__name__ in self._blocks

    def _draw(self, unit: str) -> None:
        """Values for a unit's parameters; NaN shows which of them nobody initialised."""
        path = unit.split(".") if unit else []
        chain = [self._whole.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1)]
        self._unit, self._modules = unit, list(chain[-1].modules()) if self._is_block(chain[-1]) else [chain[-1]]
        self._give(lambda parameter: torch.full_like(parameter, torch.nan, device=self._device))
        digest = hashlib.sha256(f"{self._seed}:{unit}".encode()).digest()
        for generator in self._generators:
            generator.manual_seed(int.from_bytes(digest[:8], "big"))
        # As transformers does: the innermost model's way, and parents after children, whose values some of them change.
        models = [next(model for model in reversed(chain[:depth + 1]) if isinstance(model, PreTrainedModel))
                  for depth in range(len(chain))]
        for part in reversed(self._modules):
            models[-1]._init_weights(part)
        for parent, model in reversed([*zip(chain, models, strict=True)][:-1]):
            model._init_weights(parent)
        self._check()

    def _check(self) -> None:
        for part in self._modules:
            if _is_incomplete(part) and callable(reset := getattr(part, "reset_parameters", None)):
                reset()
            if left := _is_incomplete(part):
                raise ValueError(f"{type(self._whole).__name__} does not initialise {self._unit}, {type(part).__name__}"
                                 f".{left}: it cannot start from random weights")

    def _give(self, values: Callable[[Tensor], Tensor]) -> None:
        for part in self._modules:
            for name, parameter in list(part.named_parameters(recurse=False)):
                part.register_parameter(name, nn.Parameter(values(parameter), requires_grad=False))


def _is_incomplete(module: nn.Module) -> str | None:
    """The name of a parameter that holds NaN."""
    return next((name for name, values in module.named_parameters(recurse=False) if values.sum().isnan()), None)
