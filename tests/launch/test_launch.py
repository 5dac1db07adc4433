"""Launching as such: a run to its end, many at once, and what it does to the process that launches."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import toy

import collie_lab as lab
from collie_lab.launch import _start, _supervise, attach, runs


def test_a_run_to_its_end(tmp_path: Path, mark: str) -> None:
    """A closure, a class and module-level code travel; metrics, evaluation, result and logs come back."""
    offset = 3

    class Doubler:
        def __call__(self, value: int) -> int:
            return 2 * value + offset

    double = Doubler()

    def callback(trainer: Any) -> None:
        print(f"rank {trainer.rank}: {double(trainer.step)}")

    run = toy.start(mark, tmp_path, callback, steps=3, wait=True)

    assert (run.status, run.alive, run.error) == ("ok", False, None)
    assert run.metrics["step"].tolist() == [1, 2, 3]
    assert run.metrics.loc[2, "loss"] == 0.5
    assert run.evaluations["perplexity"].tolist() == [2.5]
    assert run.summary["status"] == "ok"
    assert run.summary["loss"] == 0.5
    assert run.logs(rank=1).splitlines() == ["rank 1: 5", "rank 1: 7", "rank 1: 9"]
    assert run.folder.read("status.json")["exit_codes"] == {"0": 0, "1": 0}
    assert run.folder.read("status.json")["host"] == socket.gethostname()
    assert [other.id for other in runs(tmp_path)] == [run.id]
    assert attach(run.id, tmp_path).metrics.equals(run.metrics)


def test_ten_at_once_find_ports_and_folders(tmp_path: Path, mark: str) -> None:
    started = [toy.start(mark, tmp_path, ranks=1) for _ in range(10)]
    assert [run.wait(timeout=120) for run in started] == ["ok"] * 10
    assert len({run.id for run in started}) == 10


def test_the_kernel_is_left_as_it_was(tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Handlers, environment, directory and modules are the same; what would mislead the ranks does not reach them.

    Nor is anything left in the temporary directory.
    """
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    for name, value in {"RANK": "7", "WORLD_SIZE": "9", "MASTER_PORT": "1", "PET_NNODES": "4",
                        "TORCHELASTIC_RUN_ID": "none", "MPLBACKEND": "module://inline"}.items():
        monkeypatch.setenv(name, value)

    def state() -> tuple[Any, ...]:
        handlers = [signal.getsignal(number) for number in signal.valid_signals()]
        return dict(os.environ), handlers, os.getcwd(), list(sys.path), "torch" in sys.modules

    def callback(trainer: Any) -> None:
        print(trainer.world_size, os.environ["MASTER_PORT"] != "1", "MPLBACKEND" in os.environ)

    before = state()
    run = toy.start(mark, tmp_path, callback, wait=True)
    assert state() == before
    assert run.logs() == "2 True False\n"
    assert not list((tmp_path / "temporary").iterdir())


def test_a_run_outlives_the_thread_that_launched_it(tmp_path: Path, mark: str) -> None:
    started: list[Any] = []

    def callback(trainer: Any) -> None:
        time.sleep(0.3)

    thread = threading.Thread(target=lambda: started.append(toy.start(mark, tmp_path, callback, steps=3)))
    thread.start()
    thread.join()
    assert started[0].wait(timeout=60) == "ok"


def test_a_metric_is_seen_at_once_and_a_flood_blocks_nobody(tmp_path: Path, mark: str) -> None:
    def callback(trainer: Any) -> None:
        if trainer.step == 1:
            for _ in range(2000):  # 20 MB: more than any pipe holds
                sys.stderr.write("x" * 10_000 + "\n")
            for percent in range(100):
                sys.stderr.write(f"\rprogress {percent + 1}%")
            sys.stderr.write("\n")
        while trainer.step == 2 and not (trainer.folder.path / "seen").exists():
            time.sleep(0.01)

    run = toy.start(mark, tmp_path, callback, steps=2)
    toy.wait_until(lambda: run.steps == 1)
    assert time.time() - run.metrics["time"].iloc[-1] < 0.5
    (run.folder.path / "seen").touch()
    assert run.wait(timeout=60) == "ok"
    assert run.logs(1, "err", tail=1) == "progress 100%\n"
    assert len(run.logs(1, "err").splitlines()) == 2001
    with pytest.raises(ValueError, match="has no rank 2; there are: 0 to 1"):
        run.logs(2)
    with pytest.raises(ValueError, match="no stream is called 'stderr'; there are: out, err, both"):
        run.logs(0, "stderr")  # type: ignore[arg-type]


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(lab.CellError, match=r"resume.*is no folder"):
        toy.start("unused", tmp_path / "runs", resume=tmp_path / "nowhere")
    for option in ("timeout", "stall_timeout", "grace", "max_restarts"):
        for wrong in (-1, "3", True):
            with pytest.raises(lab.CellError, match=rf"launch\.{option}: a (whole )?number, 0 or more, got {wrong!r}"):
                toy.start("unused", tmp_path / "runs", **{option: wrong})
    with pytest.raises(lab.CellError, match=r"launch\.max_restarts: a whole number, 0 or more, got 0\.5"):
        toy.start("unused", tmp_path / "runs", max_restarts=0.5)
    for option, value, words in (("pool", 2, r"lab\.Pool"), ("nodes", 2, r"lab\.Nodes"), ("env", {"A": 1}, "are text")):
        with pytest.raises(lab.CellError, match=rf"launch\.{option}: .*{words}"):
            lab.Experiment(model=lab.Model("llama-tiny", init="random")).launch(
                folder=tmp_path / "runs", **{option: value})  # type: ignore[arg-type]
    assert not (tmp_path / "runs").exists()


def test_an_interrupt_while_the_supervisor_starts_leaves_nothing(tmp_path: Path, mark: str,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_supervise, "time", mock.Mock(sleep=mock.Mock(side_effect=KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt):
        toy.start(mark, tmp_path)
    assert not toy.processes(mark)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_preparation_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise lab.CellError([lab.Problem("Text", "source", "no such file")])

    monkeypatch.setattr(_start, "_prepare", fail)
    with pytest.raises(lab.CellError, match="no such file"):
        _start.launch(toy.experiment(), folder=tmp_path, show=False)
    assert list(tmp_path.iterdir()) == []
