"""What the tensors of a model or an adapter are called, by its files. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from collie_lab.cells import CellError, Model
from collie_lab.data.hub import model_config

__all__ = ["EMBEDDING", "HEAD", "adapter_tensors", "layer_names", "names_one_of", "parameter_names"]

#: The two that may be one parameter.
EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
#: Families whose files have the names of their parameters.
_PLAIN: Final = ("llama", "mistral", "qwen2", "qwen3")

_LLAMA: Final = (*(f"self_attn.{name}_proj" for name in "qkvo"),
                 *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))


def layer_names(model: Model) -> tuple[str, ...] | None:
    """The names of what has tensors in a model, with their places; None where they are not known here: on the hub, in
    a folder without weights or with experts (which are stored by other names), in a format other than safetensors."""
    if model.is_shape:
        layers = model_config(model)["num_hidden_layers"]
        return tuple(f"model.layers.{number}.{name}" for number in range(layers) for name in _LLAMA)
    folder = Path(model.source).expanduser()
    try:
        if any("expert" in field for field in model_config(model)):
            return None
        names = _stored(folder)
    except (CellError, OSError, ValueError, KeyError):
        return None
    return tuple({name.rpartition(".")[0] for name in names})


def parameter_names(model: Model) -> tuple[str, ...] | None:
    """The names of all parameters of a model, the head's also where it is tied; None where they are not known for
    sure: as with `layer_names`, and in families whose files may have other names."""
    try:
        config = model_config(model)
        family = config.get("model_type")
        if model.is_shape and family == "llama":
            names = _llama_parameters(config)
        elif family in _PLAIN and not model.is_shape and not model.config:
            names = _stored(Path(model.source).expanduser())
        else:
            return None
    except (CellError, OSError, ValueError, KeyError):
        return None
    return tuple({*names, EMBEDDING, HEAD})


def _llama_parameters(config: Mapping[str, Any]) -> list[str]:
    found = ["model.norm.weight"]
    for number in range(config["num_hidden_layers"]):
        for name in (*_LLAMA, "input_layernorm", "post_attention_layernorm"):
            biased = config.get("attention_bias" if "attn." in name else "mlp_bias") and name in _LLAMA
            found += [f"model.layers.{number}.{name}.{leaf}" for leaf in ("weight", *(("bias",) if biased else ()))]
    return found


def names_one_of(target: str, layers: Iterable[str]) -> bool:
    """Whether a target of an adapter is a layer's name, or the end of one, as peft takes it."""
    return any(f".{layer}".endswith(f".{target}") for layer in layers)


def adapter_tensors(folder: Path) -> list[str]:
    """The names in a peft folder.

    Raises:
        OSError: it holds no safetensors that can be read.
    """
    return _names(folder / "adapter_model.safetensors")


def _stored(folder: Path) -> list[str]:
    """The names in a model's folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    return _names(folder / "model.safetensors")


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from error
