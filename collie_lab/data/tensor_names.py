"""What the tensors of a model or an adapter are called, by its files. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from collie_lab.cells import CellError, Model
from collie_lab.data.hub import model_config

__all__ = ["adapter_tensors", "layer_names", "names_one_of"]

_LLAMA: Final = (*(f"self_attn.{name}_proj" for name in "qkvo"),
                 *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))


def layer_names(model: Model) -> tuple[str, ...] | None:
    """The names of what has tensors in a model, with their places; None where they are not known here: on the hub, in
    a folder without weights or with experts (which are stored by other names), in a format other than safetensors."""
    if model.is_shape:
        layers = model_config(model)["num_hidden_layers"]
        return tuple(f"model.layers.{number}.{name}" for number in range(layers) for name in _LLAMA)
    folder = Path(model.source).expanduser()
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if any("expert" in field for field in model_config(model)):
            return None
        names = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) if index.is_file() else _names(single)
    except (CellError, OSError, ValueError, KeyError):
        return None
    return tuple({name.rpartition(".")[0] for name in names})


def names_one_of(target: str, layers: Iterable[str]) -> bool:
    """Whether a target of an adapter is a layer's name, or the end of one, as peft takes it."""
    return any(f".{layer}".endswith(f".{target}") for layer in layers)


def adapter_tensors(folder: Path) -> list[str]:
    """The names in a peft folder.

    Raises:
        OSError: it holds no safetensors that can be read.
    """
    return _names(folder / "adapter_model.safetensors")


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from error
