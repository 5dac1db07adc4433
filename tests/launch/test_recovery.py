"""Runs that outlive their kernel, that stall, that run out of memory, that are begun again."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import toy

import collie_lab as lab
from collie_lab.beat import Beat
from collie_lab.folder import RunFolder
from collie_lab.launch import RankError, attach


def stalls_in_step_3(trainer: Any) -> None:
    if trainer.rank == 1 and trainer.step == 3:
        time.sleep(100)
    trainer.barrier()


def test_a_stall_names_the_rank_and_keeps_all_stacks(tmp_path: Path, mark: str) -> None:
    with pytest.raises(RankError) as caught:
        toy.start(mark, tmp_path, stalls_in_step_3, steps=5, stall_timeout=2.0, wait=True)
    toy.assert_gone(mark)
    run = lab.runs(tmp_path)[0]
    assert run.status == "timeout"
    assert run.detail.startswith("rank 1 stalled in step 3: no sign of life for 2 s")
    assert caught.value.rank == 1
    assert "in stalls_in_step_3" in caught.value.traceback
    assert caught.value.others[0].startswith("was at toy_worker.py")  # in the barrier
    stacks = run.stacks()
    assert list(stacks) == [0, 1]
    assert "in barrier" in stacks[0]


def moves_slowly(trainer: Any) -> None:
    for _ in range(5):
        time.sleep(0.5)
        trainer.beat.say("evaluation")


def test_signs_of_life_within_a_long_step_are_no_stall(tmp_path: Path, mark: str) -> None:
    assert toy.start(mark, tmp_path, moves_slowly, stall_timeout=1.5).wait(timeout=60) == "ok"


def dies_once(trainer: Any) -> None:
    print(f"step {trainer.step}")
    if trainer.rank == 0:
        (trainer.folder.checkpoints / f"step-{trainer.step:06d}").mkdir()
    trainer.barrier()
    if trainer.rank == 1 and trainer.step == 3 and not (trainer.folder.path / "attempts").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    trainer.barrier()


def test_a_run_is_begun_again_from_its_checkpoint(tmp_path: Path, mark: str) -> None:
    run = toy.start(mark, tmp_path, dies_once, steps=5, max_restarts=1, wait=True)
    assert run.status == "ok"
    assert run.metrics["step"].tolist() == [1, 2, 4, 5]  # the third step's record died with it
    first = run.folder.path / "attempts" / "1"
    assert (first / "logs" / "rank-1.out").read_text().splitlines() == ["step 1", "step 2", "step 3"]
    assert run.logs(1).splitlines() == ["step 4", "step 5"]
    assert json.loads((first / "status.json").read_text())["detail"] == "rank 1: killed (SIGKILL)"
    events = [json.loads(line) for line in (run.folder.path / "events.jsonl").read_text().splitlines()]
    restart = next(event for event in events if event["kind"] == "restart")
    assert (restart["attempt"], restart["step"], restart["detail"]) == (2, 3, "rank 1: killed (SIGKILL)")
    assert run.folder.read("status.json")["attempts"] == 2


def always_fails(trainer: Any) -> None:
    raise ValueError("as ever")


def test_attempts_run_out(tmp_path: Path, mark: str) -> None:
    run = toy.start(mark, tmp_path, always_fails, ranks=1, max_restarts=2)
    assert run.wait(timeout=60) == "error"
    assert sorted(path.name for path in (run.folder.path / "attempts").iterdir()) == ["1", "2"]
    assert run.detail == "rank 0: ValueError: as ever"
    assert isinstance(run.error, RankError)


def runs_dry(trainer: Any) -> None:
    import torch

    trainer.beat.say("step", shape=(4, 512))
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    torch.empty(64 << 30, dtype=torch.uint8)


def test_want_of_host_memory_is_told_with_the_shape(tmp_path: Path, mark: str) -> None:
    run = toy.start(mark, tmp_path, runs_dry, ranks=1, max_restarts=0)
    assert run.wait(timeout=60) == "host_oom"
    assert run.detail.startswith("rank 0: out of host memory in step 1, with a micro-batch of 4 × 512 tokens; it held ")
    status = run.folder.read("status.json")
    assert status["shape"] == [4, 512]
    assert 0 < status["peak_bytes"] < 8 << 30
    assert run.summary["peak_bytes"] == status["peak_bytes"]
    assert run.summary["status"] == "host_oom"
    assert "can't allocate memory" in str(run.error)


def waits_for_a_word(trainer: Any) -> None:
    while not (trainer.folder.path / "go on").exists():
        time.sleep(0.05)


def test_a_detached_run_outlives_its_launcher(tmp_path: Path, mark: str) -> None:
    """Here the launching process is a child that ends at once; kernels are in `test_kernels`."""
    child = os.fork()
    if child == 0:
        toy.start(mark, tmp_path, waits_for_a_word, detach=True)
        os._exit(0)
    os.waitpid(child, 0)
    run = lab.runs(tmp_path)[0]
    time.sleep(0.5)
    assert run.alive
    (run.folder.path / "go on").touch()
    assert run.wait(timeout=60) == "ok"
    assert attach(run.id, tmp_path).metrics["step"].tolist() == [1]
    toy.assert_gone(mark)


def test_a_run_on_another_machine_is_judged_by_its_folder(tmp_path: Path) -> None:
    """There its pid says nothing."""
    folder = RunFolder.create(tmp_path, "toy")
    folder.write("launch.json", {"world_size": 1, "nodes": None})
    state = {"status": "running", "host": "elsewhere", "pid": 2**22 + 1, "pid_started": 0.0, "ended": None}
    run = lab.Run(folder)
    folder.write("status.json", state)
    assert (run.host, run.status) == ("elsewhere", "running")
    for verb in ("kill", "stacks"):
        with pytest.raises(RuntimeError, match=rf"runs on elsewhere.* call run\.{verb}\(\) there"):
            getattr(run, verb)()
    run.stop()
    assert folder.stop_flag.exists()

    os.utime(folder.path / "status.json", (0, 0))
    assert run.status == "lost"
    folder.stop_flag.unlink()
    run.stop()
    assert folder.stop_flag.exists()
    Beat(folder, 0).close()
    assert run.status == "running"

    folder.write("status.json", {**state, "status": "ok", "ended": 1.0})
    assert (run.status, run.alive) == ("ok", False)
    run.kill()
    folder.write("status.json", {name: value for name, value in state.items() if name != "host"})
    assert (run.host, run.status) == (socket.gethostname(), "lost")  # written before hosts were: of this machine


def test_several_machines_are_not_begun_again(tmp_path: Path) -> None:
    nodes = lab.Nodes(2, address="127.0.0.1")
    with pytest.raises(lab.CellError, match="max_restarts"):
        toy.start("unused", tmp_path / "runs", nodes=nodes, max_restarts=1)
    assert not (tmp_path / "runs").exists()
