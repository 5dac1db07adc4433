"""How code travels: what arrives, what is refused, and with which words."""

from __future__ import annotations

import importlib
import linecache
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import toy
import yaml

import collie_lab as lab
from collie_lab import code
from collie_lab.folder import RunFolder

WEIGHTS = np.zeros(10 * 2**20)  # 80 MiB


def ship(experiment: lab.Experiment, path: Path) -> lab.Experiment:
    """Pack here, load as a rank would."""
    mapping, packed = code.pack(experiment)
    (path / "experiment.yaml").write_text(yaml.safe_dump(mapping))
    if packed:
        (path / "code.pkl").write_bytes(packed)
    return code.load_experiment(RunFolder(path))


def test_an_experiment_without_code_needs_no_pickle(tmp_path: Path) -> None:
    experiment = toy.experiment()
    assert ship(experiment, tmp_path) == experiment
    assert not (tmp_path / "code.pkl").exists()


def test_callables_and_records_arrive_in_their_places(tmp_path: Path) -> None:
    shared = {"calls": 0}

    def score(answer: str, reference: str) -> float:
        shared["calls"] += 1
        return 0.5

    def first(trainer: Any) -> int:
        return shared["calls"]

    records = [{"prompt": "a", "completion": "b"}]
    experiment = toy.experiment(first, first).replace(
        data=lab.Instructions(records), evaluate=(lab.Perplexity(), lab.ExactMatch(score=score)))
    loaded = ship(experiment, tmp_path)

    assert isinstance(loaded.data, lab.Instructions)
    assert loaded.data.source == records
    match = loaded.evaluate[1]
    assert isinstance(match, lab.ExactMatch)
    assert match.score is not None
    assert match.score("", "") == 0.5
    assert [callback(None) for callback in loaded.callbacks] == [1, 1]  # they share what they captured
    text = yaml.safe_load((tmp_path / "experiment.yaml").read_text())
    assert text["evaluate"][1]["score"] == f"<function {score.__qualname__}, in code.pkl>"
    assert text["data"]["source"] == "<list of 1 records, in code.pkl>"


def test_cell_sources_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, source = "/nowhere/ipykernel_1/2.py", "def callback(trainer):\n    raise ValueError  # here\n"
    monkeypatch.setitem(linecache.cache, name, (len(source), None, source.splitlines(True), name))
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, name, "exec"), scope)
    _, packed = code.pack(toy.experiment(scope["callback"]))
    (tmp_path / "code.pkl").write_bytes(packed)
    del linecache.cache[name]
    (callback,) = code.load(RunFolder(tmp_path)).values()
    assert callback.__code__.co_filename == name
    assert linecache.getline(name, 2) == "    raise ValueError  # here\n"


@pytest.fixture
def local_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module beside the notebook that the kernel has imported and then changed."""
    (tmp_path / "mine.py").write_text("import threading\nLOCK = 0\ndef number(): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("mine")
    yield module
    del sys.modules["mine"]


def test_local_modules_travel_as_the_kernel_has_them(tmp_path: Path, local_module: Any) -> None:
    before = cloudpickle.list_registry_pickle_by_value()
    exec("def number(): return 2", local_module.__dict__)
    _, packed = code.pack(toy.experiment(local_module.number))
    assert cloudpickle.list_registry_pickle_by_value() == before
    del sys.modules["mine"]
    (callback,) = pickle.loads(pickle.loads(packed)["values"]).values()
    assert callback() == 2
    assert "mine" not in sys.modules
    sys.modules["mine"] = local_module


def test_a_local_module_that_cannot_travel_is_imported_by_the_ranks(tmp_path: Path, local_module: Any) -> None:
    local_module.LOCK = threading.Lock()
    _, packed = code.pack(toy.experiment(lambda trainer: local_module.number()))
    (callback,) = pickle.loads(pickle.loads(packed)["values"]).values()
    assert callback(None) == 1


def uses_weights(trainer: Any) -> Any:
    return [lambda: WEIGHTS.sum()]


def holds_a_lock() -> Callable[..., Any]:
    lock = threading.Lock()
    return lambda trainer: lock.acquire()


class _OnGpu(torch.Tensor):
    """Says that it lies on a GPU, for machines without one."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:0")


def holds_a_gpu_tensor() -> Callable[..., Any]:
    model = {"weight": torch.zeros(2).as_subclass(_OnGpu)}
    return lambda trainer: model


@pytest.mark.parametrize(("callback", "words"), [
    (uses_weights, "callbacks.0: .*larger than 64 MiB: `WEIGHTS` 80 MiB.*to a file"),
    (holds_a_lock(), "`lock` cannot travel.*lock.*make it inside the function"),
    (holds_a_gpu_tensor(), r"`model` is \(or holds\) a tensor on cuda:0.*\.cpu\(\)"),
], ids=["large", "lock", "gpu"])
def test_what_cannot_travel_is_named(tmp_path: Path, callback: Callable[..., Any], words: str) -> None:
    with pytest.raises(lab.CellError, match=words):
        toy.start("unused", tmp_path / "runs", callback)
    assert not (tmp_path / "runs").exists()
