"""Tokenized documents on disk, from one process to the next: `~/.cache/collie_lab/data`.

An entry is a folder named by a hash of all that its documents depend on: the bytes of the source, the tokenizer, the
fields of the cell, and the code that makes them. It is written under another name and renamed, so it is there whole or
not at all, however many processes write it at once and whenever they are killed; its files are verified when they are
read. Run folders link to the files (or copy them), and stay whole when an entry is removed.

`COLLIE_LAB_DATA_CACHE` names another folder, or `off`; `COLLIE_LAB_DATA_CACHE_GB` its size (default: 20), above which
what was not used for longest is removed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import tokenizers
from numpy.typing import NDArray

from collie_lab.data.documents import Documents
from collie_lab.folder import write_json
from collie_lab.machine import user_cache

__all__ = ["DamagedEntryError", "cache_folder", "find", "key_of", "keep", "scratch"]

_INDEX: Final = "entry.json"
_KEYS: Final = "keys.npy"
_TEMPORARY: Final = "tmp-"
_ABANDONED: Final = 24 * 3600.0  # seconds after which a temporary folder belongs to nobody
_GIGABYTE: Final = 1e9
#: Fewer tokens are made again in a second, and not kept.
_WORTH_KEEPING: Final = 500_000
#: The modules on which the documents of a source depend.
_MAKERS: Final = ("hub_datasets", "records", "sources", "tokenize", "tokenizer")


class DamagedEntryError(ValueError):
    """An entry that is not what was written; it has been removed."""


def cache_folder() -> Path | None:
    """Where entries are kept; None where they are not."""
    named = os.environ.get("COLLIE_LAB_DATA_CACHE")
    if named:
        return None if named == "off" else Path(named).expanduser()
    return user_cache("data")


def key_of(*facts: Any) -> str:
    """The name of an entry, from the `repr` of all that its documents depend on."""
    return hashlib.sha256(repr((_code(), tokenizers.__version__, facts)).encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
    """A hash of the code that makes documents: another version of it may make other ones."""
    digest = hashlib.sha256()
    for name in _MAKERS:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()


def scratch(otherwise: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder from which an entry is kept by links; in the folder `otherwise` where nothing is kept."""
    if folder := cache_folder():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return tempfile.TemporaryDirectory(dir=folder, prefix=_TEMPORARY)
    return tempfile.TemporaryDirectory(dir=otherwise, prefix=_TEMPORARY)


def keep(key: str, documents: Documents, keys: NDArray[np.uint64], facts: Mapping[str, Any]) -> None:
    """Make an entry of the documents, the keys of what they were made of, and facts that JSON can hold.

    Does nothing where they are few, the cache is off, or the disk does not take it.
    """
    folder = cache_folder()
    if folder is None or len(documents.tokens) < _WORTH_KEEPING:
        return
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=folder, prefix=_TEMPORARY) as temporary:
        made = Path(temporary) / "entry"
        documents.save(made)
        np.save(made / _KEYS, keys)
        files = {file.name: [file.stat().st_size, _hash(file)] for file in sorted(made.iterdir())}
        write_json(made / _INDEX, {"files": files, "facts": facts})
        made.rename(folder / key)  # refused where another process was quicker: its entry is the same
        _limit(folder, spare=key)


def find(key: str) -> tuple[Documents, NDArray[np.uint64], dict[str, Any]] | None:
    """The documents of an entry, mapped, with keys and facts; None where there is none.

    Raises:
        DamagedEntryError: a file is missing, truncated or changed.
    """
    folder = cache_folder()
    if folder is None or not (folder / key).is_dir():
        return None
    entry = folder / key
    try:
        index = json.loads((entry / _INDEX).read_text(encoding="utf-8"))
        for name, (size, digest) in index["files"].items():
            if (entry / name).stat().st_size != size:
                raise ValueError(f"{name} has {(entry / name).stat().st_size:,} bytes of {size:,}")
            if _hash(entry / name) != digest:
                raise ValueError(f"the bytes of {name} have changed")
        documents, keys = Documents.load(entry), np.load(entry / _KEYS, allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        shutil.rmtree(entry, ignore_errors=True)
        raise DamagedEntryError(f"{entry}: {error}") from None
    with contextlib.suppress(OSError):
        os.utime(entry)
    return documents, keys, index["facts"]


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _limit(folder: Path, spare: str) -> None:
    """Remove temporary folders of killed processes, and the entries not used for longest while all are too many."""
    for left in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
    limit = float(os.environ.get("COLLIE_LAB_DATA_CACHE_GB", "20")) * _GIGABYTE
    used: list[tuple[float, int, Path]] = []
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            if (entry / _INDEX).is_file():
                used.append((entry.stat().st_mtime, sum(file.stat().st_size for file in entry.iterdir()), entry))
    total = sum(size for _, size, _ in used)
    for _, size, entry in sorted(used):
        if total <= limit:
            break
        if entry.name != spare:
            shutil.rmtree(entry, ignore_errors=True)
            total -= size
