"""A rank that fails tells of it at once: it does not try to leave a group in which others wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import collie_lab as lab
from collie_lab.folder import RunFolder
from collie_lab.study import peer
from collie_lab.training import worker


@pytest.mark.parametrize(("module", "train"), [
    (worker, worker.train), (peer, lambda folder: peer.train(lab.Experiment(model="llama-tiny"), folder)),
], ids=["worker", "peer"])
def test_the_group_is_left_after_success_alone(module: Any, train: Callable[[RunFolder], None], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("bad loss")

    left: list[bool] = []
    monkeypatch.setattr(worker, "join", lambda: torch.device("cpu"))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    monkeypatch.setattr(module, "run", fail)
    with pytest.raises(ValueError, match="bad loss"):
        train(RunFolder(tmp_path))
    assert not left
    monkeypatch.setattr(module, "run", lambda *_: None)
    train(RunFolder(tmp_path))
    assert left
