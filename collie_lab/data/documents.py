"""Tokenized documents on disk: flat arrays that every rank maps into memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Documents", "Writer"]

#: Tokens that are gathered in memory; more go to files.
_IN_MEMORY: Final = 2**24

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
    folder: Path | None = field(default=None, compare=False)
    """Where the arrays are mapped from."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """Tokens of each document that the loss counts."""
        return np.add.reduceat(self.learned, self.offsets[:-1], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what a model would be trained on."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.learned, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write the arrays into `folder`. Files that they are mapped from are linked where that can be: none of them
        is ever changed, and each stays whole when others are deleted."""
        folder.mkdir(parents=True)
        for name in _ARRAYS:
            target = folder / f"{name}.npy"
            if self.folder is None or not _link(self.folder / target.name, target):
                np.save(target, getattr(self, name))
        (folder / "answers.json").write_text(json.dumps(self.answers, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Documents:
        """Map the arrays of `folder`; nothing is copied until it is used."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        return cls(**arrays, answers=tuple(json.loads((folder / "answers.json").read_text(encoding="utf-8"))),
                   folder=folder)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another file system, one without links, or the source has been deleted meanwhile
        return False
    return True


class Writer:
    """Puts blocks of documents together: in memory while they are few, then in files of `folder`.

    Args:
        folder: where files go, made when they are needed.
        limit: tokens that may stay in memory; default: 16 Mi.
    """

    def __init__(self, folder: Path, limit: int | None = None):
        self._folder, self._size = folder, 0
        self._limit = _IN_MEMORY if limit is None else limit
        self._blocks: list[Documents] = []
        self._lengths: list[NDArray[np.int64]] = []
        self._prompts: list[NDArray[np.int64]] = []
        self._bytes: list[NDArray[np.int64]] = []
        self._answers: list[str] = []
        self._files: dict[str, IO[bytes]] = {}

    def add(self, block: Documents) -> None:
        """Append documents."""
        self._lengths.append(block.lengths)
        self._prompts.append(block.prompt_lengths)
        self._bytes.append(block.text_bytes)
        self._answers += block.answers
        self._blocks.append(block)
        self._size += len(block.tokens)
        if self._size > self._limit:
            self._write()

    def finish(self) -> Documents:
        """All documents, in memory or mapped from the files."""
        lengths, prompts, sizes = (np.concatenate([np.zeros(0, dtype=np.int64), *blocks])
                                   for blocks in (self._lengths, self._prompts, self._bytes))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        if not self._files:
            tokens = np.concatenate([np.zeros(0, dtype=np.int32), *(block.tokens for block in self._blocks)])
            learned = np.concatenate([np.zeros(0, dtype=np.bool_), *(block.learned for block in self._blocks)])
            return Documents(tokens, learned, offsets, prompts, tuple(self._answers), sizes)
        self._write()
        for file in self._files.values():
            file.seek(0)
            _header(file, int(offsets[-1]))
            file.close()
        np.save(self._folder / "offsets.npy", offsets)
        np.save(self._folder / "prompt_lengths.npy", prompts)
        np.save(self._folder / "text_bytes.npy", sizes)
        (self._folder / "answers.json").write_text(json.dumps(self._answers, ensure_ascii=False), encoding="utf-8")
        return Documents.load(self._folder)

    @classmethod
    def gather(cls, blocks: Iterable[Documents]) -> Documents:
        """All blocks as one, in memory."""
        writer = cls(Path(), limit=np.iinfo(np.int64).max)
        for block in blocks:
            writer.add(block)
        return writer.finish()

    def _write(self) -> None:
        """Move what is in memory to the files, which begin with a header that does not know their length yet."""
        if not self._files:
            self._folder.mkdir(parents=True)
            self._files = {name: (self._folder / f"{name}.npy").open("wb") for name in ("tokens", "learned")}
            for file in self._files.values():
                _header(file, 0)
        for block in self._blocks:
            self._files["tokens"].write(block.tokens.data)
            self._files["learned"].write(block.learned.data)
        self._blocks, self._size = [], 0


def _header(file: IO[bytes], count: int) -> None:
    """The head of a .npy file of so many items; numpy leaves room in it for the count to grow."""
    dtype: Any = np.dtype(np.int32 if Path(file.name).stem == "tokens" else np.bool_)
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)})
