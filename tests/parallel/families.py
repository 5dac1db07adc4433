"""Small models of many families, for tests of layouts."""

from __future__ import annotations

from typing import Any

import numpy as np

from collie_lab.cells import SHAPES, Experiment, LoRA, Model
from collie_lab.data import Documents

__all__ = ["FAMILIES", "documents", "experiment"]

_SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "vocab_size": 64, "max_position_embeddings": 128}

#: By name: the model type and what differs from the common shape.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {}),
    "llama3": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 16}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma": ("gemma", {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "glm4": ("glm4", {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "partial_rotary_factor": 0.5}),
    "gpt_neox": ("gpt_neox", {}),
    "mixtral": ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "odd vocabulary": ("llama", {"vocab_size": 63}),
}


def experiment(family: str, *, lora: bool = False, layers: int = 2) -> Experiment:
    """An experiment with a small model of a family, random weights."""
    kind, fields = FAMILIES[family]
    SHAPES["family-test"] = {"model_type": kind, **_SHAPE, "num_hidden_layers": layers, **fields}
    return Experiment(model=Model("family-test", init="random"), adapter=LoRA(r=2) if lora else None)


def documents(lengths: tuple[int, ...] = (20, 9, 14), vocabulary: int = 63) -> Documents:
    """Random tokens, all of them learned but the first of each document."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    learned = np.ones(offsets[-1], dtype=np.bool_)
    learned[offsets[:-1]] = False
    tokens = np.random.default_rng(1).integers(0, vocabulary, offsets[-1]).astype(np.int32)
    return Documents(tokens, learned, offsets, np.zeros(0, dtype=np.int64))
