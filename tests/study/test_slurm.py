"""What becomes of arms when Slurm takes their node, kills their job, or has lost the runner that submitted them."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from collie_lab.study import Slurm, Study
from collie_lab.study.store import ArmFolder
from tests.processes import wait_until
from tests.study.executors import finish, running, steps
from tests.study.grids import ROOT, toy_grid
from tests.study.local_slurm import local_slurm, missing

pytestmark = [pytest.mark.executors, pytest.mark.timeout(600)]

#: One arm, of 12 seconds.
_GRID = toy_grid([5], training={"steps": 60, "checkpoint_every": 5})
_OPTIONS = ["--executor", "slurm", "--time", "30", "--memory", "1200MB"]


@pytest.fixture(scope="module")
def variables() -> Iterator[dict[str, str]]:
    """A Slurm of two CPUs; the variables by which its programs find it."""
    if absent := [*missing(), *(["submitit"] if importlib.util.find_spec("submitit") is None else [])]:
        pytest.skip(f"not installed: {', '.join(absent)}")
    with local_slurm() as found:
        yield found


@pytest.fixture(autouse=True)
def _slurm(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {**variables, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    yield
    subprocess.run(["scancel", "--me"], check=True)
    wait_until(lambda: not _squeue("%i"))


def _squeue(what: str, *options: str) -> str:
    answer = subprocess.run(["squeue", "-h", "-o", what, *options], capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def _state(results: Path) -> dict[str, object]:
    [folder] = (results / "arms").iterdir()
    return ArmFolder(folder).state


def test_a_runner_that_was_killed_leaves_jobs_that_the_next_one_finds(tmp_path: Path) -> None:
    results, grid = tmp_path / "toy", {**_GRID, "seeds": [5, 6]}
    with running(grid, results, *_OPTIONS) as process:
        wait_until(lambda: max(steps(grid, results), default=0) > 5, 120)
        process.kill()
    with running(grid, results, *_OPTIONS) as process:
        code, words = finish(process)
    assert code == 0, words
    assert set(Study(grid, results=results).frame["attempts"]) == {1}
    assert len(list((results / "slurm").glob("*/arms.json"))) == 1


def test_slurm_wants_the_node_and_the_arm_goes_on_later(tmp_path: Path) -> None:
    results = tmp_path / "toy"
    with running(_GRID, results, *_OPTIONS) as process:
        wait_until(lambda: steps(_GRID, results) > [8], 120)
        subprocess.run(["sbatch", "--partition=urgent", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 1"],
                       check=True)
        wait_until(lambda: _state(results)["status"] == "stopped", 120)
        wait_until(lambda: "PENDING" in _squeue("%T", "--partition=normal"), 60)
        job = _squeue("%i", "--partition=normal")
        subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], check=True)  # not in two minutes
        code, words = finish(process)
    assert code == 0, words
    [row] = Study(_GRID, results=results).frame.to_dict("records")
    assert (row["attempts"], row["steps"], row["resumed"]) == (2, 60, True)


def test_a_job_that_takes_too_much_memory_is_a_result(tmp_path: Path) -> None:
    frame = Study(toy_grid([3]), results=tmp_path / "toy").run(
        executor=Slurm(time="30", memory="700 MB", interval=1.0), progress=False)
    assert list(frame["status"]) == ["host_oom"]
    assert frame["reason"].iloc[0].startswith("Slurm ended the job: it took more memory than it had asked for (job ")


def test_a_job_that_was_cancelled_is_run_by_the_next_study(tmp_path: Path) -> None:
    results = tmp_path / "toy"
    with running(_GRID, results, *_OPTIONS) as process:
        wait_until(lambda: steps(_GRID, results) > [8], 120)
        subprocess.run(["scancel", "--me"], check=True)
        code, words = finish(process)
    assert code == 3, words
    assert _state(results)["status"] in ("stopped", "lost")
    with running(_GRID, results, *_OPTIONS) as process:
        code, words = finish(process)
    assert code == 0, words
    [row] = Study(_GRID, results=results).frame.to_dict("records")
    assert (row["attempts"], row["resumed"]) == (2, True)


def test_an_arm_that_waits_is_taken_out_of_the_queue_by_an_interrupt(tmp_path: Path) -> None:
    results = tmp_path / "toy"
    subprocess.run(["sbatch", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 600"], check=True)
    with running(_GRID, results, *_OPTIONS) as process:
        wait_until(lambda: "toy" in _squeue("%j"), 120)
        process.send_signal(signal.SIGINT)
        code, words = finish(process)
    assert code == 130, words
    assert _state(results)["status"] == "stopped"
    assert "toy" not in _squeue("%j")


def test_nothing_is_left_of_a_cluster() -> None:
    with local_slurm() as found:
        folder = Path(found["SLURM_CONF"]).parent
        subprocess.run(["sbatch", "--output=/dev/null", "--wrap=sleep 600"], check=True, env={**os.environ, **found})
    assert not folder.exists()
    assert not [process for process in psutil.process_iter(["cmdline"])
                if str(folder) in " ".join(process.info["cmdline"] or [])]  # None: it has just ended
