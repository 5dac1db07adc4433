"""Where records come from: files, memory, the hub's datasets. Read record by record, as often as they are asked for."""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import pickle
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from collie_lab.cells import CellError, Data, Instructions, Problem, Text
from collie_lab.data import hub_datasets
from collie_lab.data._files import json_fault

__all__ = ["Anew", "Source", "files_of", "open_source", "problem", "unused_separator"]

#: A generator that yields more records is kept in a temporary file, not in memory.
_IN_MEMORY: Final = 10_000
_CHUNK: Final = 2**20
#: Endings of files that hold records; `Text` takes any other for plain text.
_RECORDS: Final = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Source:
    """Records, read anew whenever they are iterated over.

    `test` is there where the source has a test split of its own. `content` is a hash of all that was read, "" where it
    cannot be known without reading everything.
    """

    name: str
    train: Iterable[Any]
    test: Iterable[Any] | None = None
    content: str = ""
    places: Iterable[str] = ()
    """Of files, where each record stands; read only to tell of one."""

    def place(self, index: int) -> str:
        """Where a record stands, by its number."""
        return next(itertools.islice(self.places, index, None), f"{self.name}: record {index}")


@dataclass(frozen=True)
class Anew:
    """An iterable that calls `read` for every iteration."""

    read: Callable[[], Iterator[Any]]

    def __iter__(self) -> Iterator[Any]:
        return self.read()


def open_source(cell: Instructions | Text, *, hashed: bool = False) -> Source:
    """The records of a cell's source. With `hashed`, files are read once more for a hash of their bytes.

    Raises:
        CellError: a missing or unreadable file, a function that fails, a data set that does not load. What is wrong
            within a file that is read record by record is raised on the way.
    """
    source = cell.source
    if callable(source):
        return Source("the source", _called(cell, source))
    if not isinstance(source, str):
        return Source("the source", source)
    if source.startswith(hub_datasets.PREFIX):
        return _dataset(cell, source)
    paths = files_of(cell, source)
    content = _hash(paths) if hashed else ""
    places = Anew(lambda: itertools.chain.from_iterable(_places(cell, path) for path in paths))
    if len(paths) > 1:
        return Source(source, Anew(lambda: itertools.chain.from_iterable(_list(cell, path) for path in paths)),
                      content=content, places=places)
    found = _read(cell, paths[0])
    if isinstance(found, dict):  # a JSON object: splits by name
        if not (isinstance(cell, Instructions) and cell.format in ("auto", "clinc") and {"train", "test"} <= {*found}):
            raise problem(cell, "source", f"{source}: a JSON object, not a list of records",
                          "only the CLINC format (splits `train`, `val`, `test`) is an object")
        return Source(source, found["train"], found["test"], content)
    return Source(source, found, content=content, places=places)


def problem(cell: Data, field: str, message: str, remedy: str = "") -> CellError:
    """The error that a field of a data cell is to blame for."""
    return CellError([Problem(type(cell).__name__, field, message, remedy)])


def files_of(cell: Data, source: str) -> list[Path]:
    """The files that a path or a pattern (`part-*.jsonl`) names, in the order of their names.

    Raises:
        CellError: there is none, or it is a folder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise problem(cell, "source", f"{source} is a folder", "name a file in it, or files by a pattern "
                      f"({source}/*.jsonl); a data set that `datasets` wrote is `{hub_datasets.PREFIX}{source}`")
    if path.is_file():
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        raise problem(cell, "source", f"no such file: {source}", f"paths are relative to {Path.cwd()}")
    return found


def unused_separator(cell: Text) -> tuple[str, str] | None:
    """Why the separator parts nothing, with the remedy; None where it does, or there is none."""
    if not cell.separator:
        return None
    if not isinstance(cell.source, str) or cell.source.startswith(hub_datasets.PREFIX):
        return "without effect: the source is no text file", "leave it out"
    texts = [path for path in files_of(cell, cell.source) if _ending(path) not in _RECORDS]
    if not texts:
        return f"without effect: {cell.source} holds records, and each is a document", "leave it out"
    if any(_holds(cell, path, cell.separator) for path in texts):
        return None
    return (f"{cell.separator!r} stands nowhere in {cell.source}: a whole file is one document",
            "what stands there between the documents; line ends are read as \\n")


def _holds(cell: Text, path: Path, wanted: str) -> bool:
    """Whether a text stands in a file, which is read up to there."""
    with _open(cell, path, newline=None) as file:
        rest = ""
        while chunk := file.read(_CHUNK):
            if wanted in (rest := rest[-len(wanted):] + chunk):  # it may begin in the chunk before
                return True
    return False


def _hash(paths: list[Path]) -> str:
    """A hash of the names' endings, which tell the format, and of all bytes."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update("".join(path.suffixes).encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# --- memory ---------------------------------------------------------------------------------------


def _called(cell: Data, function: Callable[[], Iterable[Any]]) -> Iterable[Any]:
    """What the function returns. What can be read only once, as a generator, is kept: in memory, or in a file."""
    try:
        found = function()
        if not isinstance(found, Iterator):
            return found if hasattr(found, "__len__") else list(found)
        first = list(itertools.islice(found, _IN_MEMORY))
        return first if len(first) < _IN_MEMORY else _spooled(itertools.chain(first, found))
    except Exception as error:
        raise problem(cell, "source", f"the function that gives the records raised {error!r}") from error


def _spooled(records: Iterable[Any]) -> Anew:
    """The records in a temporary file, which lives as long as the result."""
    file = tempfile.NamedTemporaryFile(prefix="collie_lab-")  # noqa: SIM115
    for record in records:
        pickle.dump(record, file)
    file.flush()

    def read() -> Iterator[Any]:
        with open(file.name, "rb") as written, contextlib.suppress(EOFError):
            while True:
                yield pickle.load(written)

    return Anew(read)


def _dataset(cell: Data, source: str) -> Source:
    try:
        train, test, content = hub_datasets.load(source)
    except hub_datasets.DatasetError as error:
        raise problem(cell, "source", f"{source}: {error}", error.remedy) from None
    return Source(source, Anew(train), Anew(test) if test else None, content)


# --- files ----------------------------------------------------------------------------------------


def _list(cell: Instructions | Text, path: Path) -> Iterable[Any]:
    """The records of one file of several."""
    found = _read(cell, path)
    if isinstance(found, dict):
        raise problem(cell, "source", f"{path}: a JSON object, not a list of records")
    return found


def _places(cell: Instructions | Text, path: Path) -> Iterator[str]:
    """Where each record of a file stands: its line in JSONL, else its number."""
    if _ending(path) != ".jsonl":
        yield from (f"{path}: record {index}" for index, _ in enumerate(_list(cell, path)))
        return
    with _open(cell, path, newline="\n") as file:
        yield from (f"{path}, line {number}:" for number, line in enumerate(file, 1) if line.strip())


def _ending(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read(cell: Instructions | Text, path: Path) -> Iterable[Any] | dict[str, Any]:
    """The records of a file, by its name's ending; only JSON is read as a whole."""
    match _ending(path):
        case ".csv":
            return Anew(lambda: _csv(cell, path))
        case ".jsonl":
            return Anew(lambda: _jsonl(cell, path))
        case ".parquet":
            return Anew(lambda: _parquet(cell, path))
        case ".json":
            return _json(cell, path)
    return Anew(lambda: _texts(cell, path, cell.separator)) if isinstance(cell, Text) else _json(cell, path)


def _json(cell: Data, path: Path) -> list[Any] | dict[str, Any]:
    with _open(cell, path) as file:
        found = _parse(cell, path, file.read())
    if not isinstance(found, list) and not (isinstance(cell, Instructions) and isinstance(found, dict)):
        raise problem(cell, "source", f"{path} holds no list of records, but {type(found).__name__}",
                      "a JSON file is a list; one record a line is JSONL")
    return found


def _jsonl(cell: Data, path: Path) -> Iterator[Any]:
    with _open(cell, path, newline="\n") as file:  # JSON strings may hold other line separators
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _parse(cell, path, line.rstrip("\r\n"), number)


def _parse(cell: Data, path: Path, text: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        remedy = "mend the file" + ("" if line else "; one record a line is JSONL, and is called so")
        if (ending := _ending(path)) not in _RECORDS:
            remedy = f"{ending or 'a name without an ending'} is read as JSON; the endings of other formats: " + \
                ", ".join(_RECORDS[1:]) + "; .gz after them"
        raise problem(cell, "source", f"{path}{json_fault(error, line)}", remedy) from None


def _csv(cell: Data, path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV file by the names in its first; all values are text, empty ones too."""
    with _open(cell, path, newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            names = next(rows, [])
            if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
                raise problem(cell, "source", f"{path}, line {rows.line_num}: {names.count(twice[0])} columns are "
                              f"called {twice[0]!r}", "give every column a name of its own")
            for row in rows:
                if len(row) != len(names) and row:
                    raise problem(cell, "source", f"{path}, line {rows.line_num}: {len(row)} values for the "
                                  f"{len(names)} columns {', '.join(names)}",
                                  "values that hold commas or quotes stand in quotes")
                if row:
                    yield dict(zip(names, row, strict=True))
        except csv.Error as error:
            where = f"{path}, line {rows.line_num}"
            raise problem(cell, "source", f"{where}: not valid CSV: {error}", "mend the file") from None


def _parquet(cell: Data, path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise problem(cell, "source", f"{path}: Parquet needs pyarrow", "pip install 'collie-lab[data]'") from None
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise problem(cell, "source", f"{path}: not a whole Parquet file: {str(error).splitlines()[0]}",
                      "write or fetch it again") from None


def _texts(cell: Data, path: Path, separator: str | None) -> Iterator[str]:
    """The documents between the separators; without one, the whole text."""
    with _open(cell, path, newline=None) as file:
        if not separator:
            yield file.read()
            return
        rest = ""
        while chunk := file.read(_CHUNK):
            *whole, rest = (rest + chunk).split(separator)
            yield from whole
        if rest.strip():  # else the file ends with a separator
            yield rest


@contextlib.contextmanager
def _open(cell: Data, path: Path, newline: str | None = "") -> Iterator[IO[str]]:
    """The text of a file, gzipped or not; bytes that are no UTF-8, or NUL, are told by their line."""
    try:
        with io.TextIOWrapper(_NoNul(_bytes(path)), encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError:
        raise _not_utf8(cell, path) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise problem(cell, "source", f"{path}: damaged gzip: {error}", "write or fetch the file again") from None


def _bytes(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


class _NoNul(io.BufferedReader):
    """Refuses NUL, which is valid UTF-8, but what every other byte of English in UTF-16 is."""

    def read(self, size: int | None = -1, /) -> bytes:
        return self._checked(super().read(size))

    def read1(self, size: int = -1, /) -> bytes:
        return self._checked(super().read1(size))

    @staticmethod
    def _checked(chunk: bytes) -> bytes:
        if (place := chunk.find(0)) >= 0:
            raise UnicodeDecodeError("utf-8", chunk, place, place + 1, "NUL")
        return chunk


def _not_utf8(cell: Data, path: Path) -> CellError:
    """The error with the first byte that is no text, and a guess of the encoding that makes it one."""
    where, encoding = "", "LATIN1"
    with _bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
                place = line.find(0)
            except UnicodeDecodeError as error:
                place = error.start
            if place >= 0:
                where = f": line {number}, byte {place + 1} is 0x{line[place]:02X}"
                if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    encoding = "UTF-16"
                elif b"\0" in line:
                    encoding = "UTF-16BE" if line.startswith(b"\0") else "UTF-16LE"
                break
    return problem(cell, "source", f"{path} is not UTF-8 text{where}",
                   f"iconv -f {encoding} -t UTF-8 {path.name}  # or whatever its encoding is")
