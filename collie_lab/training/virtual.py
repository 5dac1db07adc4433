"""Virtual tokens before every document: prompt tuning, P-tuning and prefix tuning, packed and padded.

peft puts them before a row, and here a row holds many documents. `collate` leaves room before each of them (or, for a
prefix, counts positions from behind it); this file fills the room in the forward pass. To a document it is as if
peft's own `forward` had got it alone.

Shapes: B batch, V virtual tokens, L layers, K key and value heads, D head dimension, C hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

from torch import Tensor, nn
from transformers import Cache

from collie_lab.cells import VirtualTokens

__all__ = ["attach_virtual_tokens", "virtual_cache", "virtual_tokens"]


def attach_virtual_tokens(root: Any, cell: VirtualTokens, *, flat: bool, recompute: bool) -> None:
    """Teach peft's wrapper of a causal LM to take the micro-batches of `collate(..., virtual=cell)`.

    Raises:
        ValueError: recomputation of a model whose attention takes a prefix only from a cache.
    """
    if cell.cached and not flat and recompute:
        raise ValueError(f"{root.config.model_type} takes a prefix only as a cache, which recomputed blocks would fill "
                         'twice: Training(recompute="none"), or Prompt or PTuning')
    plain, causal_lm = root.forward, root.get_base_model()

    @functools.wraps(plain)
    def forward(*args: Any, virtual: Tensor | None = None, **inputs: Any) -> Any:
        if virtual is not None:
            inputs["inputs_embeds"] = _with_prompt(causal_lm.get_input_embeddings()(inputs.pop("input_ids")), virtual,
                                                   root.get_prompt(1)[0])
        elif "packed" in inputs:
            inputs["packed"] = dataclasses.replace(inputs["packed"], prefix=_prefix(root))
        else:  # padded rows and a prefix, or a call by hand: as peft does it
            return plain(*args, **inputs)
        return causal_lm(*args, **inputs)

    root.forward = forward


def virtual_tokens(model: nn.Module) -> int:
    """How many virtual tokens stand before a document."""
    config = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0


def virtual_cache(model: nn.Module, rows: int) -> tuple[Cache, int] | None:
    """The cache of attention with which generation begins, and its tokens; None without virtual tokens."""
    count, root = virtual_tokens(model), cast(Any, model)
    if not count:
        return None
    prompt = root.get_prompt(rows, max_cache_len=-1)
    if isinstance(prompt, Tensor):
        embeddings = root.get_base_model().get_input_embeddings().weight
        prompt = root.get_base_model().base_model(inputs_embeds=prompt.to(embeddings.dtype), use_cache=True)
        prompt = prompt.past_key_values
    return prompt, count


def _with_prompt(embedded: Tensor, places: Tensor, prompt_VC: Tensor) -> Tensor:
    """The embeddings of a micro-batch with the prompt at its places, document after document."""
    rows = prompt_VC.to(embedded.dtype).repeat(len(places) // len(prompt_VC), 1)
    return embedded.flatten(0, 1).index_copy(0, places, rows).view_as(embedded)


def _prefix(root: Any) -> Tensor:
    """Every layer's keys and values of the prefix, [L, 2, K, V, D], as `PeftModel.get_prompt` orders them."""
    config, encoder = root.active_peft_config, root.prompt_encoder[root.active_adapter]
    tokens = root.prompt_tokens[root.active_adapter].to(encoder.embedding.weight.device)
    heads = config.num_attention_heads
    states = encoder(tokens).view(len(tokens), config.num_layers, 2, heads, config.token_dim // heads)
    result: Tensor = states.permute(1, 2, 3, 0, 4)
    return result
