"""From a data cell to documents: text in segments, each with or without loss."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from collie_lab.cells import Data, Instructions, Skills, Text
from collie_lab.data.progress import Progress
from collie_lab.data.skills import make_skills
from collie_lab.data.sources import Anew, Source, open_source, problem

__all__ = ["Corpus", "Document", "Selection", "Split", "Style", "hold_out", "question", "read_documents"]

Split = Literal["train", "test", "all"]
Style = Literal["plain", "line", "alpaca", "clinc", "headed", "chat"]
Render = Callable[[list[dict[str, str]]], list[tuple[str, bool]]]
"""From messages to segments, by a tokenizer's chat template."""

#: Who speaks in a chat.
_ROLES: Final = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Document:
    """Text in segments; the flag says whether the loss counts a segment."""

    segments: tuple[tuple[str, bool], ...]
    answer: str | None = None
    """What a model should say after all but the last segment with loss."""
    closed: bool = False
    """The text has its own end mark (a chat template's); else an end-of-sequence token is added."""
    style: Style = "plain"
    """What stands around what a person says."""
    partial: bool = False
    """Not every reply of a chat is to be learned, since its template rewrites earlier ones."""
    empty: int = 0
    """How many of the responses to be learned are blank."""

    @property
    def key(self) -> int:
        """A 64-bit hash of what is asked first; of the whole text where nothing is asked.

        Documents of one key may not stand in train and test at once.
        """
        asked = "".join(text for text, _ in itertools.takewhile(lambda segment: not segment[1], self.segments)).strip()
        text = asked or "".join(text for text, _ in self.segments).strip()
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
        return int.from_bytes(digest.digest(), "little")


def read_documents(cell: Data, split: Split, render_chat: Render | None = None) -> list[Document]:
    """The documents of one split, in the order of the source, all in memory; see `Corpus.select`.

    Raises:
        CellError: a missing or unreadable file, an empty source, a record without its field.
    """
    return list(Corpus(cell, render_chat).select(split))


@dataclass(frozen=True)
class Selection:
    """Documents of one split, read anew whenever they are iterated over."""

    read: Callable[[], Iterator[Document]]
    moved: int = 0
    """Of the whole source: how many went to the other split, since an earlier one has the same key."""
    size: int | None = None
    """How many there are, where that is known."""

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    @cached_property
    def count(self) -> int:
        """How many there are; where it is not known, by reading them."""
        return sum(1 for _ in self.read()) if self.size is None else self.size


class Corpus:
    """The documents of a data cell. They are read one by one, and may be more than memory holds.

    Args:
        cell: Instructions, Text or Skills.
        render_chat: from messages to segments, by the tokenizer's chat template; default: a plain one.
        hashed: whether to find out `content`, for which files are read once more.

    Raises:
        CellError: a source that does not open; a record that cannot be read is raised on the way.
    """

    def __init__(self, cell: Data, render_chat: Render | None = None, *, hashed: bool = False):
        self._cell, self._render = cell, render_chat
        self._blank = (0, 0)
        if isinstance(cell, Skills):
            self._source = Source("skills", Anew(partial(_skills, cell, "train")), Anew(partial(_skills, cell, "test")))
        elif isinstance(cell, (Instructions, Text)):
            self._source = open_source(cell, hashed=hashed)
        else:
            raise TypeError(f"{type(cell).__name__} has no text")

    @property
    def content(self) -> str:
        """A hash of all records; "" where it is not known."""
        return self._source.content

    def read_all(self) -> None:
        """Read every record, of a test split too, and forget it: what cannot be read is raised."""
        with Progress(f"{type(self._cell).__name__}: checking every record") as progress:
            for records in (self._source.train, self._source.test):
                if records is not None:
                    for _ in progress.each(self._documents(records, self._render)):
                        pass

    def first(self, render: Render | None = None) -> Document:
        """The first document of the training split; a chat is rendered by `render`."""
        return next(self._documents(self._source.train, render))

    def blank(self, split: Split) -> tuple[int, int]:
        """Of what a split is drawn from, once it has been read: how many texts are blank, which are no documents, and
        of how many. (0, 0) where the training split is drawn from the same, and tells of them."""
        return (0, 0) if split == "test" and self._source.test is None else self._blank

    def select(self, split: Split) -> Selection:
        """The documents of a split: `train`, `test` (the source's own test split, or the held-out share), or `all`
        for a source that an evaluation names itself (still the test split where the source has one of its own). The
        cell's `limit` is for what is trained on, and for what an evaluation names."""
        if self._source.test is not None:
            own = self._source.train if split == "train" else self._source.test
            selection = Selection(lambda: self._documents(own, self._render))
        else:
            selection = self._part(split)
        limit = self._cell.limit
        if split == "test" or limit is None or selection.count <= limit:
            return selection
        # Files are often sorted, by topic or label: the first records would be no fair sample.
        drawn = np.zeros(selection.count, dtype=np.bool_)
        drawn[random.Random(0).sample(range(selection.count), limit)] = True
        return Selection(lambda: itertools.compress(selection, drawn), selection.moved, limit)

    def _part(self, split: Split) -> Selection:
        """A split of a source that has none of its own."""
        cell, holdout = self._cell, getattr(self._cell, "holdout", 0.0)
        if split == "all" or (split == "train" and not holdout):
            return Selection(lambda: self._documents(self._source.train, self._render))
        if isinstance(cell, Text) and len(self._keys) == 1:
            (document,) = self._documents(self._source.train, self._render)
            return Selection(lambda: iter(_part_of_text(document, holdout, split)))
        chosen, moved = hold_out(self._keys, holdout)
        wanted = chosen if split == "test" else ~chosen
        return Selection(lambda: itertools.compress(self._documents(self._source.train, self._render), wanted), moved,
                         int(wanted.sum()))

    @cached_property
    def _keys(self) -> NDArray[np.uint64]:
        """The key of every document; chats are rendered plainly for it, which is quick."""
        documents = self._documents(self._source.train, None)
        with Progress(f"{type(self._cell).__name__}: looking for repeats") as progress:
            return np.fromiter((document.key for document in progress.each(documents)), dtype=np.uint64)

    def _documents(self, records: Iterable[Any], render: Render | None) -> Iterator[Document]:
        match self._cell:
            case Skills():
                return (_pair(f"{prompt}\n", answer, "line") for prompt, answer in records)
            case Text():
                return self._texts(self._cell, records)
        assert isinstance(self._cell, Instructions)
        return _instructions(self._cell, records, self._source, render)

    def _texts(self, cell: Text, records: Iterable[Any]) -> Iterator[Document]:
        """A document for every text that is not blank; the blank ones are counted."""
        read = blank = 0
        for index, record in enumerate(records):
            document, read = _text(cell, record, index, self._source), read + 1
            if document.segments[0][0].strip():
                yield document
            else:
                blank += 1
        if read == blank:
            raise problem(cell, "source", f"{self._source.name} holds no text", "give it at least one document")
        self._blank = blank, read


def _skills(cell: Skills, split: Split) -> Iterator[tuple[str, str]]:
    return iter(make_skills(cell, split))


def hold_out(keys: NDArray[np.uint64], holdout: float) -> tuple[NDArray[np.bool_], int]:
    """Which documents are the test split, and how many are not where the draw had put them.

    A share is drawn by a fixed shuffle that no other setting moves. Then a document whose key an earlier one has goes
    where that one is: nothing stands in train and test at once. What is repeated so often that it would be more than
    the whole test split stays in train.
    """
    drawn, share = np.zeros(len(keys), dtype=np.bool_), round(len(keys) * holdout)
    drawn[random.Random(0).sample(range(len(keys)), share)] = True
    _, first, group, repeats = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    chosen: NDArray[np.bool_] = (drawn[first] & (repeats <= share))[group]
    return chosen, int((chosen != drawn).sum())


def question(text: str, style: Style, render_chat: Render) -> Document:
    """What a person says, as documents of a style have it before the answer that is to come; `closed` as theirs are."""
    match style:
        case "alpaca":
            return Document(((_alpaca_prompt(text), False),))
        case "clinc":
            return Document(((_clinc_prompt(text), False),))
        case "chat":
            turn = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
            return Document((render_chat(turn)[0],), closed=True)
        case "headed":
            return Document(((f"### User:\n{text}\n\n### Assistant:\n", False),))
        case "line":
            return Document(((f"{text}\n", False),))
    return Document(((text, False),))


def _pair(prompt: str, answer: str, style: Style = "plain") -> Document:
    if not (isinstance(prompt, str) and isinstance(answer, str)):
        raise TypeError("prompt and response must be text")
    return Document(((prompt, False), (answer, True)), answer, style=style, empty=not answer.strip())


# --- instructions ---------------------------------------------------------------------------------


def _instructions(cell: Instructions, records: Iterable[Any], source: Source, render: Render | None
                  ) -> Iterator[Document]:
    reader = None
    for index, record in enumerate(records):
        reader = reader or _reader(cell, record, source.name, render)
        try:
            document = reader(record)
            for text, _ in document.segments:
                _check_characters(text)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            missing = f"has no field {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
            remedy = "mend the record, or " + ("the function" if callable(cell.format) else
                                               "give `format` a function from a record to (prompt, response)")
            raise problem(cell, "source", f"{source.place(index)} {missing}: {record!r:.120}",
                          remedy) from error.__cause__
        yield document
    if reader is None:
        raise problem(cell, "source", f"{source.name} holds no records", "give it at least one")


def _check_characters(text: str) -> None:
    """Raise a ValueError where UTF-8, and so a tokenizer, has nothing for a character: JSON may hold half of one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[max(0, error.start - 20) : error.start]
        raise ValueError(f"{text[error.start]!r} after {before!r} is half of a surrogate pair, no character") from None


def _reader(cell: Instructions, first: Any, name: str, render: Render | None) -> Callable[[Any], Document]:
    """The reader of one format; `auto` goes by the fields of the first record."""
    if callable(cell.format):
        return partial(_formatted, cell.format)
    keys = first.keys() if isinstance(first, dict) else ()
    fields = {"alpaca": "instruction", "prompt_completion": "prompt", "chat": "messages"}
    found = next((format_ for format_, field in fields.items() if field in keys), "clinc" if _is_pair(first) else "")
    match found if cell.format == "auto" else cell.format:
        case "alpaca":
            return _alpaca
        case "prompt_completion":
            return lambda record: _pair(record["prompt"], record["completion"])
        case "chat":
            return lambda record: _chat(record, render)
        case "clinc":
            return _clinc
    raise problem(cell, "format", f"the records of {name} fit no known format: {first!r:.120}",
                  "name their format, or give a function from a record to (prompt, response)")


def _formatted(function: Callable[[Any], tuple[str, str]], record: Any) -> Document:
    try:
        found = function(record)
    except Exception as error:  # it is the user's, and may raise anything
        raise ValueError(f"`format` raised {error!r}") from error
    if not (isinstance(found, (list, tuple)) and len(found) == 2):
        raise TypeError(f"`format` gave {found!r:.60}, not (prompt, response)")
    return _pair(*found)


def _alpaca(record: dict[str, Any]) -> Document:
    """Taori et al. 2023: instruction, optional input, output; here without the fixed preamble."""
    given = record.get("input")
    if isinstance(given, float) and math.isnan(given):  # how pandas says that a value is missing
        given = None
    if not (given is None or isinstance(given, str)):
        raise TypeError(f"`input` must be text, not {type(given).__name__}")
    context = f"### Input:\n{given}\n\n" if given else ""
    return _pair(_alpaca_prompt(record["instruction"], context), record["output"], "alpaca")


def _alpaca_prompt(instruction: str, context: str = "") -> str:
    return "### Instruction:\n" + instruction + f"\n\n{context}### Response:\n"  # a TypeError for what is no text


def _chat(record: dict[str, Any], render: Render | None) -> Document:
    messages = record["messages"]
    for message in messages:
        if message["role"] not in _ROLES:
            raise TypeError(f"unknown role {message['role']!r}; there are {', '.join(_ROLES)}")
        if not isinstance(message["content"], str):
            raise TypeError(f"the content of a message must be text, not {type(message['content']).__name__}")
    answered = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answered:
        raise TypeError("no message of the assistant")
    messages = messages[: answered[-1] + 1]  # what nobody answers teaches nothing
    segments = render(messages) if render else _plain_chat(messages)
    learned = sum(flag for _, flag in segments)
    empty = sum(not messages[index]["content"].strip() for index in answered[-learned:])
    return Document(tuple(segments), messages[-1]["content"], closed=render is not None,
                    style="chat" if render else "headed", partial=learned < len(answered), empty=empty)


def _plain_chat(messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
    """For tokenizers without a chat template: a heading before every message."""
    segments = []
    for message in messages:
        segments.append((f"### {message['role'].capitalize()}:\n", False))
        segments.append((message["content"] + "\n\n", message["role"] == "assistant"))
    return segments


def _clinc_prompt(text: str) -> str:
    return f"Query: {text}\nIntent: "


def _is_pair(record: Any) -> bool:
    return isinstance(record, (list, tuple)) and len(record) == 2 and all(isinstance(part, str) for part in record)


def _clinc(record: Any) -> Document:
    """Larson et al. 2019: a text and its intent."""
    if not _is_pair(record):
        raise TypeError("no [text, intent] pair")
    return _pair(_clinc_prompt(record[0]), record[1].replace("_", " "), "clinc")


# --- text -----------------------------------------------------------------------------------------


def _text(cell: Text, record: Any, index: int, source: Source) -> Document:
    named = isinstance(record, dict) and "text" in record
    text = record["text"] if named else record
    try:
        if not isinstance(text, str):
            raise TypeError(f"its `text` is {type(text).__name__}" if named else "no string, and no `text` field")
        _check_characters(text)
    except (TypeError, ValueError) as error:
        raise problem(cell, "source", f"{source.place(index)} cannot be read ({error}): {record!r:.120}",
                      "mend the record; what is missing is an empty text, or left out") from None
    return Document(((text, True),))


def _part_of_text(document: Document, holdout: float, split: Split) -> list[Document]:
    """Of a single document the end is held out, from a blank on."""
    text = document.segments[0][0]
    cut = text.find(" ", int(len(text) * (1 - holdout)))
    cut = len(text) if cut < 0 else cut
    part = text[:cut] if split == "train" else text[cut:]
    return [Document(((part, True),))] if part.strip() else []
