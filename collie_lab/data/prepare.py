"""Tokenization, once, before any process starts: what is wrong with the data is known by then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from collie_lab.cells import CellError, Data, Experiment, Instructions, Problem, RandomTokens, Text
from collie_lab.data._memory import Made, key_of, recall, remember
from collie_lab.data.documents import Documents
from collie_lab.data.hub import context_length, model_config
from collie_lab.data.records import Document, Split, Style, load_records, question, read_documents
from collie_lab.data.tokenizer import Tokenizer, save_tokenizer
from collie_lab.folder import RunFolder

__all__ = ["DEFAULT_MAX_LENGTH", "Prepared", "prepare", "question_tokens", "room_for_documents",
           "sequence_length", "tokenize"]

#: Tokens of a sequence where neither the data cell nor the model's context says less.
DEFAULT_MAX_LENGTH = 2048
_BATCH = 1000


@dataclass(frozen=True)
class Prepared:
    """What was put into the run folder, as `data/index.json` tells the ranks."""

    evaluations: tuple[str, ...]
    """The data set of each evaluation cell."""
    fingerprint: str
    """A hash of the training tokens."""
    summary: dict[str, dict[str, int]]
    warnings: list[str] = field(default_factory=list)
    style: Style = "plain"
    """What stands around what a person says, in the training documents."""


def prepare(experiment: Experiment, folder: RunFolder) -> Prepared:
    """Write the tokenizer, the training documents and every evaluation's documents into the run folder.

    Ranks map the arrays into memory; none of them tokenizes.

    Raises:
        CellError: a missing file, an empty source, a record without its field, documents that are too long
            where `overlong="error"`, token ids that the model does not know, nothing held out to evaluate.
    """
    config = model_config(experiment.model)
    tokenizer = save_tokenizer(experiment.model, folder.path / "tokenizer")
    vocabulary = int({**config, **config.get("text_config", {})}.get("vocab_size", tokenizer.vocab_size))
    maker = _Maker(tokenizer, vocabulary, room_for_documents(experiment, context_length(config)))

    data = _read_once(experiment.data)
    train, style = maker.documents(data, "train")
    train.save(folder.path / "data" / "train")
    sets: list[tuple[Data, Split]] = []
    names = []
    for cell in experiment.evaluate:
        source: tuple[Data, Split] = (data, "test") if cell.data is None else (cell.data, "all")
        if source not in sets:
            sets.append(source)
            maker.documents(*source)[0].save(folder.path / "data" / f"evaluation-{len(sets)}")
        names.append(f"evaluation-{sets.index(source) + 1}")
    prepared = Prepared(tuple(names), train.fingerprint, maker.summary, maker.warnings, style)
    folder.write("data/index.json", asdict(prepared))
    return prepared


def _read_once(cell: Data) -> Data:
    """The cell with the records of a callable source: called twice, it might give other ones."""
    if isinstance(cell, (Instructions, Text)) and callable(cell.source):
        return cell.replace(source=load_records(cell, cell.source))
    return cell


def room_for_documents(experiment: Experiment, context: int | None) -> int | None:
    """Tokens of a model's context that an adapter's virtual ones leave to the documents."""
    taken = experiment.virtual.tokens if experiment.virtual is not None else 0
    return None if context is None else context - taken


def sequence_length(data: Data, context: int | None) -> int:
    """Tokens of the longest sequence of a data cell on a model of the given context."""
    return data.max_length or min(DEFAULT_MAX_LENGTH, context or DEFAULT_MAX_LENGTH)


class _Maker:
    """From data cells to documents for one model; keeps counts and warnings."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, context: int | None):
        self.tokenizer, self.vocabulary, self.context = tokenizer, vocabulary, context
        self.summary: dict[str, dict[str, int]] = {}
        self.warnings: list[str] = []

    def documents(self, cell: Data, split: Split) -> tuple[Documents, Style]:
        """The documents of a split, and their style; from memory, where this process has made the same before."""
        key = key_of(cell, split, self.tokenizer.fingerprint, self.vocabulary, self.context)
        made = recall(key) or remember(key, self._make(cell, split))
        self.summary |= made.counts
        self.warnings += made.warnings
        return made.documents, made.style

    def _make(self, cell: Data, split: Split) -> Made:
        name = type(cell).__name__
        max_length = sequence_length(cell, self.context)
        if isinstance(cell, RandomTokens):
            return Made(_random_tokens(cell, split, self.vocabulary, max_length), {}, [], "plain")
        chat = self.tokenizer.render_chat if self.tokenizer.chat_template else None
        records = read_documents(cell, split, chat)
        if not records:
            raise CellError([Problem(name, "holdout", "nothing is held out to evaluate on" if split == "test"
                                     else "no documents are left to train on",
                                     "change `holdout`, or give the evaluation its own `data`")])
        warnings = []
        documents, cut = tokenize(records, self.tokenizer, max_length, cell.overlong)
        if cut and cell.overlong == "error":
            raise CellError([Problem(name, "max_length", f"{cut} of {len(records)} documents are longer than "
                                     f"{max_length} tokens", "raise it, or set `overlong` to truncate or drop")])
        if not len(documents):
            raise CellError([Problem(name, "max_length", "no document keeps anything to learn within "
                                     f"{max_length} tokens", "raise it")])
        if cut and cell.overlong in ("truncate", "drop"):
            verb = "truncated" if cell.overlong == "truncate" else "dropped"
            warnings.append(f"{name}, {split}: {cut} of {len(records)} documents longer than {max_length} tokens "
                            f"were {verb}")
        if empty := sum(document.answer is not None and not document.answer.strip() for document in records):
            warnings.append(f"{name}, {split}: {empty} of {len(records)} responses are empty; of these only the end is "
                            "learned")
        if int(documents.tokens.max()) >= self.vocabulary:
            raise CellError([Problem("Model", "tokenizer", f"it makes token {documents.tokens.max()}, but the "
                                     f"model's vocabulary has {self.vocabulary}", "name the model's own tokenizer")])
        counts = {
            "documents": len(documents), "tokens": len(documents.tokens), "learned": int(documents.learned.sum()),
        }
        return Made(documents, {f"{name}, {split}": counts}, warnings, records[0].style)


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer, max_length: int,
             overlong: str) -> tuple[Documents, int]:
    """Token ids with their loss mask, and the number of documents longer than `max_length` tokens.

    Each document is the tokenizer's own prefix, its segments, and an end-of-sequence token. Segments are
    tokenized apart, so that a prompt has the same tokens whether or not its answer follows. A closed
    document, which a chat template has rendered with all its marks, is tokenized whole and gets neither.
    Documents without a token to learn are left out. `split` gives every window the prefix anew.
    """
    ids: list[list[int]] = []
    learned: list[list[bool]] = []
    answers: list[str] = []
    cut = 0
    for document, (body, mask) in zip(documents, _encoded(documents, tokenizer), strict=True):
        prefix = [] if document.closed else tokenizer.prefix
        room = max_length - len(prefix)
        cut += (too_long := len(body) > room)
        if too_long and overlong == "drop":
            continue
        starts = range(0, len(body), room) if overlong == "split" else (0,)
        for start in starts:
            window, window_mask = body[start : start + room], mask[start : start + room]
            if any((*(False for _ in prefix), *window_mask)[1:]):  # nothing predicts the first token
                ids.append(prefix + window)
                learned.append([False] * len(prefix) + window_mask)
                answers.append(document.answer or "")
    return _pack_arrays(ids, learned, answers if any(item.answer is not None for item in documents) else []), cut


def question_tokens(text: str, style: Style, tokenizer: Tokenizer) -> list[int]:
    """The tokens of what a person says, up to where the model is to answer, as training documents have them."""
    document = question(text, style, tokenizer.render_chat)
    if document.closed:
        return tokenizer.encode_marked(document.segments)[0]
    return tokenizer.prefix + [token for piece in tokenizer.encode([part for part, _ in document.segments])
                               for token in piece]


def _encoded(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """Each document's token ids and which of them are to be learned, without the tokenizer's prefix."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for begin in range(0, len(documents), _BATCH):
        batch = documents[begin : begin + _BATCH]
        encoded = iter(tokenizer.encode([text for item in batch if not item.closed for text, _ in item.segments]))
        for document in batch:
            if document.closed:
                yield tokenizer.encode_marked(document.segments)
                continue
            pieces = [(next(encoded), flag) for _, flag in document.segments] + [(end, True)]
            yield [token for piece, _ in pieces for token in piece], [flag for piece, flag in pieces for _ in piece]


def _pack_arrays(ids: list[list[int]], learned: list[list[bool]], answers: list[str]) -> Documents:
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(item) for item in ids], out=offsets[1:])
    for mask in learned:
        mask[0] = False
    prompts = [_last_start(mask) for mask in learned] if answers else []
    return Documents(
        tokens=np.fromiter((token for item in ids for token in item), dtype=np.int32, count=offsets[-1]),
        learned=np.fromiter((flag for item in learned for flag in item), dtype=np.bool_, count=offsets[-1]),
        offsets=offsets, prompt_lengths=np.array(prompts, dtype=np.int64), answers=tuple(answers),
    )


def _last_start(mask: list[bool]) -> int:
    """Where the last run of True begins: the tokens before it are the prompt of the last answer."""
    end = len(mask) - mask[::-1].index(True)
    start = end
    while start > 0 and mask[start - 1]:
        start -= 1
    return start


def _random_tokens(cell: RandomTokens, split: Split, vocabulary: int, max_length: int) -> Documents:
    if cell.length > max_length:
        raise CellError([Problem("RandomTokens", "length", f"{cell.length} tokens do not fit into sequences of "
                                 f"{max_length}", "lower `length`, or raise `max_length` up to the model's context")])
    count = min(cell.documents, cell.limit or cell.documents) if split != "test" else max(1, cell.documents // 20)
    rng = np.random.default_rng([cell.seed, split == "test"])
    tokens: Any = rng.integers(0, vocabulary, size=count * cell.length, dtype=np.int32)
    learned = np.ones(len(tokens), dtype=np.bool_)
    learned[:: cell.length] = False
    offsets = np.arange(count + 1, dtype=np.int64) * cell.length
    return Documents(tokens, learned, offsets, np.zeros(0, dtype=np.int64))
