"""What makes an arm the arm it is: its parameters, its runner, and the bytes of the files that it reads."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from collie_lab.cells import SHAPES, Experiment

__all__ = ["Identity", "identify"]

#: Fields of cells that name files or folders, where they name any.
_FIELDS: Final = ("source", "tokenizer", "load", "path", "include_path")
_SUFFIXES: Final = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".gz")


class Identity(NamedTuple):
    """What an arm is known by."""

    id: str
    """12 hex digits."""
    key: str
    """The same without the bytes of files: by it the results of an arm are found where its data are not."""
    absent: tuple[str, ...]
    """The names of files that are not there; the id is then none that an arm has run under."""


def identify(experiment: Experiment, runner: str) -> Identity:
    """The identity of an arm.

    A file, or the files of a pattern, count with every byte, and not with their place; the files in a folder (a model)
    with their names too. What the hub holds counts with its name alone. The experiment's own name,
    which only its folder has, does not count.
    """
    fields = {key: value for key, value in experiment.to_dict().items() if key != "name"}
    absent: list[str] = []

    def content(name: str) -> str:
        found = _content(name)
        if not found and _is_file_name(name):
            absent.append(name)
        return found or name

    def place(name: str) -> str:
        return Path(name).name if _is_file_name(name) else name

    id = _hash(_with_names(fields, content), runner)
    return Identity(id, _hash(_with_names(fields, place), runner), tuple(absent))


def _hash(fields: Any, runner: str) -> str:
    text = json.dumps([fields, runner], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _is_file_name(name: str) -> bool:
    """Whether it can be nothing but a file's name: a folder's may be a name on the hub as well."""
    return Path(name).suffix.lower() in _SUFFIXES and ":" not in name


def _with_names(value: Any, named: Callable[[str], str]) -> Any:
    """The same fields, with something else for what may name files."""
    if isinstance(value, Mapping):
        return {key: named(item) if key in _FIELDS and isinstance(item, str) and item not in SHAPES
                else _with_names(item, named) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_names(item, named) for item in value]
    return value


def _content(name: str) -> str:
    """A hash of the file, the folder or the files of a pattern; "" where there is no such thing."""
    place = Path(name).expanduser()
    if place.is_dir():
        return _folder(*_states(sorted(place.rglob("*"))), root=str(place))
    files = [place] if place.is_file() else [Path(found) for found in sorted(glob.glob(str(place), recursive=True))]
    states = tuple(_states(files))
    return _files(*states) if states else ""


def _states(files: Iterable[Path]) -> Iterator[tuple[str, int, int]]:
    """Files with what changes when they do: a hash is made once for each state."""
    for file in files:
        if file.is_file():
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
        with open(name, "rb") as file:  # all of it: models that were tuned in a few layers differ in the middle
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
