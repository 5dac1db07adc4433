"""Continued training of a BPE tokenizer: new merges after all that it has (Purason et al., arXiv 2512.03989).

The library's trainer begins with characters, so every old token is made one: the texts, tokenized, become texts in
which a character stands for a token, and what is merged in them are tokens.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, trainers

from collie_lab.cells import CellError, Problem

__all__ = ["continue_merges"]

_FIRST: Final = 0x20000  # the character of token 0; no surrogate follows
_BATCH: Final = 1000
#: Where SentencePiece puts a blank: only at the beginning of a token.
_BLANK: Final = "▁"


def continue_merges(old: RustTokenizer, count: int, min_frequency: int, texts: Iterable[str]
                    ) -> tuple[RustTokenizer, list[list[int]]]:
    """`old` with up to `count` new tokens, and of each, in the order of their ids, the old tokens it stands for.

    A token never reaches over the bounds of a word, as the tokenizer itself cuts words; where it cuts none
    (SentencePiece), a word begins with a blank and is of letters, or of one digit, or of other characters.

    Raises:
        CellError: it is no BPE tokenizer.
    """
    content = json.loads(old.to_str())
    model = content["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise CellError([Problem("ExtendTokenizer", "learn", f"the model's tokenizer is a {model['type']}: only a BPE "
                                 "without marks inside of words can learn more", "name new `tokens` instead")])
    vocabulary: dict[str, int] = model["vocab"]
    # As the model's own, added tokens keep their ids whatever comes after them.
    vocabulary |= {token["content"]: token["id"] for token in content["added_tokens"]}
    size = len(vocabulary)
    pieces: list[list[int]] = []
    for left, right in _learn(old, content, size + count + count // 4, min_frequency, texts):
        if len(pieces) == count:
            break
        parts = [_surface(old, part) for part in (left, right)]
        model["merges"].append(parts)
        # Other tokens may have merged into the same text before.
        if "".join(parts) not in vocabulary:
            vocabulary["".join(parts)] = size + len(pieces)
            pieces.append([ord(char) - _FIRST for char in left + right])
    return RustTokenizer.from_str(json.dumps(content, ensure_ascii=False)), pieces


def _learn(old: RustTokenizer, content: dict[str, Any], size: int, min_frequency: int, texts: Iterable[str]
           ) -> list[tuple[str, str]]:
    """The merges, the most frequent first, in characters that stand for old tokens."""
    learner = RustTokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")  # type: ignore[assignment]
    alphabet = [chr(_FIRST + index) for index in range(old.get_vocab_size(with_added_tokens=True))]
    learner.train_from_iterator(_as_characters(old, _Bounds(old, content), texts), trainers.BpeTrainer(
        vocab_size=size, min_frequency=min_frequency, initial_alphabet=alphabet, show_progress=False))
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]


def _as_characters(old: RustTokenizer, bounds: _Bounds, texts: Iterable[str]) -> Iterator[str]:
    """Every text with a character for a token, and a blank between words."""
    stream = iter(texts)
    while batch := list(itertools.islice(stream, _BATCH)):
        for encoding in old.encode_batch(batch, add_special_tokens=False):
            if encoding.ids:
                ids = np.array(encoding.ids, dtype=np.uint32)
                cuts = bounds.between(ids, np.array(encoding.word_ids))
                yield np.insert(ids + _FIRST, cuts + 1, ord(" ")).tobytes().decode("utf-32-le")


class _Bounds:
    """Where words end, in a tokenized text."""

    def __init__(self, old: RustTokenizer, content: dict[str, Any]):
        tokens = [old.id_to_token(index) or "" for index in range(old.get_vocab_size(with_added_tokens=True))]
        added = {token["id"] for token in content["added_tokens"]}
        self._alone = np.array([index in added or re.fullmatch("<0x[0-9A-F]{2}>", token) is not None
                                for index, token in enumerate(tokens)])
        self._sentence_piece = any(token.startswith(_BLANK) for token in tokens)
        self._begins = np.array([token.startswith(_BLANK) for token in tokens])
        # Of a token's first and last character; a blank goes with what follows it.
        self._heads = np.array([_class(token[:1]) for token in tokens])
        self._tails = np.array([_class(token[-1:]) for token in tokens])

    def between(self, ids: NDArray[np.uint32], words: NDArray[Any]) -> NDArray[np.int64]:
        """The places of the tokens after which a word ends."""
        before, after = ids[:-1], ids[1:]
        cut = (words[1:] != words[:-1]) | self._alone[before] | self._alone[after]
        if self._sentence_piece:
            tails, heads = self._tails[before], self._heads[after]
            cut |= self._begins[after] | ((tails != heads) & (tails != _BLANK)) | (heads == "digit")
        return np.flatnonzero(cut)


def _class(char: str) -> str:
    """Letters (with their marks), digits, and the rest are not put into one token; a blank goes with any of them."""
    if char == _BLANK:
        return _BLANK
    category = unicodedata.category(char)[0] if char else "C"
    return "digit" if category == "N" else "letter" if category in "LM" else "other"


def _surface(old: RustTokenizer, part: str) -> str:
    """The text of the tokens that characters stand for."""
    return "".join(str(old.id_to_token(ord(char) - _FIRST)) for char in part)
