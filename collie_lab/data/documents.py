"""Tokenized documents on disk: flat arrays that every rank maps into memory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Documents"]

_ARRAYS = ("tokens", "learned", "offsets", "prompt_lengths", "text_bytes")


@dataclass(frozen=True)
class Documents:
    """Token ids of all documents, one after the other.

    `offsets[i]:offsets[i + 1]` is document i; `learned` says of each token whether the loss counts it (the
    first of a document never is: nothing predicts it). `prompt_lengths` and `answers` are there where the
    documents ask something: what to feed a model, and what it should say.
    """

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]
    answers: tuple[str, ...] = ()
    text_bytes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """UTF-8 bytes of the text that the loss counts, of each document; empty where they were not counted."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """Tokens of each document that the loss counts."""
        return np.add.reduceat(self.learned.astype(np.int64), self.offsets[:-1])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what a model would be trained on."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.learned, self.offsets):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write the arrays into `folder`."""
        folder.mkdir(parents=True)
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))
        (folder / "answers.json").write_text(json.dumps(self.answers, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Documents:
        """Map the arrays of `folder`; nothing is copied until it is used."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                  for name in _ARRAYS}
        return cls(**arrays, answers=tuple(json.loads((folder / "answers.json").read_text(encoding="utf-8"))))
