"""Classification by likelihood: which label follows each prompt, as the training documents would have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from collie_lab.cells import Classification
from collie_lab.data.questions import Pieces, Question, Questions, Room, arrange, drawn
from collie_lab.data.records import Document
from collie_lab.data.tokenize import encode, last_start
from collie_lab.data.tokenizer import Tokenizer

__all__ = ["label_questions"]


def label_questions(cell: Classification, documents: Sequence[Document], tokenizer: Tokenizer,
                    context: int | None) -> tuple[Questions, list[str]]:
    """A question with all labels for every document, and a sentence for each way in which some did not fit.

    Raises:
        ValueError: a response is none of the labels; a label is longer than the model's context.
    """
    documents = [documents[place] for place in drawn(len(documents), cell.limit)]
    answers = [document.answer or "" for document in documents]
    labels = cell.labels or tuple(sorted(set(answers)))
    if unknown := sorted(set(answers) - set(labels)):
        raise ValueError(f"{len(unknown)} responses are none of the labels, as {unknown[0]!r}")
    groups: list[list[Pieces]] = []
    for document in documents:
        labelled = [_answered(document, label) for label in labels]
        prefix = [] if document.closed else tokenizer.prefix
        groups.append([(prefix + tokens[:last_start(mask)], tokens[last_start(mask):])
                       for tokens, mask in encode(labelled, tokenizer).apart()])
    return arrange(groups, [Question("", labels.index(answer), labels) for answer in answers], Room(context))


def _answered(document: Document, label: str) -> Document:
    """The document with another last answer."""
    *before, (text, _) = document.segments
    return replace(document, segments=(*before, (text.replace(document.answer or "", label, 1), True)), answer=label)
