"""What this machine is taken to have."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from collie_lab.launch._supervise import environment
from collie_lab.study import executor


def test_processes_share_the_cpus_that_are_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large machine this process has four."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    assert environment(2, [])["OMP_NUM_THREADS"] == "2"
    assert environment(8, [])["OMP_NUM_THREADS"] == "1"
    with mock.patch.object(subprocess, "Popen") as started:
        executor.LocalExecutor(slots=2).submit(tmp_path, gpus=1)
    assert started.call_args.kwargs["env"]["OMP_NUM_THREADS"] == "2"
