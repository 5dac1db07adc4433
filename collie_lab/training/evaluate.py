"""The evaluations, on any layout; each document and each question counts once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from transformers import PreTrainedModel

from collie_lab.cells import Evaluation, HumanEval, LMEval, Perplexity, VirtualTokens
from collie_lab.data import Documents, Tokenizer
from collie_lab.data.questions import Question, Questions, drawn
from collie_lab.parallel import Strategy
from collie_lab.training.generate import Draw, generate
from collie_lab.training.judge import Sample, choose, judge, summarize
from collie_lab.training.likelihood import score

__all__ = ["evaluate", "file_name"]

Tick = Callable[[], None]


def evaluate(cell: Evaluation, model: PreTrainedModel, documents: Documents, tokenizer: Tokenizer,
             strategy: Strategy, *, flat: bool, virtual: VirtualTokens | None = None, tick: Tick = lambda: None,
             keep: Callable[[list[Sample]], None] = lambda samples: None) -> dict[str, float]:
    """The figures of one evaluation cell, by name; the same on every rank.

    `flat` and `virtual` are those of `collate`. `tick` is called before every batch and at every token; `keep` on rank
    0 with all samples, in the order of the data.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), strategy.compute():
            if isinstance(cell, LMEval):
                from collie_lab.training.lm_eval import run_tasks

                samples, figures = run_tasks(cell, model, tokenizer, strategy, flat=flat, virtual=virtual, tick=tick)
            else:
                asks = _Asks(cell, model, documents, tokenizer, strategy, flat, virtual, tick)
                samples = _gathered(asks.likelihoods() if asks.by_likelihood else asks.answers(), strategy)
                figures = summarize(cell, samples) if _is_first() else {}
    finally:
        model.train(was_training)
    if _is_first():
        keep(samples)
    return {cell.named(key): value for key, value in _same(figures).items()}


def file_name(cell: Evaluation, step: int) -> str:
    """Where the samples of an evaluation go: `exact_match-step-000100.jsonl`, its `name` before it."""
    return f"{cell.name}_{cell.kind}-step-{step:06d}.jsonl" if cell.name else f"{cell.kind}-step-{step:06d}.jsonl"


class _Asks:
    """Asks the model all questions of an evaluation; each rank its share, and what it makes of the answers."""

    def __init__(self, cell: Evaluation, model: PreTrainedModel, documents: Documents, tokenizer: Tokenizer,
                 strategy: Strategy, flat: bool, virtual: VirtualTokens | None, tick: Tick):
        self._cell, self._model, self._documents, self._tokenizer = cell, model, documents, tokenizer
        self._strategy, self._flat, self._virtual, self._tick = strategy, flat, virtual, tick
        if isinstance(documents, Questions):
            self._items: Sequence[Question] = documents.items
            self._first, chosen = documents.first, np.arange(len(documents.items))
        else:
            self._items = [Question("", answer) for answer in documents.answers] or [Question("", "")] * len(documents)
            self._first, chosen = np.arange(len(documents) + 1), drawn(len(documents), cell.limit)
        # Of like length together, so that little is padding.
        sizes = documents.prompt_lengths if len(documents.prompt_lengths) else documents.lengths
        order = chosen[np.argsort(sizes[self._first[chosen]], kind="stable")]
        self._mine: NDArray[np.int64] = order[strategy.place.dp :: strategy.cell.dp]

    @property
    def by_likelihood(self) -> bool:
        """Whether the model is to find texts likely, and not to write any."""
        return isinstance(self._cell, Perplexity) or bool(self._items and self._items[0].choices)

    def likelihoods(self) -> list[Sample]:
        """This rank's samples, with the log-likelihoods of what is asked for."""
        requests = [np.arange(self._first[place], self._first[place + 1]) for place in self._mine]
        chosen = np.concatenate([np.zeros(0, dtype=np.int64), *requests])
        found, greedy = score(self._model, self._documents, chosen, self._strategy, batch_size=self._cell.batch_size,
                              flat=self._flat, virtual=self._virtual, tick=self._tick)
        samples, end = [], 0
        for place, request in zip(self._mine.tolist(), requests, strict=True):
            begin, end = end, end + len(request)
            tokens = self._documents.targets[request]
            sample = choose(self._cell, self._items[place], found[begin:end], greedy[begin:end], tokens)
            if isinstance(self._cell, Perplexity) and len(sizes := self._documents.text_bytes):
                sample["bytes"] = int(sizes[request[0]])
            samples.append({"index": place, **sample, "prompt": self._prompt(request[0])})
        return samples

    def answers(self) -> list[Sample]:
        """This rank's samples, with what the model writes."""
        cell: Any = self._cell
        answers: list[str] = []
        with self._strategy.whole(self._model):
            for begin in range(0, len(self._mine), cell.batch_size):
                self._tick()
                batch = self._mine[begin : begin + cell.batch_size].tolist()
                draw = Draw(batch, cell.top_p) if isinstance(cell, HumanEval) else None
                answers += generate(self._model, [self._prompt_tokens(self._first[place]) for place in batch],
                                    self._tokenizer, self._strategy.device, cell.max_new_tokens,
                                    getattr(cell, "temperature", 0.0), stop=cell.stop, draw=draw, tick=self._tick)
        items = [self._items[place] for place in self._mine]
        judged = judge(cell, items, answers, self._tick) if self._strategy.counts else [{} for _ in items]
        return [{"index": place, **verdict, "prompt": self._prompt(self._first[place])}
                for place, verdict in zip(self._mine.tolist(), judged, strict=True)]

    def _prompt_tokens(self, document: int) -> NDArray[np.int32]:
        begin = self._documents.offsets[document]
        length = self._documents.prompt_lengths[document] if len(self._documents.prompt_lengths) else 0
        tokens: NDArray[np.int32] = self._documents.tokens[begin : begin + length]
        return tokens

    def _prompt(self, document: int) -> str:
        """What the model has read, as text."""
        return self._tokenizer.decode(self._prompt_tokens(document).tolist())


def _gathered(samples: list[Sample], strategy: Strategy) -> list[Sample]:
    """On rank 0 the samples of all ranks, each once, in the order of the data."""
    if dist.is_initialized():
        parts: list[Any] = [None] * dist.get_world_size()
        # Ranks of one tensor-parallel or pipeline group have all found the same: one of them tells it.
        dist.gather_object(samples if strategy.counts else [], parts if dist.get_rank() == 0 else None)
        samples = [sample for part in parts if part for sample in part]
    return sorted(samples, key=lambda sample: int(sample["index"]))


def _same(figures: dict[str, float]) -> dict[str, float]:
    """Those of rank 0, on every rank."""
    found = [figures]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
