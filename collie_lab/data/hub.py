"""Where a model's small files are: its local folder, or the hub's cache. No torch, no transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collie_lab.cells import SHAPES, CellError, Model, Problem

__all__ = ["context_length", "fetch", "holds_weights", "model_config", "text_fields", "vocabulary_size",
           "weights_digest"]

_SAMPLE = 2**16
# Names under which configurations of transformers keep the longest sequence.
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "n_ctx")


def fetch(model: Model, files: tuple[str, ...], field: str = "source") -> Path:
    """The folder that holds the given files of a model, fetched from the hub unless it is local.

    Raises:
        CellError: no such folder, and the hub does not give it.
    """
    path = Path(model.source).expanduser()
    if path.is_dir():
        return path
    missing = CellError([Problem("Model", field, f"{model.source!r} is neither a folder here nor a named shape, and "
                                 "the hub does not give it", "check the name; named shapes: " + ", ".join(SHAPES))])
    if model.source.startswith((".", "/", "~")):
        raise missing
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.source, revision=model.revision, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises many types, from bad names to closed networks
        raise missing from error


def model_config(model: Model) -> dict[str, Any]:
    """The model's configuration with the cell's overrides, as in its `config.json`.

    Raises:
        CellError: there is none.
    """
    if model.is_shape:
        return {**SHAPES[model.source], **model.overrides}
    file = fetch(model, ("config.json",)) / "config.json"
    if not file.is_file():
        raise CellError([Problem("Model", "source", f"{model.source} holds no config.json",
                                 "name a folder that transformers' save_pretrained wrote")])
    try:
        return {**json.loads(file.read_text(encoding="utf-8")), **model.overrides}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CellError([Problem("Model", "source", f"{file} is no valid JSON: {error}")]) from None


def holds_weights(model: Model) -> bool:
    """Whether there are trained weights: not of a named shape, nor in a folder without any. Of the hub it is taken on
    trust."""
    if model.is_shape:
        return False
    folder = Path(model.source).expanduser()
    return not folder.is_dir() or any(next(folder.glob(each), None) for each in ("*.safetensors", "*.bin"))


def weights_digest(model: Model) -> str:
    """What tells trained weights from others of the same shape, without reading all of them: a hash of the sizes of
    their files, and of 64 KiB at 256 places of each. Of the hub, and of random weights, the name."""
    folder = Path(model.source).expanduser()
    if model.init == "random" or not folder.is_dir():
        return f"{model.source}@{model.revision}" if model.revision else model.source
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{size}".encode())
        with path.open("rb") as file:
            for place in range(0, size, max(_SAMPLE, size // 256)):
                file.seek(place)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def text_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the fields of its language model on top, where it is one of several parts."""
    return {**config, **(config.get("text_config") or {})}


def context_length(config: dict[str, Any]) -> int | None:
    """The longest sequence the model was built for, in tokens; None where the configuration does not say."""
    config = text_fields(config)
    return next((int(config[name]) for name in _CONTEXT_FIELDS if config.get(name)), None)


def vocabulary_size(config: dict[str, Any]) -> int | None:
    """The rows of a model for tokens; None where the configuration does not say."""
    rows = text_fields(config).get("vocab_size")
    return None if rows is None else int(rows)
