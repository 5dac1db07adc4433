"""From a data cell to documents: text in segments, each with or without loss."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from collie_lab.cells import CellError, Data, Instructions, Problem, Skills, Text
from collie_lab.data.skills import make_skills

__all__ = ["Document", "Split", "Style", "load_records", "question", "read_documents"]

Split = Literal["train", "test", "all"]
Style = Literal["plain", "line", "alpaca", "clinc", "headed", "chat"]
Item = TypeVar("Item")
Render = Callable[[list[dict[str, str]]], list[tuple[str, bool]]]
"""From messages to segments, by a tokenizer's chat template."""


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


def read_documents(cell: Data, split: Split, render_chat: Render | None = None) -> list[Document]:
    """The documents of one split, in the order of the source.

    Args:
        cell: Instructions, Text or Skills.
        split: `train`, `test` (the source's own test split, or the held-out share), or `all` for a source
            that an evaluation names itself (still the test split where the source has one of its own).
        render_chat: from messages to segments, by the tokenizer's chat template; default: a plain one.

    Raises:
        CellError: a missing or unreadable file, an empty source, a record without its field.
    """
    if isinstance(cell, Skills):
        documents = [_pair(f"{prompt}\n", answer, "line") for prompt, answer in make_skills(cell, split)]
    elif isinstance(cell, Text):
        documents = [Document(((text, True),)) for text in _split_texts(_texts(cell), cell.holdout, split)]
    elif isinstance(cell, Instructions):
        documents = _instructions(cell, split, render_chat)
    else:
        raise TypeError(f"{type(cell).__name__} has no text")
    if split == "train" and cell.limit is not None and cell.limit < len(documents):
        # Files are often sorted, by topic or label: the first records would be no fair sample.
        documents = [documents[index] for index in sorted(random.Random(0).sample(range(len(documents)), cell.limit))]
    return documents


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
    return Document(((prompt, False), (answer, True)), answer, style=style)


# --- instructions ---------------------------------------------------------------------------------


def _instructions(cell: Instructions, split: Split, render_chat: Render | None) -> list[Document]:
    records = load_records(cell, cell.source)
    name = cell.format if not callable(cell.format) else "callable"
    if isinstance(records, dict):
        if name not in ("auto", "clinc") or not {"train", "test"} <= records.keys():
            raise _error(cell, "source", f"{cell.source}: a JSON object, not a list of records",
                         "only the CLINC format (splits `train`, `val`, `test`) is an object")
        pairs = records["train" if split == "train" else "test"]
        return [_pair(_clinc_prompt(text), intent.replace("_", " "), "clinc")
                for text, intent in (_clinc(cell, item, index) for index, item in enumerate(pairs))]
    if not records:
        raise _error(cell, "source", f"{_name(cell.source)} holds no records", "give it at least one")
    reader = _reader(cell, records[0], render_chat)
    documents = []
    for index, record in enumerate(records):
        try:
            documents.append(reader(record))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            missing = f"has no field {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
            raise _error(cell, "source", f"{_name(cell.source)}: record {index} {missing}: {record!r:.120}",
                         "mend the record, or give `format` a function from a record to (prompt, response)") from None
    return _split(documents, cell.holdout, split)


def _reader(cell: Instructions, first: Any, render_chat: Render | None) -> Callable[[Any], Document]:
    """The reader of one format; `auto` goes by the fields of the first record."""
    if callable(cell.format):
        to_pair = cell.format
        return lambda record: _pair(*to_pair(record))
    fields = {"alpaca": "instruction", "prompt_completion": "prompt", "chat": "messages"}
    name: str = cell.format
    if name == "auto":
        keys = first.keys() if isinstance(first, dict) else ()
        name = next((format_ for format_, field in fields.items() if field in keys), "")
    if name not in fields:
        raise _error(cell, "format", f"the records of {_name(cell.source)} fit no known format: {first!r:.120}",
                     "name their format, or give a function from a record to (prompt, response)")
    if name == "chat":
        return lambda record: _chat(record, render_chat)
    return _alpaca if name == "alpaca" else lambda record: _pair(record["prompt"], record["completion"])


def _alpaca(record: dict[str, str]) -> Document:
    """Taori et al. 2023: instruction, optional input, output; here without the fixed preamble."""
    context = f"### Input:\n{record['input']}\n\n" if record.get("input") else ""
    return _pair(_alpaca_prompt(record["instruction"], context), record["output"], "alpaca")


def _alpaca_prompt(instruction: str, context: str = "") -> str:
    return "### Instruction:\n" + instruction + f"\n\n{context}### Response:\n"  # a TypeError for what is no text


def _chat(record: dict[str, Any], render: Render | None) -> Document:
    messages = record["messages"]
    answered = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answered:
        raise TypeError("no message of the assistant")
    messages = messages[: answered[-1] + 1]  # what nobody answers teaches nothing
    segments = render(messages) if render else _plain_chat(messages)
    return Document(tuple(segments), messages[-1]["content"], closed=render is not None,
                    style="chat" if render else "headed")


def _plain_chat(messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
    """For tokenizers without a chat template: a heading before every message."""
    segments = []
    for message in messages:
        segments.append((f"### {message['role'].capitalize()}:\n", False))
        segments.append((message["content"] + "\n\n", message["role"] == "assistant"))
    return segments


def _clinc_prompt(text: str) -> str:
    return f"Query: {text}\nIntent: "


def _clinc(cell: Instructions, item: Any, index: int) -> tuple[str, str]:
    if not (isinstance(item, list) and len(item) == 2 and all(isinstance(part, str) for part in item)):
        raise _error(cell, "source", f"{_name(cell.source)}: record {index} is no [text, intent] pair: {item!r:.80}")
    return item[0], item[1]


# --- text -----------------------------------------------------------------------------------------


def _texts(cell: Text) -> list[str]:
    source = cell.source
    if isinstance(source, str) and not source.endswith((".json", ".jsonl", ".csv")):
        text = _read_file(cell, source)
        texts = text.split(cell.separator) if cell.separator else [text]
    else:
        records = load_records(cell, source)
        texts = [record["text"] if isinstance(record, dict) and "text" in record else record for record in records]
        wrong = next((index for index, text in enumerate(texts) if not isinstance(text, str)), None)
        if wrong is not None:
            raise _error(cell, "source", f"{_name(source)}: record {wrong} is neither a string nor has a `text` field")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise _error(cell, "source", f"{_name(source)} holds no text", "give it at least one document")
    return texts


def _split_texts(texts: list[str], holdout: float, split: Split) -> list[str]:
    """As `_split`; of a single document the end is held out, from a blank on."""
    if len(texts) > 1 or split == "all" or not holdout:
        return _split(texts, holdout, split)
    text = texts[0]
    cut = text.find(" ", int(len(text) * (1 - holdout)))
    cut = len(text) if cut < 0 else cut
    part = text[:cut] if split == "train" else text[cut:]
    return [part] if part.strip() else []


# --- shared ---------------------------------------------------------------------------------------


def _split(items: list[Item], holdout: float, split: Split) -> list[Item]:
    """Hold a share out for the test split, by a fixed shuffle that no other setting moves."""
    if split == "all":
        return items
    count = round(len(items) * holdout)
    chosen = set(random.Random(0).sample(range(len(items)), count))
    return [item for index, item in enumerate(items) if (index in chosen) == (split == "test")]


def load_records(cell: Data, source: Any) -> Any:
    """The records of a list, a callable, or a JSON, JSONL or CSV file; CLINC150's file as a dictionary."""
    if callable(source):
        try:
            return list(source())
        except Exception as error:
            raise _error(cell, "source", f"the function that gives the records raised {error!r}") from error
    if not isinstance(source, str):
        return source
    if source.endswith(".csv"):
        return _csv(cell, source)
    text = _read_file(cell, source)
    if source.endswith(".jsonl"):
        # Not `splitlines`: JSON strings may hold other line separators.
        return [_parse(cell, source, line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    found = _parse(cell, source, text)
    if not isinstance(found, list) and not (isinstance(cell, Instructions) and isinstance(found, dict)):
        raise _error(cell, "source", f"{source} holds no list of records, but {type(found).__name__}",
                     "a JSON file is a list; one record a line is JSONL")
    return found


def _parse(cell: Data, source: str, text: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f", line {line or error.lineno}, column {error.colno}"
        raise _error(cell, "source", f"{source}{where}: not valid JSON: {error.msg}",
                     "mend the file" + ("" if line else "; one record a line is JSONL, and is called so")) from None


def _csv(cell: Data, source: str) -> list[dict[str, str]]:
    """The rows of a CSV file by the names in its first; all values are text, empty ones too."""
    rows = csv.reader(io.StringIO(_read_file(cell, source), newline=""), strict=True)
    records = []
    try:
        names = next(rows, [])
        for row in rows:
            if len(row) != len(names) and row:
                raise _error(cell, "source", f"{source}, line {rows.line_num}: {len(row)} values for the {len(names)} "
                             f"columns {', '.join(names)}", "values that hold commas or quotes stand in quotes")
            records += [dict(zip(names, row, strict=True))] if row else []
    except csv.Error as error:
        where = f"{source}, line {rows.line_num}"
        raise _error(cell, "source", f"{where}: not valid CSV: {error}", "mend the file") from None
    return records


def _read_file(cell: Data, source: str) -> str:
    path = Path(source).expanduser()
    if path.is_dir():
        raise _error(cell, "source", f"{source} is a folder", "name a file in it")
    if not path.is_file():
        raise _error(cell, "source", f"no such file: {source}", f"paths are relative to {Path.cwd()}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise _error(cell, "source", f"{source} is not UTF-8 text") from None


def _name(source: str | Iterable[Any] | Callable[..., Any]) -> str:
    return source if isinstance(source, str) else "the source"


def _error(cell: Data, field: str, message: str, remedy: str = "") -> CellError:
    return CellError([Problem(type(cell).__name__, field, message, remedy)])
