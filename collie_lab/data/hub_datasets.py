"""Data sets of the Hugging Face hub, or folders of that kind, by the `datasets` library; imported only when asked for.

    hf:owner/name?name=main&split=train&test=test&revision=0123abc
    hf:folder                      # that `save_to_disk` wrote, or one of data files
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl

__all__ = ["PREFIX", "DatasetError", "load"]

PREFIX: Final = "hf:"
_OPTIONS: Final = ("name", "split", "test", "revision")

Rows = Callable[[], Iterator[dict[str, Any]]]


class DatasetError(ValueError):
    """A data set that does not load; `remedy` says what to do."""

    def __init__(self, message: str, remedy: str):
        super().__init__(message)
        self.remedy = remedy


def load(source: str) -> tuple[Rows, Rows | None, str]:
    """The rows of the training split, those of the test split, and a hash of both.

    The training split is `split` (default: `train`, or the only one); the test split is `test` (default: the one called
    `test`, else `validation`), None where there is none: a share of the training split is then held out.

    Raises:
        DatasetError: a key that is not known, no such data set or split, or the hub is not reached.
    """
    path, _, query = source.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise DatasetError(f"unknown keys {', '.join(unknown)}", f"after `?` stand {', '.join(_OPTIONS)}")
    splits = _splits(path, options)
    train = options.get("split") or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    usual = [name for name in ("test", "validation") if name in splits and name != train]
    test = options.get("test") or next(iter(usual), "")
    if missing := [name for name in (train, test) if name and name not in splits]:
        raise DatasetError(f"it has no split {missing[0]!r}",
                           f"its splits are {', '.join(splits)}: `{PREFIX}{path}?split=...&test=...`")
    chosen = [splits[name] for name in (train, test) if name]
    content = hashlib.sha256("".join(dataset._fingerprint for dataset in chosen).encode()).hexdigest()
    return _rows(splits[train]), _rows(splits[test]) if test else None, content


def _splits(path: str, options: dict[str, str]) -> dict[str, Any]:
    """The data set's splits by name."""
    try:
        import datasets
    except ImportError:
        raise DatasetError("data sets of the hub need the `datasets` library",
                           "pip install 'collie-lab[data]'") from None
    folder = Path(path).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            if needless := sorted({"name", "revision"} & options.keys()):
                raise DatasetError(f"a saved folder has no {' or '.join(needless)}", "leave it out")
            found = datasets.load_from_disk(str(folder))
        else:
            where = str(folder) if folder.is_dir() else path
            found = datasets.load_dataset(where, name=options.get("name"), revision=options.get("revision"))
    except DatasetError:
        raise
    except Exception as error:  # the library and the hub's client raise many types, from bad names to closed networks
        what = next(iter(str(error).splitlines()), "")
        raise DatasetError(f"it does not load: {type(error).__name__}: {what}",
                           "check the name and the network; a gated one wants `hf auth login`") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _rows(dataset: Any) -> Rows:
    """Rows as dictionaries, a thousand at a time: the table stays on disk."""
    def read() -> Iterator[dict[str, Any]]:
        for batch in dataset.iter(batch_size=1000):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))

    return read
