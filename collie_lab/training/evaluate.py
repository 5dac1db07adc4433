"""The evaluations, on any data-parallel layout; each document counts once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from collie_lab.cells import Evaluation, ExactMatch, Perplexity
from collie_lab.data import Documents, Tokenizer
from collie_lab.parallel import Strategy
from collie_lab.training.batch import collate
from collie_lab.training.packed import ATTENTION

__all__ = ["evaluate", "exact_match", "generate", "perplexity"]


def evaluate(cell: Evaluation, model: PreTrainedModel, documents: Documents, tokenizer: Tokenizer,
             strategy: Strategy, *, flat: bool, tick: Callable[[], None] = lambda: None) -> dict[str, float]:
    """The figures of one evaluation cell, by name; the same on every rank. `tick` is called before every batch."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), strategy.compute():
            match cell:
                case Perplexity():
                    figures = perplexity(cell, model, documents, strategy, flat=flat, tick=tick)
                case ExactMatch():
                    with strategy.whole(model):
                        figures = exact_match(cell, model, documents, tokenizer, strategy, tick=tick)
                case _:
                    raise TypeError(f"no evaluation for the cell {type(cell).__name__}")
    finally:
        model.train(was_training)
    return {f"{cell.name}_{key}" if cell.name else key: value for key, value in figures.items()}


def perplexity(cell: Perplexity, model: PreTrainedModel, documents: Documents, strategy: Strategy, *,
               flat: bool, tick: Callable[[], None]) -> dict[str, float]:
    """exp of the mean negative log-likelihood (`nll`, nats) per predicted token."""
    sums = torch.zeros(2, dtype=torch.float64, device=strategy.device)
    batches = _shares(documents.lengths, cell, strategy)
    for step in range(_most_batches(documents.lengths, cell, strategy)):
        tick()
        # A sharded model is gathered by all ranks together: who has no batch left repeats a document unheard.
        counts = step < len(batches)
        indices = batches[step] if counts else np.zeros(1, dtype=np.int64)
        batch = collate(documents, indices, strategy.device, flat=flat, multiple=strategy.multiple)
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
        answers = generate(model, prompts, tokenizer, cell.max_new_tokens, strategy.device)
        scores = [score(answer, documents.answers[i]) for answer, i in zip(answers, indices, strict=True)]
        sums += torch.tensor([len(scores), sum(scores), sum(x * x for x in scores)], device=strategy.device)
    count, total, squares = strategy.total(strategy.counted(sums)).tolist()
    mean = total / count
    variance = max(0.0, squares / count - mean * mean)
    return {"exact_match": mean, "exact_match_se": math.sqrt(variance / max(1.0, count - 1))}


def generate(model: PreTrainedModel, prompts: list[NDArray[np.int32]], tokenizer: Tokenizer, max_new_tokens: int,
             device: torch.device) -> list[str]:
    """Greedy continuations of the prompts, up to the end-of-sequence token or the model's context, as text."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left: new tokens follow the prompt's last
        ids[row, width - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        mask[row, width - len(prompt) :] = 1
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or width + max_new_tokens
    room = max(1, min(max_new_tokens, context - width))
    config = GenerationConfig(max_new_tokens=room, do_sample=False, use_cache=True, eos_token_id=tokenizer.eos_id,
                              pad_token_id=tokenizer.pad_id or 0)
    with _own_settings(model):
        # Not in step with ranks that have other prompts: a sharded model is whole here (`Strategy.whole`).
        output: Tensor = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device),
                                        generation_config=config, synced_gpus=False)
    answers = []
    for row in output[:, width:].tolist():
        end = row.index(tokenizer.eos_id) if tokenizer.eos_id in row else len(row)
        answers.append(tokenizer.decode(row[:end]))
    return answers


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
