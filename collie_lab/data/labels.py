"""Labels of a classification; by likelihood: which of them follows each prompt, as training documents would have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from collie_lab.cells import CellError, Classification, Problem
from collie_lab.data.questions import Pieces, Question, Questions, Room, arrange, drawn
from collie_lab.data.records import Document
from collie_lab.data.tokenize import encode, last_start
from collie_lab.data.tokenizer import Tokenizer

__all__ = ["check_labels", "label_questions"]


def check_labels(cell: Classification, answers: Sequence[str]) -> None:
    """Whether the labels that a cell names are all that the responses are.

    Raises:
        CellError: a response is none of them; it would be wrong whatever the model answers.
    """
    # Answers are compared without outer blanks; in what a model finds likely these count.
    known, found = ({text.strip() if cell.by == "answer" else text for text in texts}
                    for texts in (cell.labels, answers))
    if cell.labels and (unknown := sorted(found - known)):
        raise CellError([Problem(type(cell).__name__, "labels", f"{len(unknown)} responses of the data are none of "
                                 f"them, as {unknown[0]!r:.80}", "name them all, or leave `labels` out")])


def label_questions(cell: Classification, documents: Sequence[Document], tokenizer: Tokenizer,
                    context: int | None) -> tuple[Questions, list[str]]:
    """A question with all labels for every document, and a sentence for each way in which some did not fit.

    Raises:
        CellError: a response is none of the labels.
        ValueError: a label is longer than the model's context.
    """
    documents = [documents[place] for place in drawn(len(documents), cell.limit)]
    answers = [document.answer or "" for document in documents]
    check_labels(cell, answers)
    labels = cell.labels or tuple(sorted(set(answers)))
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
