"""Pretrained weights: slices of safetensors files, under the names of the model."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from typing_extensions import override

from collie_lab.cells import Model
from collie_lab.data import Extension
from collie_lab.data.hub import fetch
from collie_lab.training.new_rows import extended
from collie_lab.training.probe import ModelWarning

__all__ = ["Source", "pretrained_source"]

Source = Callable[[str], Any]
"""From a parameter's name in the whole model to what gives any region of it: a tensor, or a slice of a file."""

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@contextlib.contextmanager
def pretrained_source(cell: Model, whole: PreTrainedModel, owners: dict[str, str], wanted: list[str],
                      buffers: dict[str, Tensor], dtype: torch.dtype, extension: Extension | None) -> Iterator[Source]:
    """A checkpoint's weights `wanted`, by their names in `whole` (`owners`: tied names to the first); fills `buffers`.

    Nothing is read but what the caller slices. Where the files hold other tensors than the model (experts one by
    one, pickles), transformers converts them, on the CPU, one rank of a machine after another.

    Raises:
        ValueError: a weight is missing, has another shape, or has two values where the model ties it.
    """
    with contextlib.ExitStack() as stack:
        tensors: Mapping[str, Any] | None = _map(cell, whole, stack)
        if tensors is None:
            stack.enter_context(_in_turn())
            tensors = _converted(cell, whole, dtype, extension)
        if extension is not None:
            tensors = extended(tensors, whole, extension)
        names = {owner: [name for name in owners if owners[name] == owner and name in tensors] for owner in wanted}
        _check(cell, names, {name: buffers[name].shape for name in buffers.keys() & tensors.keys()}, tensors, whole)
        for name in buffers.keys() & tensors.keys():
            buffers[name].copy_(tensors[name][...])
        yield lambda owner: _Tied(names[owner], tensors)


class _Slices(Mapping[str, Any]):
    """The tensors of safetensors files under their names in the model; files are fetched and opened when needed."""

    def __init__(self, cell: Model, where: dict[str, tuple[str, str]], stack: contextlib.ExitStack):
        self._cell, self._where, self._stack = cell, where, stack
        self._open: dict[str, Any] = {}

    @override
    def __getitem__(self, name: str) -> Any:
        file, key = self._where[name]
        if file not in self._open:
            path = fetch(self._cell, (file,)) / file
            self._open[file] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._open[file].get_slice(key)

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    @override
    def __len__(self) -> int:
        return len(self._where)


class _Tied:
    """One tensor's regions, stored under one name or, alike, under several."""

    def __init__(self, names: list[str], tensors: Mapping[str, Any]):
        self._names, self._tensors = names, [tensors[name] for name in names]

    def __getitem__(self, region: Any) -> Tensor:
        values: Tensor = self._tensors[0][region]
        for name, other in zip(self._names[1:], self._tensors[1:], strict=True):
            if not torch.equal(values, other[region]):
                raise ValueError(f"the checkpoint holds other values for {name} than for {self._names[0]}, which its "
                                 "configuration ties; Model(config={'tie_word_embeddings': False}) keeps both")
        return values


def _map(cell: Model, whole: PreTrainedModel, stack: contextlib.ExitStack) -> _Slices | None:
    """The checkpoint's tensors by the model's names; None where they are no safetensors, or not the model's own."""
    if (index := fetch(cell, (_INDEX,)) / _INDEX).is_file():
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif (single := fetch(cell, (_SINGLE,)) / _SINGLE).is_file():
        with safe_open(single, framework="pt") as handle:
            files = dict.fromkeys(handle.keys(), _SINGLE)
    else:
        return None
    conversions = get_model_conversion_mapping(whole)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    state, where = whole.state_dict(), {}
    for key in sorted(files):
        name, converter = rename_source_key(key, renamings, converters, whole.base_model_prefix, state)
        if converter is not None:
            return None
        where[name] = files[key], key
    return _Slices(cell, where, stack)


def _converted(cell: Model, whole: PreTrainedModel, dtype: torch.dtype, extension: Extension | None
               ) -> dict[str, Tensor]:
    warnings.warn(f"transformers has to convert the weights of {cell.source}: every rank holds the whole model for a "
                  "moment, one after another on a machine; export it once to read slices", ModelWarning, 2)
    config = copy.deepcopy(whole.config)
    if extension is not None:
        config.get_text_config().vocab_size = extension.rows_before
    loaded, report = AutoModelForCausalLM.from_pretrained(
        cell.location, config=config, dtype=dtype, revision=cell.revision, ignore_mismatched_sizes=True,
        trust_remote_code=cell.trust_remote_code, output_loading_info=True)
    missing = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    return {name: values for name, values in loaded.state_dict().items() if name not in missing}


@contextlib.contextmanager
def _in_turn() -> Iterator[None]:
    """One rank of a machine after another. (An exception leaves the others waiting: it ends the run anyway.)"""
    if not dist.is_initialized():
        yield
        return
    mine = dist.get_node_local_rank(fallback_rank=dist.get_rank())
    turns = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    for _ in range(mine):
        dist.barrier()
    yield
    for _ in range(mine, turns):
        dist.barrier()


def _check(cell: Model, names: dict[str, list[str]], buffers: dict[str, torch.Size], tensors: Mapping[str, Any],
           whole: PreTrainedModel) -> None:
    if missing := [owner for owner, found in names.items() if not found]:
        raise ValueError(f"{cell.source} holds no weights for {_some(missing)}")
    expected = buffers | {name: whole.get_parameter(name).shape for found in names.values() for name in found}
    found = {name: torch.Size(_shape(tensors[name])) for name in expected}
    if wrong := [name for name, shape in expected.items() if found[name] != shape]:
        raise ValueError(f"{cell.source} holds weights of another shape than its configuration says: " + _some(
            [f"{name} {tuple(found[name])} instead of {tuple(expected[name])}" for name in wrong]))


def _shape(values: Any) -> list[int]:
    return list(values.shape) if isinstance(values, Tensor) else values.get_shape()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
