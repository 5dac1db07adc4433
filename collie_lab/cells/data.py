"""The data cells: instructions, plain text, random tokens, and the generated skills."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from collie_lab.cells._base import Cell
from collie_lab.cells.model import Model

if TYPE_CHECKING:
    from collie_lab.view.preview import Preview

__all__ = ["SKILLS", "Data", "Instructions", "RandomTokens", "Skills", "Text"]

Record = dict[str, Any]
Format = Literal["auto", "alpaca", "prompt_completion", "chat", "clinc"]


def _source(*kinds: type) -> BeforeValidator:
    """For sources, which are read more than once, and whose lists hold nothing but items of these kinds."""
    wanted, remedy = ("a text or a record", '{"text": ...}') if str in kinds else \
        ("a record", '{"prompt": ..., "completion": ...}, as df.to_dict("records") has them')

    def check(source: Any) -> Any:
        if isinstance(source, Iterator):
            raise ValueError(f"a {type(source).__name__} can be read only once, and cannot travel: give the function "
                             "that makes it, `source=records` and not `source=records()`")
        if type(source).__name__ == "DataFrame" and hasattr(source, "to_dict"):
            raise ValueError('a DataFrame is no list of records → df.to_dict("records")')
        for index, item in enumerate(source if isinstance(source, (list, tuple)) else ()):
            if not isinstance(item, kinds):
                raise ValueError(f"item {index} of the list is not {wanted}, got {item!r:.80} → {remedy}")
        return source

    return BeforeValidator(check)


class Data(Cell):
    """What all data cells share."""

    max_length: int | None = Field(default=None, ge=2)
    """Longest sequence in tokens. Default: the model's context, at most 2048."""
    packing: bool = False
    """Put several documents into one sequence of `max_length`; none attends to another."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to a document longer than `max_length`; the count is reported."""
    shuffle: bool = True
    """A new order every epoch, drawn from `Training.seed`; the same on every layout."""
    group_by_length: bool = False
    """Draw the sequences of a step from those of like length: less padding where a model needs padded rows, and ranks
    that wait less for each other. Packed sequences are all of a length."""
    limit: int | None = Field(default=None, ge=1)
    """Train, or evaluate where the data is an evaluation's own, on a fixed random sample of so many documents."""

    def preview(self, model: Model | str | Path = "llama-tiny", n: int = 3, *,
                split: Literal["train", "test"] = "train") -> Preview:
        """The first documents as the model will see them: every token, and which of them the loss counts.

        In a notebook it shows itself in colour, in a terminal as text. `model` is a cell, a folder or a hub id, for its
        tokenizer and its context; the default has a token for every byte.
        """
        from collie_lab.view.preview import preview

        return preview(self, model if isinstance(model, Model) else Model(model), n, split)


class Instructions(Data):
    """Records of an instruction and its response; the loss is on the response only.

    `source` is a JSON, JSONL, CSV or Parquet file (also gzipped, also several by a pattern: `part-*.jsonl`), a data set
    of the hub (`hf:owner/name`; see docs/data.md), a list of records, or a callable that returns or yields them.
    Formats: Alpaca (`instruction`, `input`, `output`), `prompt_completion` (`prompt`, `completion`), `chat`
    (`messages` with `role` and `content`), `clinc` (CLINC150's file of splits), or a callable
    from a record to `(prompt, response)`. `auto` recognises the first four.
    """

    source: Annotated[str | list[Record] | Callable[[], Iterable[Record]], _source(Mapping)]
    format: Format | Callable[[Record], tuple[str, str]] = "auto"
    holdout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the records kept for evaluation, where the source has no test split of its own. Records that ask the
    same stay together."""

    def __init__(self, source: str | Path | list[Record] | Callable[[], Iterable[Record]], **fields: Any) -> None:
        super().__init__(source=str(source) if isinstance(source, Path) else source, **fields)  # type: ignore[call-arg]


class Text(Data):
    """Plain text for next-token training: .txt, .json (a list of strings), .jsonl, .csv, .parquet (a `text` field).

    `separator` splits a .txt file into documents. `source` may be all that it is in `Instructions`; a list, or what a
    callable gives, may hold texts, or records with a `text`. Blank texts are left out; the count is reported.
    """

    source: Annotated[str | list[str | Record] | Callable[[], Iterable[str | Record]], _source(str, Mapping)]
    separator: str | None = None
    holdout: float = Field(default=0.05, ge=0.0, lt=1.0)
    overlong: Literal["truncate", "drop", "error", "split"] = "split"  # type: ignore[assignment]
    """`split` cuts a long document into windows of `max_length`."""

    def __init__(self, source: str | Path | list[str] | list[Record] | Callable[[], Iterable[str | Record]],
                 **fields: Any) -> None:
        super().__init__(source=str(source) if isinstance(source, Path) else source, **fields)  # type: ignore[call-arg]


class RandomTokens(Data):
    """Uniformly random tokens, for measurements of memory and speed that need no data."""

    length: int = Field(default=512, ge=2)
    """Tokens in each document."""
    documents: int = Field(default=1024, ge=1)
    seed: int = Field(default=0, ge=0)


#: The generated tasks, in the order in which they are drawn.
SKILLS: tuple[str, ...] = (
    "copy", "reverse", "uppercase", "first", "last", "next", "add", "count", "longest", "repeat",
)


class Skills(Data):
    """A generated instruction set: ten short tasks with one right answer each. Needs no download.

    Train and test are disjoint: no test prompt stands in any training split. Everything follows from `seed`.
    """

    tasks: tuple[str, ...] = SKILLS
    size: int = Field(default=4000, ge=1)
    """Training records."""
    test_size: int = Field(default=200, ge=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [task for task in tasks if task not in SKILLS]
        if unknown or not tasks:
            raise ValueError(f"unknown tasks {unknown}; there are: {', '.join(SKILLS)}")
        return tasks
