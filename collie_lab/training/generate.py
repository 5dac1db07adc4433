"""Text from the model that is in training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from collie_lab.data import Tokenizer
from collie_lab.training.packed import ATTENTION
from collie_lab.training.virtual import virtual_cache, virtual_tokens

__all__ = ["Draw", "generate"]


def generate(model: PreTrainedModel, prompts: Sequence[NDArray[np.int32]], tokenizer: Tokenizer, device: torch.device,
             max_new_tokens: int, temperature: float = 0.0, streamer: BaseStreamer | None = None, *,
             stop: Sequence[str] = (), draw: Draw | None = None, tick: Callable[[], None] = lambda: None) -> list[str]:
    """Continuations of the prompts, up to the first stop string, the end-of-sequence token or the model's context, as
    text.

    They are greedy where the temperature is 0, else drawn with torch's own random numbers; with `draw`, by seeds of
    their own. A `streamer` gets the tokens as they come, of one prompt alone; `tick` is called at every token.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # Those with as much room for an answer go together: what stands beside a prompt must not shorten its answer.
    taken = virtual_tokens(model)
    rooms = [max_new_tokens if context is None else max(1, min(max_new_tokens, context - taken - len(prompt)))
             for prompt in prompts]
    answers = [""] * len(prompts)
    for room in sorted(set(rooms)):
        rows = [row for row, each in enumerate(rooms) if each == room]
        ids, mask = _padded([prompts[row] for row in rows])
        past: dict[str, Any] = {}
        with _own_settings(model):
            if cache := virtual_cache(model, len(rows)):  # to the model, tokens that it has seen already
                past["past_key_values"] = cache[0]
                ids, mask = F.pad(ids, (taken, 0)), F.pad(mask, (taken, 0), value=1)
        inner = model.get_base_model() if past else model
        ending = _Ending(tokenizer, stop, len(rows), ids.shape[1], tick)
        draws: dict[str, Any] = {"do_sample": False}
        if temperature and draw is None:
            draws = {"do_sample": True, "temperature": temperature, "top_k": 0}
        config = GenerationConfig(max_new_tokens=room, use_cache=True, eos_token_id=tokenizer.eos_id,
                                  pad_token_id=tokenizer.pad_id or 0, **draws)
        processors = draw.processors(rows, temperature, device) if draw and temperature else None
        with _own_settings(model):
            # Not in step with ranks that have other prompts: a sharded model is whole here (`Strategy.whole`).
            output: Tensor = inner.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, synced_gpus=False,
                streamer=streamer, stopping_criteria=StoppingCriteriaList([ending]), logits_processor=processors,
                **past)
        for row, answer in zip(rows, ending.answers(output), strict=True):
            answers[row] = answer
    return answers


@dataclass(frozen=True)
class Draw:
    """Random answers that do not depend on what stands beside a prompt: each has a seed of its own.

    Adding Gumbel noise to log-probabilities and taking the largest is to draw from them (Gumbel, 1954; the
    "Gumbel-max trick").
    """

    seeds: Sequence[int]
    """One for each prompt."""
    top_p: float = 1.0
    """Only from the likeliest tokens that have this much of the probability together (arXiv 1904.09751)."""

    def processors(self, rows: Sequence[int], temperature: float, device: torch.device) -> LogitsProcessorList:
        """What turns the greedy choice of transformers into the draw, for these of the prompts."""
        warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*warpers, _Gumbel([self.seeds[row] for row in rows], device)])


class _Gumbel(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, seeds: Sequence[int], device: torch.device):
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = torch.stack([torch.empty_like(scores[0], dtype=torch.float32).exponential_(generator=generator)
                             for generator in self._generators])
        return torch.log_softmax(scores.float(), -1) - drawn.clamp_(min=1e-30).log()  # never 0: its logarithm


class _Ending(StoppingCriteria):  # type: ignore[misc]
    """Where each row's answer ends: at a stop string, however it is cut into tokens."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], rows: int, width: int, tick: Callable[[], None]):
        self._tokenizer, self._stop, self._width, self._tick = tokenizer, stop, width, tick
        self._ends: list[int | None] = [None] * rows
        # A token may be a single byte; some stand for nothing.
        self._tail = max((len(text.encode()) for text in stop), default=0) + 8

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._tick()
        if self._stop:
            tails = input_ids[:, max(self._width, input_ids.shape[1] - self._tail) :].tolist()
            for row, tail in enumerate(tails):
                if self._ends[row] is None and any(text in self._tokenizer.decode(tail) for text in self._stop):
                    self._ends[row] = input_ids.shape[1]
        return torch.tensor([end is not None for end in self._ends], device=input_ids.device)

    def answers(self, output: Tensor) -> list[str]:
        """The text of each row of [rows, prompt and answer], without what ended it and what came after."""
        found = []
        for row, end in zip(output.tolist(), self._ends, strict=True):
            ids = row[self._width : end]
            if self._tokenizer.eos_id in ids:
                ids = ids[: ids.index(self._tokenizer.eos_id)]
            text = self._tokenizer.decode(ids)
            found.append(text[: min((place for each in self._stop if (place := text.find(each)) >= 0), default=None)])
        return found


def _padded(prompts: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded on the left: new tokens follow the prompt's last."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        mask[row, width - len(prompt) :] = 1
    return ids, mask


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
