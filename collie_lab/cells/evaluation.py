"""The evaluation cells: what to measure of the model, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

from pydantic import Field

from collie_lab.cells._base import Cell
from collie_lab.cells.data import Data

__all__ = ["Evaluation", "ExactMatch", "Perplexity"]

_Better = Mapping[str, Literal["min", "max"]]


class Evaluation(Cell):
    """What all evaluations share. Each runs at the end, and every `every` steps where that is set."""

    every: int | None = Field(default=None, ge=1)
    data: Data | None = None
    """Default: the held-out split of the experiment's own data."""
    limit: int | None = Field(default=None, ge=1)
    """Use a fixed random sample of so many documents."""
    name: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9_]*$")
    """Goes before the names of the figures, `<name>_perplexity`: needed where two evaluations are of one kind."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences of one forward pass on one rank."""

    better: ClassVar[_Better | None] = None
    """Its figures, and whether less or more of each is better; None: they are known only when it has run."""

    @property
    def figures(self) -> dict[str, Literal["min", "max"]] | None:
        """`better`, with the names that the figures have in a run."""
        return None if self.better is None else {self.named(key): mode for key, mode in self.better.items()}

    def named(self, figure: str) -> str:
        """The name of one of its figures in a run."""
        return f"{self.name}_{figure}" if self.name else figure


class Perplexity(Evaluation):
    """exp of the mean negative log-likelihood per predicted token, weighted by tokens over all ranks."""

    better: ClassVar[_Better] = {"perplexity": "min", "nll": "min"}


class ExactMatch(Evaluation):
    """Share of the held-out prompts whose greedy answer is the reference, stripped of outer blanks."""

    better: ClassVar[_Better] = {"exact_match": "max", "exact_match_se": "min"}
    limit: int | None = Field(default=200, ge=1)
    max_new_tokens: int = Field(default=32, ge=1)
    score: Callable[[str, str], float] | None = None
    """`score(answer, reference)` in 0..1 instead of equality."""
