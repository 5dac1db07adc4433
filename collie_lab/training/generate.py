"""Text from the model that is in training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from collie_lab.data import Tokenizer
from collie_lab.training.packed import ATTENTION
from collie_lab.training.virtual import virtual_cache

__all__ = ["generate"]


def generate(model: PreTrainedModel, prompts: Sequence[NDArray[np.int32]], tokenizer: Tokenizer, device: torch.device,
             max_new_tokens: int, temperature: float = 0.0, streamer: BaseStreamer | None = None) -> list[str]:
    """Continuations of the prompts, up to the end-of-sequence token or the model's context, as text.

    They are greedy where the temperature is 0, else drawn with torch's own random numbers. A `streamer` gets the tokens
    as they come, of one prompt alone.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left: new tokens follow the prompt's last
        ids[row, width - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        mask[row, width - len(prompt) :] = 1
    past: dict[str, Any] = {}
    with _own_settings(model):
        if cache := virtual_cache(model, len(prompts)):  # to the model, tokens that it has seen already
            past["past_key_values"], before = cache
            ids, mask, width = F.pad(ids, (before, 0)), F.pad(mask, (before, 0), value=1), width + before
            model = model.get_base_model()
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or width + max_new_tokens
    room = max(1, min(max_new_tokens, context - width))
    draws = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    config = GenerationConfig(max_new_tokens=room, use_cache=True, eos_token_id=tokenizer.eos_id,
                              pad_token_id=tokenizer.pad_id or 0, **draws)
    with _own_settings(model):
        # Not in step with ranks that have other prompts: a sharded model is whole here (`Strategy.whole`).
        output: Tensor = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device),
                                        generation_config=config, synced_gpus=False, streamer=streamer, **past)
    answers = []
    for row in output[:, width:].tolist():
        end = row.index(tokenizer.eos_id) if tokenizer.eos_id in row else len(row)
        answers.append(tokenizer.decode(row[:end]))
    return answers


@contextlib.contextmanager
def _own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Generate as it is asked for: no penalties or beams of the model's own, and masks for padded prompts.

    transformers fills what a generation does not set from the model's configuration, and makes no masks for
    an attention function that it does not know.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    configured, attention = inner.generation_config, inner.config._attn_implementation
    inner.generation_config = GenerationConfig()
    if attention == ATTENTION:
        inner.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        inner.generation_config = configured
        if attention == ATTENTION:
            inner.set_attn_implementation(ATTENTION)
