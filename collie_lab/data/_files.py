"""Files of questions: small enough to be read whole, and refused with their line where something is wrong."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from collie_lab.cells import Cell, CellError, Problem

__all__ = ["Place", "json_fault", "read_csv", "read_json", "read_json_lines", "read_text"]


class Place(NamedTuple):
    """The field of a cell that names a file: what errors point to."""

    cell: Cell
    field: str

    def error(self, message: str, remedy: str = "") -> CellError:
        """The error that this field is to blame for."""
        return CellError([Problem(type(self.cell).__name__, self.field, message, remedy)])


def read_text(place: Place, file: str | Path) -> str:
    """The text of a UTF-8 file, or of a .gz of one.

    Raises:
        CellError: there is no such file, or it is not text.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise place.error(f"{path} {what}", f"paths are relative to {Path.cwd()}")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise place.error(f"{path} is not UTF-8 text") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise place.error(f"{path} is no valid gzip file: {error}") from None
    if "\0" in text:
        raise place.error(f"{path} is not UTF-8 text: it holds NUL, as UTF-16 does")
    return text


def json_fault(error: ValueError | RecursionError, line: int | None = None) -> str:
    """What `json.loads` has raised, behind the name of a file; `line` is where in it its text stands."""
    if isinstance(error, json.JSONDecodeError):
        return f", line {line or error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
    # Valid, but more than Python takes: of this it tells no place.
    what = "values within values too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
    return f"{f', line {line}' if line else ''}: JSON that cannot be read: {what}"


def read_json(place: Place, file: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
        CellError: it cannot be read, or is no JSON.
    """
    text = read_text(place, file)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise place.error(f"{file}{json_fault(error)}",
                          "mend the file; one record a line is JSONL, and is called so") from None


def read_json_lines(place: Place, file: str | Path) -> list[Any]:
    """The records of a JSONL file, one a line.

    Raises:
        CellError: it cannot be read, or a line is no JSON.
    """
    records = []
    for number, line in enumerate(read_text(place, file).split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise place.error(f"{file}{json_fault(error, number)}", "mend the file") from None
    return records


def read_csv(place: Place, file: str | Path, columns: int) -> list[tuple[int, list[str]]]:
    """The rows of a CSV file, each with the number of its last line.

    Raises:
        CellError: it cannot be read, is no CSV, or a row has another number of values.
    """
    reader = csv.reader(io.StringIO(read_text(place, file), newline=""), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise place.error(f"{file}, line {reader.line_num}: not valid CSV: {error}", "mend the file") from None
    for line, row in rows:
        if len(row) != columns:
            raise place.error(f"{file}, line {line}: {len(row)} values where {columns} are wanted",
                              "values that hold commas or quotes stand in quotes")
    return rows
