"""The evaluation cells: what to measure of the model, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from collie_lab.cells._base import Cell
from collie_lab.cells.data import Data, Record

__all__ = ["Classification", "Evaluation", "ExactMatch", "Generation", "HeldOut", "MultipleChoice", "Perplexity"]

Metric = Literal["exact_match", "bleu", "rouge"] | Callable[[str, str], float]

Better = Mapping[str, Literal["min", "max"]]


class Evaluation(Cell):
    """What all evaluations share. Each runs at the end, and every `every` steps where that is set.

    Every figure comes with its standard error, `<figure>_se`, and every answer is kept: `run.answers(...)`.
    """

    every: int | None = Field(default=None, ge=1)
    limit: int | None = Field(default=None, ge=1)
    """Use a fixed random sample of so many documents or questions."""
    name: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9_]*$")
    """Goes before the names of the figures, `<name>_perplexity`: needed where two evaluations are of one kind."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences of one forward pass on one rank."""

    better: ClassVar[Better | None] = None
    """Its figures, and whether less or more of each is better; None: they are known only when it has run."""

    @property
    def figures(self) -> dict[str, Literal["min", "max"]] | None:
        """`better`, with the names that the figures have in a run."""
        return None if self.better is None else {self.named(key): mode for key, mode in self.better.items()}

    def named(self, figure: str) -> str:
        """The name of one of its figures in a run."""
        return f"{self.name}_{figure}" if self.name else figure


class HeldOut(Evaluation):
    """An evaluation on documents of a data cell."""

    kind: ClassVar[str] = ""

    data: Data | None = None
    """Default: the held-out split of the experiment's own data."""


class Perplexity(HeldOut):
    """exp of the mean negative log-likelihood per predicted token, weighted by tokens over all ranks.

    With `bits_per_byte` of text, which compares models whatever their tokenizers.
    """

    better: ClassVar[Better | None] = {"perplexity": "min", "nll": "min", "bits_per_byte": "min"}


class _Answers(HeldOut):
    """An evaluation of the model's greedy answers to prompts."""

    kind: ClassVar[str] = ""

    limit: int | None = Field(default=200, ge=1)
    max_new_tokens: int = Field(default=32, ge=1)
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these; it always ends with the end-of-sequence token."""

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty string would stop every answer at once")
        return stop


class ExactMatch(_Answers):
    """Share of the held-out prompts whose greedy answer is the reference, stripped of outer blanks."""

    better: ClassVar[Better | None] = {"exact_match": "max"}

    score: Callable[[str, str], float] | None = None
    """`score(answer, reference)`, a finite number in 0..1, instead of equality."""


class Generation(_Answers):
    """Greedy answers to the held-out prompts, compared with the references in several ways.

    `exact_match` (0..1, outer blanks stripped); `bleu`: corpus BLEU (0..100) of sacrebleu, its standard error by
    bootstrap; `rouge`: F-measures `rouge1`, `rouge2`, `rougeL` (0..1) of rouge-score, with stemming; or a function
    `metric(answer, reference)`, a finite number, whose mean goes by the function's name.
    """

    metrics: tuple[Metric, ...] = Field(default=("exact_match",), min_length=1)
    max_new_tokens: int = Field(default=128, ge=1)


class Classification(_Answers):
    """Accuracy and macro-averaged F1 (scikit-learn) of labels: the responses of the held-out documents.

    The prediction is the greedy answer (`by="answer"`; what is no label counts as wrong), or the label that is
    likeliest after the prompt, with its end-of-sequence token (`by="likelihood"`: one forward pass for every label).
    """

    better: ClassVar[Better | None] = {"accuracy": "max", "f1_macro": "max"}

    labels: tuple[str, ...] = ()
    """All that the responses may be. Default: the responses of the documents that are asked."""
    by: Literal["answer", "likelihood"] = "answer"


class MultipleChoice(Evaluation):
    """Share of the questions whose likeliest choice is the right one: `accuracy`, and `accuracy_norm`, where each
    log-likelihood is divided by its choice's length first.

    `source` is a JSON or JSONL file, a list, or a callable that returns one: records with `prompt`, `choices` (a list
    of texts) and `answer` (the number of the right choice, from 0, or its text), or what `format` makes of a record:
    such a triple. A choice follows the prompt after a blank.
    """

    better: ClassVar[Better | None] = {"accuracy": "max", "accuracy_norm": "max"}

    source: str | list[Record] | Callable[[], Iterable[Record]]
    format: Callable[[Record], tuple[str, list[str], int | str]] | None = None
    normalize: Literal["characters", "bytes", "tokens"] = "characters"
    """What lengths are counted in; lm-eval's `acc_norm` takes characters, its `acc_bytes` bytes."""

    def __init__(self, source: str | Path | list[Record] | Callable[[], Iterable[Record]], **fields: Any) -> None:
        super().__init__(source=str(source) if isinstance(source, Path) else source, **fields)  # type: ignore[call-arg]
