"""Tokenization, once, before any process starts: what is wrong with the data is known by then."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from collie_lab import sandbox
from collie_lab.cells import (
    CellError,
    Classification,
    Data,
    Evaluation,
    Experiment,
    HeldOut,
    HumanEval,
    LMEval,
    Problem,
    RandomTokens,
)
from collie_lab.data import cache
from collie_lab.data._memory import Made, key_of, recall, remember
from collie_lab.data.benchmarks import read_questions
from collie_lab.data.documents import Documents, Writer
from collie_lab.data.hub import context_length, model_config, vocabulary_size
from collie_lab.data.labels import check_labels, label_questions
from collie_lab.data.lm_eval_tasks import check_tasks
from collie_lab.data.progress import Progress
from collie_lab.data.questions import Room, arrange, drawn, tokenize_questions
from collie_lab.data.records import Corpus, Document, Split, Style, question
from collie_lab.data.tokenize import Tally, tokenize, tokenize_into
from collie_lab.data.tokenizer import Tokenizer
from collie_lab.data.vocabulary import Extension, make_tokenizer
from collie_lab.folder import RunFolder

__all__ = ["DEFAULT_MAX_LENGTH", "Prepared", "answer_problem", "prepare", "question_tokens", "room_for_documents",
           "sequence_length", "tokenize"]

#: Tokens of a sequence where neither the data cell nor the model's context says less.
DEFAULT_MAX_LENGTH = 2048
#: Fields of a data cell that say how documents are used, and not what they are.
_USES: Final = {"packing", "shuffle", "group_by_length"}


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
    extension: Extension | None = None
    """What the model's vocabulary is extended by."""


def prepare(experiment: Experiment, folder: RunFolder) -> Prepared:
    """Write the tokenizer, the training documents and every evaluation's documents into the run folder.

    Ranks map the arrays into memory; none of them tokenizes.

    Raises:
        CellError: a missing file, an empty source, a record without its field, documents that are too long
            where `overlong="error"`, token ids that the model does not know, nothing held out to evaluate,
            an evaluation that the model's context has no room for.
    """
    config = model_config(experiment.model)
    data = experiment.data
    rows = vocabulary_size(config)
    tokenizer, extension, warnings = make_tokenizer(experiment.model, data, rows, folder.path / "tokenizer")
    vocabulary = extension.rows if extension else rows or tokenizer.vocab_size
    with cache.scratch(folder.path) as scratch:
        room = room_for_documents(experiment, context_length(config))
        maker = _Maker(tokenizer, vocabulary, room, Path(scratch))
        maker.warnings += warnings
        train, style = maker.documents(data, "train")
        train.save(folder.path / "data" / "train")
        sets: list[tuple[Data, Split] | Evaluation] = []
        made: list[Documents] = []
        names = []
        for cell in experiment.evaluate:
            if problem := answer_problem(cell, room):
                raise CellError([problem])
            source = _source(cell, data)
            if source not in sets:
                sets.append(source)
                made.append(maker.documents(*source)[0] if isinstance(source, tuple) else maker.questions(cell, data))
                made[-1].save(folder.path / "data" / f"evaluation-{len(sets)}")
            if isinstance(source, tuple):
                maker.look_at(cell, made[sets.index(source)])
            names.append(f"evaluation-{sets.index(source) + 1}")
    prepared = Prepared(tuple(names), train.fingerprint, maker.summary, maker.warnings, style, extension)
    folder.write("data/index.json", asdict(prepared))
    return prepared


def _source(cell: Evaluation, data: Data) -> tuple[Data, Split] | Evaluation:
    """What an evaluation runs on: the documents of a data cell, or questions of its own."""
    if not isinstance(cell, HeldOut) or (isinstance(cell, Classification) and cell.by == "likelihood"):
        return cell
    return _held_out(cell, data)


def _held_out(cell: HeldOut, data: Data) -> tuple[Data, Split]:
    return (data, "test") if cell.data is None else (cell.data, "all")


def room_for_documents(experiment: Experiment, context: int | None) -> int | None:
    """Tokens of a model's context that an adapter's virtual ones leave to the documents."""
    taken = experiment.virtual.tokens if experiment.virtual is not None else 0
    return None if context is None else context - taken


def answer_problem(cell: Evaluation, context: int | None) -> Problem | None:
    """An evaluation whose answers may take all of a model's context; None where there is room for a prompt."""
    answer = _answer_tokens(cell)
    if not answer or context is None or answer < context:
        return None
    return Problem(type(cell).__name__, "max_new_tokens", f"{answer} tokens leave nothing of the model's context of "
                   f"{context} for a prompt", "lower it")


def _answer_tokens(cell: Evaluation) -> int:
    """Of the longest answer that an evaluation lets a model write."""
    written = not (isinstance(cell, Classification) and cell.by == "likelihood")
    return getattr(cell, "max_new_tokens", 0) if written else 0


def sequence_length(data: Data, context: int | None) -> int:
    """Tokens of the longest sequence of a data cell on a model of the given context."""
    return data.max_length or (DEFAULT_MAX_LENGTH if context is None else min(DEFAULT_MAX_LENGTH, context))


class _Maker:
    """From data cells to documents for one model; keeps counts and warnings. Training documents come first."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, context: int | None, scratch: Path):
        self.tokenizer, self.vocabulary, self.context, self._scratch = tokenizer, vocabulary, context, scratch
        self.summary: dict[str, dict[str, int]] = {}
        self.warnings: list[str] = []
        self._corpora: dict[int, Corpus] = {}
        self._trained: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)

    def documents(self, cell: Data, split: Split) -> tuple[Documents, Style]:
        """The documents of a split, and their style; from memory, where this process has made the same before."""
        key = key_of(cell, split, self.tokenizer.fingerprint, self.vocabulary, self.context)
        made = recall(key) or remember(key, self._make(cell, split))
        self.summary |= made.counts
        self.warnings += made.warnings
        if split == "train":
            self._trained = made.keys
        elif leaks := int(np.isin(made.keys, self._trained).sum()):
            self.warnings.append(f"{type(cell).__name__}, {split}: {leaks} of {len(made.keys)} documents to evaluate "
                                 "on ask, or are, what also stands in the training data")
        return made.documents, made.style

    def questions(self, cell: Evaluation, data: Data) -> Documents:
        """The questions of an evaluation that has its own."""
        if isinstance(cell, LMEval):
            check_tasks(cell)
            return arrange([], [], Room(None))[0]  # lm-eval asks on the ranks
        name = type(cell).__name__
        if isinstance(cell, HumanEval) and cell.execute and (reason := sandbox.unavailable()):
            raise CellError([Problem(name, "execute", f"no sandbox for programs here: {reason}",
                                     "leave it out: the completions are kept, and can be judged elsewhere")])
        try:
            if isinstance(cell, Classification):
                questions, said = label_questions(cell, self._records(*_held_out(cell, data)), self.tokenizer,
                                                  self.context)
            else:
                room = Room(self.context, _answer_tokens(cell), getattr(cell, "overlong", "truncate"))
                questions, said = tokenize_questions(read_questions(cell), self.tokenizer, room)
        except ValueError as error:
            raise error if isinstance(error, CellError) else CellError([Problem(name, "", str(error))]) from None
        self._check_known(questions)
        self.warnings += [f"{cell.name or name}: {text}" for text in said]
        self.summary |= {f"{cell.name or name}": {"questions": len(questions.items),
                         "tokens": len(questions.tokens)}}
        return questions

    def look_at(self, cell: Evaluation, documents: Documents) -> None:
        """Refuse, or count, what an evaluation cannot make of the documents that it asks."""
        asked, answer = drawn(len(documents), cell.limit), _answer_tokens(cell)
        if isinstance(cell, Classification):
            check_labels(cell, [documents.answers[place] for place in asked])
        # The prompts are those of training, and stay whole: it is the answers that end at the context.
        prompts = documents.prompt_lengths[asked] if len(documents.prompt_lengths) else np.zeros(0, dtype=np.int64)
        if answer and self.context is not None and (short := int((prompts + answer > self.context).sum())):
            self.warnings.append(f"{cell.name or type(cell).__name__}: {short} of {len(asked)} answers have room for "
                                 f"less than {answer} tokens: the model's context of {self.context} ends them")

    def _check_known(self, documents: Documents) -> None:
        if (largest := int(documents.tokens.max())) >= self.vocabulary:
            raise CellError([Problem("Model", "tokenizer", f"it makes token {largest}, but the model's vocabulary has "
                                     f"{self.vocabulary}", "name the model's own tokenizer")])

    def _records(self, cell: Data, split: Split) -> list[Document]:
        return list(self._corpus(cell).select(split))

    def _make(self, cell: Data, split: Split) -> Made:
        """The documents of a split, from the cache on disk or anew."""
        if isinstance(cell, RandomTokens):
            max_length = sequence_length(cell, self.context)
            return Made(_random_tokens(cell, split, self.vocabulary, max_length), {}, [], "plain")
        content = self._corpus(cell).content
        if not content or callable(getattr(cell, "format", None)):
            return self._tokenize(cell, split)
        fields = {name: value for name, value in cell if name not in {*_USES, "source"}}
        key = cache.key_of(type(cell).__name__, fields, content, split, self.tokenizer.fingerprint, self.vocabulary,
                           self.context)
        try:
            if found := cache.find(key):
                documents, keys, told = found
                return Made(documents, told["counts"], told["warnings"], told["style"], keys)
        except cache.DamagedEntryError as error:
            self.warnings.append(f"{type(cell).__name__}, {split}: tokenized anew: the cache was damaged: {error}")
        made = self._tokenize(cell, split)
        facts = {"counts": made.counts, "warnings": made.warnings, "style": made.style}
        cache.keep(key, made.documents, made.keys, facts)
        return made

    def _corpus(self, cell: Data) -> Corpus:
        """The documents of a cell, opened once: a function that is called twice might give other records."""
        if id(cell) not in self._corpora:
            chat = self.tokenizer.render_chat if self.tokenizer.chat_template else None
            self._corpora[id(cell)] = Corpus(cell, chat, hashed=cache.cache_folder() is not None)
        return self._corpora[id(cell)]

    def _tokenize(self, cell: Data, split: Split) -> Made:
        name, max_length = type(cell).__name__, sequence_length(cell, self.context)
        selection, tally = self._corpus(cell).select(split), Tally()
        writer = Writer(self._scratch / f"{id(cell)}-{split}")
        with Progress(f"{name}, {split}: tokenizing", lambda: selection.count) as progress:
            for block in tokenize_into(tally, selection, self.tokenizer, max_length, cell.overlong,
                                       answers=split != "train", measured=split != "train"):
                writer.add(block)
                progress.advance(tally.documents - progress.done)
        documents = writer.finish()
        tally.blank, tally.texts = self._corpus(cell).blank(split)
        self._refuse(cell, split, tally, documents, selection.moved)
        counts = {
            "documents": len(documents), "tokens": len(documents.tokens), "learned": int(documents.learned.sum()),
        }
        return Made(documents, {f"{name}, {split}": counts}, _remarks(cell, split, tally, max_length, selection.moved),
                    cast("Style", tally.style), np.concatenate(tally.keys))

    def _refuse(self, cell: Data, split: Split, tally: Tally, documents: Documents, moved: int) -> None:
        """Raise where nothing is left, or where there is what may not be."""
        name, max_length = type(cell).__name__, sequence_length(cell, self.context)
        if not tally.documents:
            what = "nothing is held out to evaluate on" if split == "test" else "no documents are left to train on"
            why = f": {moved} of those drawn for it repeat records of the training split" if moved else ""
            raise CellError([Problem(name, "holdout", what + why,
                                     "change `holdout`, or give the evaluation its own `data`")])
        if tally.overlong and cell.overlong == "error":
            raise CellError([Problem(name, "max_length", f"{tally.overlong} of {tally.documents} documents are longer "
                                     f"than {max_length} tokens", "raise it, or set `overlong` to truncate or drop")])
        if not len(documents) and not tally.overlong:
            raise CellError([Problem(name, "source", "no document has anything to learn, though none is too long",
                                     "give it responses, or texts, that are not empty")])
        if not len(documents):
            raise CellError([Problem(name, "max_length", "no document keeps anything to learn within "
                                     f"{max_length} tokens", "raise it")])
        self._check_known(documents)


def _remarks(cell: Data, split: Split, tally: Tally, max_length: int, moved: int) -> list[str]:
    """What a person should know of what became of the documents."""
    where, of = f"{type(cell).__name__}, {split}: ", f"of {tally.documents}"
    remarks = []
    if tally.blank:
        remarks.append(f"{where}{tally.blank} of {tally.texts} texts are blank, and were left out")
    if tally.overlong and cell.overlong in ("truncate", "drop"):
        verb = "truncated" if cell.overlong == "truncate" else "dropped"
        remarks.append(f"{where}{tally.overlong} {of} documents longer than {max_length} tokens were {verb}")
    if tally.unlearnable:
        remarks.append(f"{where}{tally.unlearnable} {of} documents have nothing to learn within {max_length} tokens, "
                       "and were left out")
    if tally.empty:
        remarks.append(f"{where}{tally.empty} of {tally.responses} responses are empty; of these only the end is "
                       "learned")
    if tally.partial:
        remarks.append(f"{where}of {tally.partial} {of} chats only the last reply is learned: the tokenizer's template "
                       "rewrites the earlier ones")
    if tally.unknown:
        remarks.append(f"{where}{tally.unknown} of {tally.tokens} tokens ({tally.unknown / tally.tokens:.2%}) are the "
                       "tokenizer's mark for what it lacks: another one may know that text")
    if moved and split == "train":
        remarks.append(f"{where}{moved} records that repeat another one went where that is, so that none stands in "
                       "train and test")
    return remarks


def question_tokens(text: str, style: Style, tokenizer: Tokenizer) -> list[int]:
    """The tokens of what a person says, up to where the model is to answer, as training documents have them."""
    document = question(text, style, tokenizer.render_chat)
    if document.closed:
        return tokenizer.encode_marked([document.segments])[0][0]
    return tokenizer.prefix + [token for piece in tokenizer.encode([part for part, _ in document.segments])
                               for token in piece]


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
