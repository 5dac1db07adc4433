"""What this process has tokenized last: variants of an experiment mostly train on the same documents."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from collie_lab.cells import Data
from collie_lab.data.documents import Documents
from collie_lab.data.hub_datasets import PREFIX
from collie_lab.data.records import Style
from collie_lab.data.sources import files_of

__all__ = ["Made", "key_of", "recall", "remember"]


class Made(NamedTuple):
    """Documents, and what there is to say of them."""

    documents: Documents
    counts: dict[str, dict[str, int]]
    warnings: list[str]
    style: Style
    keys: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
    """`Document.key` of each document of the source; none of random tokens."""


#: Tokens that are kept at most, of all documents together: half a GiB.
_LIMIT: Final = 100_000_000

_made: OrderedDict[str, Made] = OrderedDict()


def key_of(cell: Data, split: str, tokenizer: str, *more: Any) -> str | None:
    """What the documents of a data cell depend on; None where that cannot be known: its records, or a reader of them,
    come from the notebook."""
    fields = dict(cell)
    if any(isinstance(value, list) or callable(value) for value in fields.values()):
        return None
    source = fields.get("source")
    if source is not None and source.startswith(PREFIX):  # a data set may be another one the next time
        return None
    states = [path.stat() for path in files_of(cell, source)] if source is not None else []
    facts = [(state.st_ino, state.st_size, state.st_mtime_ns) for state in states]
    return repr((type(cell).__name__, fields, split, tokenizer, more, str(Path.cwd()), facts))


def recall(key: str | None) -> Made | None:
    """What was made under this key, if it is still there."""
    if key is None or key not in _made:
        return None
    _made.move_to_end(key)
    return _made[key]


def remember(key: str | None, made: Made) -> Made:
    """Keep what was made, and forget what was not wanted for longest."""
    if key is not None and len(made.documents.tokens) <= _LIMIT:
        _made[key] = made
        while sum(len(each.documents.tokens) for each in _made.values()) > _LIMIT:
            _made.popitem(last=False)
    return made
