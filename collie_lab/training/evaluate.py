"""The evaluations, on any data-parallel layout; each document counts once."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from collie_lab.cells import Evaluation, ExactMatch, Perplexity, VirtualTokens
from collie_lab.data import Documents, Tokenizer
from collie_lab.parallel import Strategy
from collie_lab.training.batch import collate
from collie_lab.training.generate import generate

__all__ = ["evaluate", "exact_match", "perplexity"]


def evaluate(cell: Evaluation, model: PreTrainedModel, documents: Documents, tokenizer: Tokenizer,
             strategy: Strategy, *, flat: bool, virtual: VirtualTokens | None = None,
             tick: Callable[[], None] = lambda: None) -> dict[str, float]:
    """The figures of one evaluation cell, by name; the same on every rank. `tick` is called before every batch.

    `flat` and `virtual` are those of `collate`.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), strategy.compute():
            match cell:
                case Perplexity():
                    figures = perplexity(cell, model, documents, strategy, flat=flat, virtual=virtual, tick=tick)
                case ExactMatch():
                    with strategy.whole(model):
                        figures = exact_match(cell, model, documents, tokenizer, strategy, tick=tick)
                case _:
                    raise TypeError(f"no evaluation for the cell {type(cell).__name__}")
    finally:
        model.train(was_training)
    return {f"{cell.name}_{key}" if cell.name else key: value for key, value in figures.items()}


def perplexity(cell: Perplexity, model: PreTrainedModel, documents: Documents, strategy: Strategy, *,
               flat: bool, virtual: VirtualTokens | None, tick: Callable[[], None]) -> dict[str, float]:
    """exp of the mean negative log-likelihood (`nll`, nats) per predicted token."""
    sums = torch.zeros(2, dtype=torch.float64, device=strategy.device)
    batches = _shares(documents.lengths, cell, strategy)
    for step in range(_most_batches(documents.lengths, cell, strategy)):
        tick()
        # A sharded model is gathered by all ranks together: who has no batch left repeats a document unheard.
        counts = step < len(batches)
        indices = batches[step] if counts else np.zeros(1, dtype=np.int64)
        batch = collate(documents, indices, strategy.device, flat=flat, multiple=strategy.multiple,
                        virtual=virtual)
        loss = model(**batch.inputs, objective="likelihood")
        if counts:
            sums[0] += loss
            sums[1] += int(documents.targets[indices].sum())
    total, tokens = strategy.total(strategy.counted(sums)).tolist()
    return {"perplexity": math.exp(min(total / tokens, 700.0)), "nll": total / tokens}


def exact_match(cell: ExactMatch, model: PreTrainedModel, documents: Documents, tokenizer: Tokenizer,
                strategy: Strategy, *, tick: Callable[[], None]) -> dict[str, float]:
    """The mean score of the greedy answers, and its standard error over the documents."""
    score = cell.score or (lambda answer, reference: float(answer.strip() == reference.strip()))
    sums = torch.zeros(3, dtype=torch.float64, device=strategy.device)
    for indices in _shares(documents.prompt_lengths, cell, strategy):
        tick()
        prompts = [documents.tokens[documents.offsets[i] : documents.offsets[i] + documents.prompt_lengths[i]]
                   for i in indices]
        answers = generate(model, prompts, tokenizer, strategy.device, cell.max_new_tokens)
        scores = [score(answer, documents.answers[i]) for answer, i in zip(answers, indices, strict=True)]
        sums += torch.tensor([len(scores), sum(scores), sum(x * x for x in scores)], device=strategy.device)
    count, total, squares = strategy.total(strategy.counted(sums)).tolist()
    mean = total / count
    variance = max(0.0, squares / count - mean * mean)
    return {"exact_match": mean, "exact_match_se": math.sqrt(variance / max(1.0, count - 1))}


def _shares(lengths: NDArray[np.int64], cell: Evaluation, strategy: Strategy) -> list[NDArray[np.int64]]:
    """This rank's batches; documents of like length together, so that little is padding."""
    chosen = np.arange(len(lengths))
    if cell.limit is not None and cell.limit < len(lengths):
        # Files are often sorted, by topic or label: the first documents would be no fair sample.
        chosen = np.sort(np.random.default_rng(0).permutation(len(lengths))[: cell.limit])
    order = chosen[np.argsort(lengths[chosen], kind="stable")][strategy.place.dp :: strategy.cell.dp]
    return [order[begin : begin + cell.batch_size] for begin in range(0, len(order), cell.batch_size)]


def _most_batches(lengths: NDArray[np.int64], cell: Evaluation, strategy: Strategy) -> int:
    """Batches of the rank that has most: the first."""
    count = min(len(lengths), cell.limit or len(lengths))
    return math.ceil(math.ceil(count / strategy.cell.dp) / cell.batch_size)
