"""Tokenizers that are made before a run: trained from nothing, or extended by new tokens."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from collie_lab.cells._base import Cell

__all__ = ["ExtendTokenizer", "NewTokenizer", "TrainTokenizer"]


class NewTokenizer(Cell):
    """A tokenizer that is made for an experiment, of its training documents alone: it never sees what is held out."""

    kind: ClassVar[str] = ""
    special: tuple[str, ...] = ()
    """Marks that are one token each, such as a chat template's. No learned token crosses one."""
    min_frequency: int = Field(default=2, ge=1)
    """How often two tokens must stand side by side to become one."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        marks = self._marks()
        if "" in marks or len(set(marks)) < len(marks):
            raise ValueError(f"tokens must be distinct and not empty, got {marks}")
        return self

    def _marks(self) -> tuple[str, ...]:
        return self.special


class TrainTokenizer(NewTokenizer):
    """A byte-level BPE tokenizer (Radford et al. 2019) trained on the experiment's training documents.

    It splits every text into words as GPT-2 does, knows all bytes, so that nothing is unknown to it, and marks the
    beginning of a text (`<s>`). For models with random weights. The same documents and fields give the same tokenizer.
    """

    MARKS: ClassVar[tuple[str, ...]] = ("<pad>", "<s>", "</s>")
    """The first ids: padding, the beginning and the end of a text."""

    vocab_size: int = Field(ge=2)
    """Tokens in all: three marks, `special`, 256 bytes, and what is learned. The model has so many."""

    @model_validator(mode="after")
    def _holds_bytes(self) -> Self:
        if self.vocab_size < (least := len(self._marks()) + 256):
            raise ValueError(f"vocab_size={self.vocab_size} has no room for all bytes and marks: at least {least}")
        return self

    def _marks(self) -> tuple[str, ...]:
        return self.MARKS + self.special

    @property
    def config(self) -> dict[str, Any]:
        """What a model's configuration says of this tokenizer."""
        return {"vocab_size": self.vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class ExtendTokenizer(NewTokenizer):
    """The model's own tokenizer with new tokens, for further training on other text, and the rows for them.

    A token that it had keeps its id, and the model's row for it. `learn` goes on with the training of a BPE tokenizer
    where it was left: of the tokens that its merges make of a text, the most frequent neighbours within a word become
    one (Purason et al., arXiv 2512.03989).
    """

    learn: int = Field(default=0, ge=0)
    """So many new tokens are learned from the training documents."""
    tokens: tuple[str, ...] = ()
    """New tokens, wherever their text stands."""
    rows: Literal["pieces", "mean"] = "pieces"
    """What embedding and head begin with for a new token: the mean of the rows of the tokens that it stands for (Gee et
    al., arXiv 2402.09977), or of all rows (Hewitt 2021), which says nothing of the token, but takes less of the others'
    probability."""
    multiple: int = Field(default=1, ge=1)
    """The model gets a multiple of so many rows. Tensor parallelism cuts embedding and head where `tp` divides them."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.learn or self._marks()):
            raise ValueError("nothing is new: give `learn`, `tokens` or `special`")
        return self

    def _marks(self) -> tuple[str, ...]:
        return self.tokens + self.special
