"""Documents that another process has made are taken from disk, whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import collie_lab as lab
from collie_lab.data import Documents, _memory, cache
from collie_lab.data import prepare as prepare_data
from collie_lab.folder import RunFolder
from tests.data.conftest import Watch


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder; nothing is too small for it, and no memory of the process is in the way."""
    monkeypatch.setenv("COLLIE_LAB_DATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_WORTH_KEEPING", 0)
    monkeypatch.setattr(_memory, "_LIMIT", 0)
    return tmp_path / "cache"


@pytest.fixture
def tokenized(splits_of: Watch) -> list[str]:
    """The splits that are really tokenized."""
    return splits_of("_tokenize")


def _write(path: Path, answer: str = "yes") -> Path:
    path.write_text(json.dumps([{"prompt": f"{n}?", "completion": f"{answer} {n}" * 9} for n in range(40)]))
    return path


def _prepare(file: Path, **fields: Any) -> tuple[RunFolder, dict[str, Any]]:
    data = lab.Instructions(str(file), **{"max_length": 24, **fields})
    run = RunFolder.create(file.parent, "run")
    prepare_data(lab.Experiment(model=lab.Model("llama-tiny", init="random"), data=data,
                                evaluate=[lab.Perplexity()]), run)
    return run, run.read("data/index.json")


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("tmp-"))


def test_a_second_process_reads_what_the_first_wrote(folder: Path, tokenized: list[str], tmp_path: Path) -> None:
    file = _write(tmp_path / "data.json")
    first, index = _prepare(file)
    assert tokenized == ["train", "test"]
    os.utime(file, (1, 1))
    copy = Path(shutil.copy(file, tmp_path / "elsewhere.json"))
    second, again = _prepare(copy, packing=True, shuffle=False)  # other names, other uses: the same documents
    assert tokenized == ["train", "test"]
    assert again == index
    assert index["warnings"]
    train, entry = second.path / "data/train/tokens.npy", _entries(folder)
    assert any(train.samefile(path / "tokens.npy") for path in entry)
    shutil.rmtree(folder)
    for run in (first, second):  # whole without the cache
        assert Documents.load(run.path / "data/train").fingerprint == index["fingerprint"]


@pytest.mark.parametrize("change", ["content", "length", "limit", "format", "callable"])
def test_what_has_changed_is_made_anew(folder: Path, tokenized: list[str], tmp_path: Path, change: str) -> None:
    file = _write(tmp_path / "data.json")
    _prepare(file)
    fields: dict[str, Any] = {
        "length": {"max_length": 20}, "limit": {"limit": 5}, "format": {"format": "prompt_completion"},
        "callable": {"format": lambda record: (record["prompt"], "no")},
    }.get(change, {})
    if change == "content":
        _write(file, "no")
    _prepare(file, **fields)
    assert tokenized == ["train", "test"] * 2
    assert len(_entries(folder)) == (2 if change == "callable" else 4)  # what a function does is not known


def _truncate(entry: Path) -> None:
    os.truncate(entry / "tokens.npy", (entry / "tokens.npy").stat().st_size // 2)


def _flip(entry: Path) -> None:
    content = bytearray((entry / "learned.npy").read_bytes())
    content[-3] ^= 1
    (entry / "learned.npy").write_bytes(content)


def _forget(entry: Path) -> None:
    (entry / "keys.npy").unlink()


def _scribble(entry: Path) -> None:
    (entry / "entry.json").write_text('{"files": {')


@pytest.mark.parametrize(("damage", "message"), [
    (_truncate, "tokens.npy has .* bytes of"), (_flip, "bytes of learned.npy have changed"), (_forget, "keys.npy"),
    (_scribble, ""),
])
def test_a_damaged_entry_is_told_and_made_again(damage: Callable[[Path], None], message: str, folder: Path,
                                                tokenized: list[str], tmp_path: Path) -> None:
    file = _write(tmp_path / "data.json")
    run, index = _prepare(file)
    shutil.rmtree(run.path)
    for entry in _entries(folder):
        damage(entry)
    run, again = _prepare(file)
    assert tokenized == ["train", "test"] * 2
    assert Documents.load(run.path / "data/train").fingerprint == index["fingerprint"]

    told = [text for text in again["warnings"] if "the cache was damaged" in text]
    assert len(told) == 2
    assert all(re.search(message, text) for text in told)
    assert _prepare(file)[1] == index  # and is whole now
    assert tokenized == ["train", "test"] * 2


def _documents(value: int = 0) -> Documents:
    tokens = np.full(1000, value, dtype=np.int32)
    return Documents(tokens, tokens == 0, np.array([0, 1000]), np.zeros(0, dtype=np.int64))


def _keep(key: str) -> None:
    cache.keep(key, _documents(), np.zeros(1, dtype=np.uint64), {"a": 1})


def _killed(key: str) -> None:
    Documents.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]
    _keep(key)


def _processes(*targets: Callable[[str], None]) -> list[int | None]:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=("key",)) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_many_processes_at_once(folder: Path) -> None:
    folder.mkdir()
    assert _processes(_keep, _keep, _keep) == [0, 0, 0]
    assert [path.name for path in folder.iterdir()] == ["key"]
    found = cache.find("key")
    assert found is not None
    assert found[0].fingerprint == _documents().fingerprint
    assert found[2] == {"a": 1}


def test_a_process_that_is_killed_while_it_writes(folder: Path) -> None:
    folder.mkdir()
    assert _processes(_killed) == [-signal.SIGKILL]
    assert cache.find("key") is None
    (left,) = folder.iterdir()
    _keep("key")
    assert left.exists()  # it might still be written
    os.utime(left, (1, 1))
    _keep("other")
    assert sorted(path.name for path in folder.iterdir()) == ["key", "other"]


def test_what_was_not_used_for_longest_goes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    for age, key in enumerate("cab"):
        _keep(key)
        os.utime(folder / key, (age, age))
    size = sum(file.stat().st_size for file in (folder / "a").iterdir())
    assert cache.find("c") is not None  # and so it is the newest
    assert time.time() - (folder / "c").stat().st_mtime < 60
    monkeypatch.setenv("COLLIE_LAB_DATA_CACHE_GB", str(3.5 * size / 1e9))
    _keep("d")
    assert sorted(path.name for path in folder.iterdir()) == ["b", "c", "d"]


def test_no_cache_where_it_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COLLIE_LAB_DATA_CACHE", str(tmp_path / "file"))
    run, _ = _prepare(_write(tmp_path / "data.json"))
    assert not list(run.path.glob("tmp-*"))
