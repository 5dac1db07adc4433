"""What is wrong with a tokenizer that is to be made, before it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from collie_lab.cells import Experiment, ExtendTokenizer, Freeze, Problem, RandomTokens, TrainTokenizer

__all__ = ["tokenizer_problems"]


def tokenizer_problems(experiment: Experiment, config: dict[str, Any]) -> Iterator[Problem]:
    """Conflicts of `Model.tokenizer` with weights, configuration, data, layout and adapter."""
    model, cell = experiment.model, experiment.model.tokenizer
    if not isinstance(cell, (TrainTokenizer, ExtendTokenizer)):
        return
    name = type(cell).__name__
    if isinstance(experiment.data, RandomTokens) and not (isinstance(cell, ExtendTokenizer) and not cell.learn):
        yield Problem(name, "learn" if isinstance(cell, ExtendTokenizer) else "", "RandomTokens has no text to learn "
                      "from", "train on Text, Instructions or Skills")
    if "vocab_size" in model.config:
        yield Problem("Model", "config", f"vocab_size={model.config['vocab_size']}, but {name} sets it", "leave it out")
    if isinstance(cell, TrainTokenizer) and config.get("text_config"):
        yield Problem("Model", "tokenizer", f"{model.source} is a model of several parts: it keeps its own tokenizer",
                      "a named shape, or a model of text alone")
    if isinstance(cell, TrainTokenizer) and model.init == "pretrained":
        yield Problem("Model", "tokenizer", "trained weights know the tokens of their own tokenizer alone",
                      'init="random"; or tokenizer=ExtendTokenizer(...), which adds to it')
    if isinstance(cell, ExtendTokenizer) and model.init == "random" and cell.rows == "mean":
        yield Problem(name, "rows", "with random weights the rows of new tokens are drawn like all others",
                      "leave it out", "warning")
    field, rows = ("vocab_size", cell.vocab_size) if isinstance(cell, TrainTokenizer) else ("multiple", cell.multiple)
    if rows % (tp := experiment.parallel.tp):
        yield Problem(name, field, f"tp={tp} need not divide the tokens: every rank may have embedding and head whole",
                      f"a multiple of {tp}", "warning")
    adapter = experiment.adapter
    if isinstance(cell, ExtendTokenizer) and adapter is not None and not isinstance(adapter, Freeze):
        yield Problem("Model", "tokenizer", f"{type(adapter).__name__} would leave the rows of new tokens untrained, "
                      "and its export has none", 'train them first, with all weights or Freeze(("*embed*", "lm_head*"))'
                      "; then the adapter, on Model(run.model_path)")
