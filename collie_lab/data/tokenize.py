"""From documents to token ids with their loss mask, block by block: a corpus may be larger than memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from collie_lab.data.documents import Documents, Writer
from collie_lab.data.records import Document
from collie_lab.data.tokenizer import Tokenizer

__all__ = ["Encoded", "Tally", "encode", "last_start", "tokenize", "tokenize_into"]

#: A block ends after so many documents or characters: enough for all cores, little beside the memory of a machine.
_DOCUMENTS: Final = 1000
_CHARACTERS: Final = 500_000


@dataclass
class Tally:
    """What became of the documents."""

    documents: int = 0
    """Documents that were read."""
    blank: int = 0
    """Texts of the source that are no documents, since they are blank."""
    texts: int = 0
    """All texts of the source, where `blank` of them are."""
    overlong: int = 0
    """Those with more than `max_length` tokens."""
    unlearnable: int = 0
    """Those that were left out, since within `max_length` tokens there is nothing to learn."""
    responses: int = 0
    """Responses to be learned; a chat may have several."""
    empty: int = 0
    """Those of them that are blank."""
    partial: int = 0
    """Documents of which only the last reply is learned."""
    tokens: int = 0
    """Tokens of what is kept."""
    unknown: int = 0
    """Those that stand for what the tokenizer lacks."""
    style: str = "plain"
    """What stands around what a person says, in the first."""
    keys: list[NDArray[np.uint64]] = field(default_factory=list)
    """`Document.key` of each, block by block."""


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer, max_length: int,
             overlong: str, *, measured: bool = False) -> tuple[Documents, int]:
    """Token ids with their loss mask, and the number of documents longer than `max_length` tokens.

    Each document is the tokenizer's own prefix, its segments, and an end-of-sequence token. Segments are
    tokenized apart, so that a prompt has the same tokens whether or not its answer follows. A closed
    document, which a chat template has rendered with all its marks, is tokenized whole and gets neither.
    Documents without a token to learn are left out. `split` gives every window the prefix anew. With `measured` the
    bytes of the text are counted that is learned.
    """
    tally = Tally()
    blocks = tokenize_into(tally, documents, tokenizer, max_length, overlong, measured=measured)
    return Writer.gather(blocks), tally.overlong


def tokenize_into(tally: Tally, documents: Iterable[Document], tokenizer: Tokenizer, max_length: int, overlong: str, *,
                  answers: bool = True, measured: bool = False) -> Iterator[Documents]:
    """As `tokenize`, a block at a time; counts go into `tally`. Without `answers` prompts and answers are not kept.

    The documents are closed all or none, as those of a cell are.
    """
    for block in _blocks(documents):
        tally.style = tally.style if tally.documents else block[0].style
        tally.documents += len(block)
        tally.responses += sum(flag for item in block if item.answer is not None for _, flag in item.segments)
        tally.empty += sum(item.empty for item in block)
        tally.partial += sum(item.partial for item in block)
        tally.keys.append(np.fromiter((item.key for item in block), dtype=np.uint64, count=len(block)))
        encoded = encode(block, tokenizer, measured)
        kept = _windows(tally, block, encoded, tokenizer.prefix, max_length, overlong, answers)
        tally.tokens += len(kept.tokens)
        if tokenizer.unk_id is not None:
            tally.unknown += int(np.count_nonzero(kept.tokens == tokenizer.unk_id))
        yield kept


def _blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    block: list[Document] = []
    characters = 0
    for document in documents:
        block.append(document)
        characters += sum(len(text) for text, _ in document.segments)
        if len(block) == _DOCUMENTS or characters >= _CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


class Encoded(NamedTuple):
    """Documents one after the other, without the tokenizer's prefix."""

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    """How many tokens each document has."""
    sizes: NDArray[np.int64] | None
    """UTF-8 bytes of each token, if they are measured."""

    def apart(self) -> Iterator[tuple[list[int], NDArray[np.bool_]]]:
        """The tokens of each document, and which of them are to be learned."""
        ends = np.cumsum(self.lengths)[:-1]
        for tokens, learned in zip(np.split(self.tokens, ends), np.split(self.learned, ends), strict=True):
            yield tokens.tolist(), learned


def encode(block: Sequence[Document], tokenizer: Tokenizer, measured: bool = False) -> Encoded:
    """The tokens of all documents, which are closed all or none."""
    if block[0].closed:
        marked = tokenizer.encode_marked([item.segments for item in block])
        lengths = np.array([len(ids) for ids, _, _ in marked], dtype=np.int64)
        sizes = _flat([sizes for _, _, sizes in marked]).astype(np.int64) if measured else None
        return Encoded(_flat([ids for ids, _, _ in marked]), np.concatenate([flags for _, flags, _ in marked]), lengths,
                       sizes)
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    texts = [text for item in block for text, _ in item.segments]
    found = tokenizer.encode_measured(texts) if measured else [(ids, []) for ids in tokenizer.encode(texts)]
    encoded = iter(found)
    pieces = [piece for item in block for piece in (*itertools.islice(encoded, len(item.segments)),
                                                    (end, [0] * len(end)))]
    flags = [flag for item in block for flag in (*(flag for _, flag in item.segments), True)]
    counts = np.array([len(ids) for ids, _ in pieces], dtype=np.int64)
    ends = np.cumsum([len(item.segments) + 1 for item in block])
    lengths = np.diff(np.cumsum(counts)[ends - 1], prepend=0)
    return Encoded(_flat([ids for ids, _ in pieces]), np.repeat(np.array(flags, dtype=np.bool_), counts), lengths,
                   _flat([sizes for _, sizes in pieces]).astype(np.int64) if measured else None)


def _flat(pieces: list[list[int]]) -> NDArray[np.int32]:
    return np.fromiter(itertools.chain.from_iterable(pieces), dtype=np.int32, count=sum(map(len, pieces)))


def _windows(tally: Tally, block: list[Document], encoded: Encoded, prefix: list[int], max_length: int, overlong: str,
             answers: bool) -> Documents:
    """What is kept of each document: its beginning, all of it in windows, or nothing; with the prefix before it."""
    tokens, learned, lengths, sizes = encoded
    front = 0 if block[0].closed else len(prefix)
    room = max_length - front
    too_long = lengths > room
    tally.overlong += int(too_long.sum())
    counts = np.ones(len(block), dtype=np.int64)
    if overlong == "split":
        counts = np.maximum(1, -(-lengths // room))
    elif overlong == "drop":
        counts[too_long] = 0
    # From here on arrays have an item for every window.
    source = np.repeat(np.arange(len(block)), counts)
    inside = _ranges(np.zeros(len(counts), dtype=np.int64), counts) * room
    bodies = np.minimum(room, lengths[source] - inside)
    begins = (np.cumsum(lengths) - lengths)[source] + inside
    # A token counts if it is to be learned and something precedes it.
    counted = (begins + ((bodies > 0) & (front == 0)), begins + bodies)
    kept = _sums(learned, *counted) > 0
    text_bytes = np.zeros(0, dtype=np.int64) if sizes is None else _sums(learned * sizes, *counted)[kept]
    tally.unlearnable += len(np.unique(source)) - len(np.unique(source[kept]))
    source, bodies, begins = source[kept], bodies[kept], begins[kept]

    offsets = np.concatenate([[0], np.cumsum(front + bodies)])
    filled = np.zeros(offsets[-1], dtype=np.int32)
    mask = np.zeros(offsets[-1], dtype=np.bool_)
    for place, token in enumerate(prefix[:front]):
        filled[offsets[:-1] + place] = token
    to, from_ = _ranges(offsets[:-1] + front, bodies), _ranges(begins, bodies)
    filled[to], mask[to] = tokens[from_], learned[from_]
    mask[offsets[:-1]] = False
    if not answers or all(item.answer is None for item in block):
        return Documents(filled, mask, offsets, np.zeros(0, dtype=np.int64), text_bytes=text_bytes)
    prompts = [last_start(mask[begin:end]) for begin, end in itertools.pairwise(offsets.tolist())]
    return Documents(filled, mask, offsets, np.array(prompts, dtype=np.int64),
                     tuple(block[index].answer or "" for index in source.tolist()), text_bytes)


def _sums(values: NDArray[Any], begins: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each window, from `begins` to before `ends`."""
    running: NDArray[np.int64] = np.concatenate([[0], np.cumsum(values)])
    return running[ends] - running[begins]


def _ranges(begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """`begins[0], begins[0] + 1, ...` so many as its length says, then those of the next."""
    ends = np.cumsum(lengths)
    return np.repeat(begins - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def last_start(mask: NDArray[np.bool_]) -> int:
    """Where the last run of True begins: the tokens before it are the prompt of the last answer."""
    end = int(np.flatnonzero(mask)[-1])
    return int(np.flatnonzero(~mask[:end])[-1]) + 1
