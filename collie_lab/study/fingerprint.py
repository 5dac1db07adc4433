"""A hash of the files that an experiment reads: two arms of one id have seen the same data."""

from __future__ import annotations

import functools
import glob
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from collie_lab.cells import SHAPES, CellError, Experiment, Problem

__all__ = ["fingerprint"]

#: Fields of cells that name files or folders, where they name any.
_FIELDS: Final = ("source", "tokenizer", "load")
#: Bytes at either end of a file in a folder that count; a model's files are large.
_SAMPLE: Final = 1 << 16


def fingerprint(experiment: Experiment) -> str:
    """A hash of the data files, and of the folders of models and the like, that an experiment names; "" without any.

    Of a file every byte counts; of the files in a folder the name, the size and both ends. What the hub holds is known
    by its name alone.

    Raises:
        CellError: a pattern, or a name that looks like a file's, that nothing matches.
    """
    parts = [f"{path}:{_content(name)}" for path, name in _names(experiment.to_dict(), "") if _content(name)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16] if parts else ""


def _names(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Places in the experiment, and the strings there that may name files."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            here = f"{path}.{key}"
            if key in _FIELDS and isinstance(item, str) and item not in SHAPES:
                yield here, item
            else:
                yield from _names(item, here)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _names(item, f"{path}.{index}")


def _content(name: str) -> str:
    """A hash of the file, the folder or the files of a pattern; "" where there is no such thing."""
    place = Path(name).expanduser()
    if place.is_dir():
        return _folder(*_state(file for file in sorted(place.rglob("*")) if file.is_file()), root=str(place))
    files = [place] if place.is_file() else [Path(found) for found in sorted(glob.glob(str(place), recursive=True))]
    if not files and place.suffix in (".json", ".jsonl", ".csv", ".parquet", ".txt", ".gz"):
        raise CellError([Problem("Experiment", "", f"no such file: {name}", f"paths are relative to {Path.cwd()}")])
    return _files(*_state(file for file in files if file.is_file())) if files else ""


def _state(files: Iterator[Path]) -> Iterator[tuple[str, int, int]]:
    """Files with what changes when they do: a hash is made once for each state."""
    for file in files:
        stat = file.stat()
        yield str(file), stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=256)
def _files(*states: tuple[str, int, int]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in states:
        with open(name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@functools.lru_cache(maxsize=256)
def _folder(*states: tuple[str, int, int], root: str) -> str:
    digest = hashlib.sha256()
    for name, size, _ in states:
        digest.update(f"{Path(name).relative_to(root)} {size}\n".encode())
        with open(name, "rb") as file:
            digest.update(file.read(_SAMPLE))
            if size > _SAMPLE:
                file.seek(-min(_SAMPLE, size - _SAMPLE), 2)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
