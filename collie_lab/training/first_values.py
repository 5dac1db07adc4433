"""What an adapter takes from weights when they are there: its first values, on all ranks together.

An adapter is made while the model has no weights. DoRA then needs the norms of their rows, PiSSA and OLoRA their
largest parts, a prompt the embeddings of words; `gather` gives a sharded weight whole, one at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from collie_lab.cells import Adapter, AddedAdapter, LoRA, Prompt
from collie_lab.data import Tokenizer
from collie_lab.training.weights import copy_into

__all__ = ["FIRST", "set_first_values"]

#: Under this name an adapted layer keeps its first (A, B), where they were taken out of its weight.
FIRST = "collie_first_values"

_EXACT = 1024  # the shorter side of a matrix of which all singular values are found, in a moment
_SUBSPACE_ITERATIONS = 16  # for the largest of a longer one, as the authors of PiSSA advise

Gather = Callable[[Tensor], Tensor]


@torch.no_grad()
def set_first_values(model: nn.Module, cell: Adapter | None, gather: Gather, tokenizer: Tokenizer | None, seed: int
                     ) -> None:
    """Give the adapter in `model` those first values that depend on the model's weights.

    Raises:
        ValueError: a prompt from a text, and no tokenizer; a folder to begin with that holds another adapter.
    """
    match cell:
        case AddedAdapter(load=str(folder)):
            _load(model, Path(folder).expanduser())
        case LoRA(dora=True):
            _set_magnitudes(model, gather)
        case LoRA(init="pissa" | "olora"):
            with torch.random.fork_rng():
                torch.manual_seed(seed)  # the same on all ranks, and when the run is resumed
                _take_out(model, cell, gather)
        case Prompt(text=None, init="random"):
            pass
        case Prompt():
            _set_prompt(model, cell, gather, tokenizer, seed)


def _load(model: Any, folder: Path) -> None:
    """The values of a peft folder, of which each rank reads the slices that it holds."""
    added = f".{model.active_adapter}"
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        keys = set(file.keys())
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            plain = "prompt_embeddings" if name.startswith("prompt_encoder.") else name.replace(added, "")
            key = next((key for key in (plain, plain.removesuffix(".weight")) if key in keys), None)
            shape = file.get_slice(key).get_shape() if key else []
            if key is None or list(parameter.shape) != shape:
                raise ValueError(f"{folder} holds another adapter: {plain} is {tuple(parameter.shape)} here, and there "
                                 + (str(tuple(shape)) if key else "is none"))
            copy_into(file.get_slice(key), parameter)


def _set_magnitudes(model: nn.Module, gather: Gather) -> None:
    """DoRA's magnitudes: the norms of the rows (Liu et al., arXiv 2402.09353, eq. 5)."""
    for module in model.modules():
        for magnitude in getattr(module, "lora_magnitude_vector", {}).values():
            copy_into(torch.linalg.norm(_matrix(module, gather), dim=1), magnitude.weight)


def _take_out(model: nn.Module, cell: LoRA, gather: Gather) -> None:
    """PiSSA and OLoRA: scale·B·A is a part of W, and is taken out of it."""
    module: Any
    for module in model.modules():
        for name, layer in getattr(module, "lora_A", {}).items():
            weight, scale = _matrix(module, gather), module.scaling[name]
            a, b = _largest(weight / scale, cell.r) if cell.init == "pissa" else _first_columns(weight, cell.r)
            copy_into(a, layer.weight)
            copy_into(b, module.lora_B[name].weight)
            rest = weight - scale * (b @ a)
            copy_into(rest.T if module.fan_in_fan_out else rest, module.get_base_layer().weight)
            setattr(module, FIRST, (a, b))


def _largest(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest singular values, half of each on either side (Meng et al., arXiv 2404.02948, eq. 2 and 3)."""
    if min(weight.shape) <= _EXACT:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, rank + 8, niter=_SUBSPACE_ITERATIONS)
        vh = v.T
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _first_columns(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first columns of Q and rows of R, W = QR (Büyükakyüz, arXiv 2406.01775, algorithm 1). The scale is not
    divided out, there as in peft."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def _matrix(module: Any, gather: Gather) -> Tensor:
    """The adapted weight [out, in], whole, in fp32."""
    weight = gather(module.get_base_layer().weight).float()
    return weight.T if module.fan_in_fan_out else weight


def _set_prompt(model: Any, cell: Prompt, gather: Gather, tokenizer: Tokenizer | None, seed: int) -> None:
    """A prompt's embeddings are those of words (Lester et al., arXiv 2104.08691, section 3.2)."""
    words = gather(model.get_base_model().get_input_embeddings().weight).float()
    if cell.text is None:
        ids = torch.randint(len(words), (cell.tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    elif tokenizer is None:
        raise ValueError("Prompt.text needs the model's tokenizer")
    else:
        ids = list(itertools.islice(itertools.cycle(tokenizer.encode([cell.text])[0]), cell.tokens))
    copy_into(words[ids], model.prompt_encoder[model.active_adapter].embedding.weight)
