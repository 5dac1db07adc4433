"""Ranks that fail, crash, hang or will not end: each is named, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import toy

from collie_lab.launch import RankError, Run


def raises(trainer: Any) -> None:
    if trainer.rank == 1:
        raise ValueError("the loss is upside down")  # this line is shown
    trainer.barrier()


def test_an_exception_names_its_rank_and_line(tmp_path: Path, mark: str) -> None:
    with pytest.raises(RankError) as caught:
        toy.start(mark, tmp_path, raises, wait=True)
    error = caught.value
    assert error.rank == 1
    assert "error: rank 1: ValueError: the loss is upside down" in str(error)
    assert 'raise ValueError("the loss is upside down")  # this line is shown' in str(error)
    assert "logs" in str(error)
    assert error.others == {}  # rank 0 was ended, it did not fail
    toy.assert_gone(mark)


def everywhere(trainer: Any) -> None:
    raise KeyError("missing")


def test_the_same_failure_is_told_once(tmp_path: Path, mark: str) -> None:
    run = toy.start(mark, tmp_path, everywhere)
    run.wait(timeout=60)
    assert run.error is not None
    assert str(run.error).count("Traceback") == 1
    if run.error.others == {1 - run.error.rank: "KeyError: 'missing'"}:  # the other was quick enough to fail itself
        assert f"the same on rank {1 - run.error.rank}" in str(run.error)


def leaves(trainer: Any) -> None:
    if trainer.rank == 1:
        sys.exit(3)
    time.sleep(100)


def crashes(trainer: Any) -> None:
    if trainer.rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(100)


def is_killed(trainer: Any) -> None:
    if trainer.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    trainer.barrier()


@pytest.mark.parametrize(("callback", "words", "code"), [
    (leaves, "rank 1: sys.exit(3)", 3),
    (crashes, "rank 1: segmentation fault (SIGSEGV)", -11),
    (is_killed, "rank 1: killed (SIGKILL)", -9),
], ids=["sys.exit", "segfault", "SIGKILL"])
def test_every_way_to_end_has_its_name(tmp_path: Path, mark: str, callback: Callable[..., None],
                                       words: str, code: int) -> None:
    run = toy.start(mark, tmp_path, callback)
    assert run.wait(timeout=60) == "error"
    assert run.detail == words
    assert run.folder.read("status.json")["exit_codes"]["1"] == code
    assert run.error is not None
    assert run.error.rank == 1
    if callback is crashes:
        assert "in crashes" in run.error.traceback  # faulthandler's words, from the error log
    toy.assert_gone(mark)


def test_a_rank_that_fails_before_its_log_is_open_is_quoted_all_the_same(tmp_path: Path, mark: str) -> None:
    run = toy.start(mark, tmp_path, ranks=1, _module="no_such_module")
    run.wait(timeout=60)
    assert run.error is not None
    assert run.error.traceback.strip().endswith("No module named no_such_module")
    assert run.error.rank == 0


def fails_among_the_deaf(trainer: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (trainer.folder.path / f"deaf-{trainer.rank}").touch()
    if trainer.rank == 1:
        toy.wait_until((trainer.folder.path / "deaf-0").exists)
        raise ValueError("out")
    time.sleep(100)


def test_deaf_peers_of_a_failed_rank_are_ended_after_the_grace(tmp_path: Path, mark: str) -> None:
    run = toy.start(mark, tmp_path, fails_among_the_deaf, grace=1.0)
    record = run.folder.errors / "rank-1.json"
    toy.wait_until(record.exists)
    toy.assert_gone(mark, seconds=1.0 + 2.0, variable="RANK")
    toy.assert_gone(mark)
    assert run.detail == "rank 1: ValueError: out"
    assert run.folder.read("status.json")["exit_codes"] == {"0": -9, "1": 1}


def is_deaf(trainer: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (trainer.folder.path / f"deaf-{trainer.rank}").touch()
    time.sleep(100)


def all_deaf(run: Run) -> bool:
    return all((run.folder.path / f"deaf-{rank}").exists() for rank in (0, 1))


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_deaf_ranks_are_gone_in_time(tmp_path: Path, mark: str, how: str) -> None:
    run = toy.start(mark, tmp_path, is_deaf, grace=1.0)
    toy.wait_until(lambda: all_deaf(run))
    getattr(run, how)()
    toy.assert_gone(mark, seconds=1.0 + 2.0, variable="RANK")
    toy.assert_gone(mark)
    assert run.status == "stopped"
    assert ("on request" if how == "kill" else "did not heed") in run.detail
    assert run.error is None


def steps_slowly(trainer: Any) -> None:
    time.sleep(0.1)


def test_a_stop_comes_after_the_step_and_is_no_error(tmp_path: Path, mark: str) -> None:
    run = toy.start(mark, tmp_path, steps_slowly, steps=1000)
    toy.wait_until(lambda: run.steps >= 1)
    run.stop()
    assert run.wait(timeout=30) == "stopped"
    assert run.result["steps"] == run.steps < 1000
    assert run.detail == ""
    toy.assert_gone(mark)


def takes_long_steps(trainer: Any) -> None:
    time.sleep(0.7)


def test_a_long_step_is_not_killed_for_its_length(tmp_path: Path, mark: str) -> None:
    """The grace is shorter than a step; two steps are waited for."""
    run = toy.start(mark, tmp_path, takes_long_steps, steps=1000, grace=0.1)
    toy.wait_until(lambda: run.steps >= 2)
    run.stop()
    assert run.wait(timeout=30) == "stopped"
    assert run.result["status"] == "stopped"


def hangs_here(trainer: Any) -> None:
    (trainer.folder.path / f"hangs-{trainer.rank}").touch()
    time.sleep(100)


def test_stacks_of_a_hang_and_a_timeout(tmp_path: Path, mark: str) -> None:
    run = toy.start(mark, tmp_path, hangs_here, timeout=40.0)
    run.stacks()  # harmless while the ranks are not ready
    toy.wait_until(lambda: all((run.folder.path / f"hangs-{rank}").exists() for rank in (0, 1)))
    stacks = run.stacks()
    assert list(stacks) == [0, 1]
    assert all("in hangs_here" in text for text in stacks.values())
    assert run.wait(timeout=60) == "timeout"
    assert isinstance(run.error, RankError)
    assert run.error.rank is None
    assert "in hangs_here" in run.logs(1, "err")
    toy.assert_gone(mark)


def forks(trainer: Any) -> None:
    """Two children each, like a DataLoader's workers."""
    for _ in range(2):
        if os.fork() == 0:
            time.sleep(100)
    (trainer.folder.path / f"forked-{trainer.rank}").touch()
    time.sleep(100)


@pytest.mark.parametrize("victim", ["supervisor", "agent"])
def test_nothing_outlives_the_supervisor_or_torchrun(tmp_path: Path, mark: str, victim: str) -> None:
    run = toy.start(mark, tmp_path, forks)
    toy.wait_until(lambda: all((run.folder.path / f"forked-{rank}").exists() for rank in (0, 1)))
    assert len(toy.processes(mark)) == 2 + 2 * 3
    supervisor = psutil.Process(run.folder.read("status.json")["pid"])
    (supervisor if victim == "supervisor" else supervisor.children()[0]).kill()
    toy.assert_gone(mark)
    assert run.status == ("lost" if victim == "supervisor" else "error")
    assert ("without a word" if victim == "supervisor" else "the launcher (torchrun) was killed") in str(run.error)


def test_another_torchrun_is_left_alone(tmp_path: Path, mark: str) -> None:
    """One that the same user has started by hand, before ours is killed."""
    (tmp_path / "other.py").write_text("import os, pathlib, time\n"
                                       "pathlib.Path('up-' + os.environ['RANK']).touch()\ntime.sleep(100)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--log-dir",
               str(tmp_path / "log"), "other.py"]
    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True) as other:
        try:
            run = toy.start(mark, tmp_path, hangs_here)
            toy.wait_until(lambda: all((tmp_path / f"up-{rank}").exists() for rank in (0, 1)))
            toy.wait_until(lambda: all((run.folder.path / f"hangs-{rank}").exists() for rank in (0, 1)))
            family = psutil.Process(other.pid).children(recursive=True)
            run.kill()
            toy.assert_gone(mark)
            assert len(family) == 2
            assert other.poll() is None
            assert all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
        finally:
            other.terminate()
