"""Questions to a model: what stands before an answer or a choice, as tokens, and what to judge it by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from collie_lab.data.documents import Documents
from collie_lab.data.tokenizer import Tokenizer

__all__ = [
    "Pieces", "Question", "Questions", "Room", "arrange", "continuation", "drawn", "load_questions",
    "tokenize_questions",
]


@dataclass(frozen=True)
class Question:
    """One sample of an evaluation. A model continues `head`, the shots and the prompt, which follow each other."""

    prompt: str
    reference: str | int
    """The right answer; of choices, the right one's number."""
    choices: tuple[str, ...] = ()
    """Continuations, of which the likeliest is the answer; none where the model is to write one."""
    head: str = ""
    shots: tuple[str, ...] = ()
    group: str = ""
    """Its subject or task."""
    fields: dict[str, str] = field(default_factory=dict)
    """What else a judge wants to know."""


@dataclass(frozen=True)
class Questions(Documents):
    """Tokenized questions. A document is a prompt, or a prompt with one of its choices, which alone is `learned`."""

    items: tuple[Question, ...] = ()
    """Without their texts: those are tokens."""

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """The first document of every question, and behind them the number of documents."""
        return np.cumsum([0, *(max(1, len(item.choices)) for item in self.items)])

    def save(self, folder: Path) -> None:
        """Write the arrays and the questions into `folder`."""
        super().save(folder)
        items = [[item.reference, item.choices, item.group, item.fields] for item in self.items]
        (folder / "questions.json").write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")


def load_questions(folder: Path) -> Documents:
    """The documents in a folder; `Questions` where it holds questions."""
    documents, file = Documents.load(folder), folder / "questions.json"
    if not file.is_file():
        return documents
    items = tuple(Question("", reference, tuple(choices), group=group, fields=fields)
                  for reference, choices, group, fields in json.loads(file.read_text(encoding="utf-8")))
    return Questions(**vars(documents), items=items)


def drawn(count: int, limit: int | None) -> NDArray[np.int64]:
    """Which of `count` documents an evaluation with this limit takes: a fixed random sample, in order."""
    if limit is None or limit >= count:
        return np.arange(count)
    # Files are often sorted, by topic or label: the first documents would be no fair sample.
    return np.sort(np.random.default_rng(0).permutation(count)[:limit])


@dataclass(frozen=True)
class Room:
    """What fits a model: `context` tokens in one sequence, `answer` of them for a written answer."""

    context: int | None
    answer: int = 0
    overlong: Literal["drop_shots", "truncate"] = "drop_shots"

    @property
    def prompt(self) -> int:
        """Tokens of the longest prompt before a written answer."""
        return 2**31 if self.context is None else self.context - self.answer

    @property
    def document(self) -> int:
        """Tokens of the longest prompt with a choice: nothing is predicted from its last token."""
        return 2**31 if self.context is None else self.context + 1


def tokenize_questions(questions: Sequence[Question], tokenizer: Tokenizer, room: Room) -> tuple[Questions, list[str]]:
    """Token ids of all questions, and a sentence for each way in which some of them did not fit.

    Raises:
        ValueError: a choice has no tokens, or more than the model's context; a prompt without any.
    """
    fitted, documents, dropped = list(questions), _encoded(questions, tokenizer), 0
    if room.overlong == "drop_shots":
        while tight := [place for place, pieces in enumerate(documents)
                        if fitted[place].shots and not _fits(pieces, room)]:
            dropped = dropped or len(tight)
            for place in tight:
                fitted[place] = replace(fitted[place], shots=fitted[place].shots[:-1])
            for place, pieces in zip(tight, _encoded([fitted[place] for place in tight], tokenizer), strict=True):
                documents[place] = pieces
    found, said = arrange(documents, questions, room)
    if dropped:
        least, most = (limit(len(item.shots) for item in fitted) for limit in (min, max))
        said.insert(0, f"{dropped} of {len(questions)} prompts do not fit the model's context of {room.context} tokens "
                       f"with all their examples and have fewer ({least} to {most} each)")
    return found, said


Pieces = tuple[list[int], list[int]]
"""The tokens of a prompt, and those of what follows it."""


def _encoded(questions: Sequence[Question], tokenizer: Tokenizer) -> list[list[Pieces]]:
    """For every question a pair of prompt and choice for each choice, or one without a choice."""
    prompts = [item.head + "".join(item.shots) + item.prompt for item in questions]
    asked = [(prompt, choice) for item, prompt in zip(questions, prompts, strict=True) for choice in item.choices]
    split = iter(continuation(asked, tokenizer))
    written = iter(tokenizer.encode([text for item, text in zip(questions, prompts, strict=True) if not item.choices]))
    return [[next(split) for _ in item.choices] if item.choices
            else [(_begun(tokenizer.prefix + next(written), tokenizer), [])] for item in questions]


def continuation(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[Pieces]:
    """The tokens of each text and of what continues it, split where the text's own tokens end.

    Both are tokenized as one text, blanks between them with the second, as lm-eval does: so words begin where they
    would if the model had written them.
    """
    joined = [(text.rstrip(), text[len(text.rstrip()):] + more) for text, more in pairs]
    whole = tokenizer.encode([text + more for text, more in joined])
    texts = sorted({text for text, _ in joined})
    lengths = dict(zip(texts, map(len, tokenizer.encode(texts)), strict=True))
    found = []
    for (text, more), ids in zip(joined, whole, strict=True):
        begin = lengths[text]
        if begin == len(ids):
            raise ValueError(f"{more!r} has no tokens of its own after {text[-40:]!r}")
        found.append((_begun(tokenizer.prefix + ids[:begin], tokenizer), ids[begin:]))
    return found


def _begun(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The ids; of an empty text, the token that ends documents."""
    if not ids and tokenizer.eos_id is None:
        raise ValueError("an empty prompt, and the tokenizer has no token to begin with")
    return ids or [tokenizer.eos_id]  # type: ignore[list-item]


def _fits(group: list[Pieces], room: Room) -> bool:
    return all(len(prompt) + len(choice) <= (room.document if choice else room.prompt) for prompt, choice in group)


def _shortened(prompt: list[int], choice: list[int], room: Room) -> Pieces:
    """Cut on the left, the tokenizer's own first token too, as lm-eval does."""
    size = room.document - len(choice) if choice else room.prompt
    if size < 1:
        raise ValueError(f"a choice of {len(choice)} tokens does not fit the model's context of {room.context}")
    return prompt[-size:], choice


def arrange(groups: Sequence[list[Pieces]], questions: Sequence[Question], room: Room) -> tuple[Questions, list[str]]:
    """The questions with the tokens of their prompts and choices, cut on the left to what fits; how many were.

    Raises:
        ValueError: a choice alone has more tokens than the model's context.
    """
    said = []
    if cut := sum(not _fits(group, room) for group in groups):
        said.append(f"{cut} of {len(groups)} prompts do not fit the model's context of {room.context} tokens and were "
                    "cut on the left")
    pieces = [_shortened(*piece, room) for group in groups for piece in group]
    lengths = np.array([len(prompt) for prompt, _ in pieces], dtype=np.int64)
    offsets = np.cumsum([0, *(len(prompt) + len(choice) for prompt, choice in pieces)])
    tokens = np.fromiter((token for piece in pieces for part in piece for token in part), np.int32, count=offsets[-1])
    learned = np.ones(len(tokens), dtype=np.bool_)
    for begin, length in zip(offsets[:-1], lengths, strict=True):
        learned[begin : begin + length] = False
    items = tuple(replace(item, prompt="", head="", shots=()) for item in questions)
    return Questions(tokens, learned, offsets, lengths, items=items), said
