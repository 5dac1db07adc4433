"""Between two steps, the model in training answers what it is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from collie_lab.asks import Asks
from collie_lab.data import Tokenizer, question_tokens
from collie_lab.data.records import Style
from collie_lab.folder import JsonLines, RunFolder
from collie_lab.parallel import Strategy
from collie_lab.training.generate import generate
from collie_lab.training.virtual import virtual_tokens

__all__ = ["Answers"]


class Answers:
    """Takes questions in turn. All ranks generate together; rank 0 reads the questions and writes the answers."""

    def __init__(self, folder: RunFolder, rank: int, tokenizer: Tokenizer, style: Style, seed: int):
        self._asks, self._rank, self._tokenizer, self._style, self._seed = Asks(folder), rank, tokenizer, style, seed
        self._next = 1
        while rank == 0 and self._asks.answer(self._next).exists():  # before a restart
            self._next += 1

    @property
    def wanted(self) -> bool:
        """Whether somebody has asked, as rank 0 knows."""
        return self._rank == 0 and self._asks.waits(self._next)

    def give(self, step: int, model: PreTrainedModel, strategy: Strategy, tick: Callable[[], None]) -> None:
        """Answer what has been asked; on all ranks together. `tick` is called at every token.

        A question that the model cannot answer gets the reason; training goes on.
        """
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), strategy.compute(), strategy.whole(model):
                while (asked := self._question()) is not None:
                    number, question = asked
                    self._answer(number, question, step, model, strategy, tick)
                    self._next = number + 1
        finally:
            model.train(was_training)

    def _question(self) -> tuple[int, dict[str, Any]] | None:
        """The next question and its number, the same on all ranks."""
        found = [(self._next, self._asks.question(self._next)) if self.wanted else None]
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def _answer(self, number: int, question: dict[str, Any], step: int, model: PreTrainedModel, strategy: Strategy,
                tick: Callable[[], None]) -> None:
        lines = JsonLines(self._asks.answer(number)) if self._rank == 0 else None

        def tell(record: dict[str, Any]) -> None:
            if lines is not None:
                lines.append(record)

        pieces = _Pieces(self._tokenizer, lambda text: tell({"text": text}), tick)
        error = ""
        devices = [strategy.device] if strategy.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # what training draws is not touched; all ranks draw the same
            torch.manual_seed(self._seed + 1_000_003 * step + number)
            try:
                tokens = question_tokens(question["prompt"], self._style, self._tokenizer)
                context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
                if context is not None and len(tokens) + virtual_tokens(model) >= context:
                    raise ValueError(f"the question has {len(tokens):,} tokens, the model's context "
                                     f"{context - virtual_tokens(model):,}")
                generate(model, [np.array(tokens, dtype=np.int32)], self._tokenizer, strategy.device,
                         question["max_new_tokens"], question["temperature"], pieces)
            except Exception as problem:  # a question is no reason to lose a run
                error = f"{type(problem).__name__}: {problem}"
        tell({"end": True, "step": step, "tokens": pieces.count, "error": error})
        if lines is not None:
            lines.close()


class _Pieces(BaseStreamer):  # type: ignore[misc]
    """From tokens, as they come, to pieces of text that are whole characters."""

    def __init__(self, tokenizer: Tokenizer, tell: Callable[[str], None], tick: Callable[[], None]):
        self._tokenizer, self._tell, self._tick = tokenizer, tell, tick
        self._tokens: list[int] = []
        self._told = ""
        self._is_prompt = True
        self.count = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt, and then token by token."""
        self._tick()
        if self._is_prompt:
            self._is_prompt = False
            return
        self._tokens += value.flatten().tolist()
        self.count = len(self._tokens)
        text = self._tokenizer.decode(self._tokens)
        if not text.endswith("\ufffd"):  # in the middle of a character
            self._pass_on(text)

    def end(self) -> None:
        """Tell the rest."""
        self._pass_on(self._tokenizer.decode(self._tokens))

    def _pass_on(self, text: str) -> None:
        if len(text) > len(self._told):
            self._tell(text[len(self._told):])
            self._told = text
