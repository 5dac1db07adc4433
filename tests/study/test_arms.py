"""Arms as they are: a notebook executed by papermill, torchrun's ranks below it, and what becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

import collie_lab as lab
from collie_lab.folder import checkpoints_in
from collie_lab.study.store import ArmFolder
from tests.processes import assert_gone, marked, wait_until
from tests.study.grids import ROOT, start, toy_grid

SHELL = "import sys; from collie_lab.cli import app; app()"


@pytest.fixture
def mark() -> Iterator[str]:
    with marked(15.0) as mark:
        yield mark


def shell(mark: str, verb: str, grid: dict[str, Any], *options: str) -> subprocess.Popen[bytes]:
    """`collie-lab study <verb> grid.yaml ...`."""
    Path("grid.yaml").write_text(yaml.safe_dump(grid))
    return start(mark, "-c", SHELL, "study", verb, "grid.yaml", "--results", "results", *options)


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    output = process.communicate(timeout=240)[0].decode()
    return process.returncode, output


def grid_of_ends(*names: str, **keys: Any) -> dict[str, Any]:
    """What goes wrong follows from the seed: `tests.study.ranks`."""
    seeds = {"bug": 1, "hang": 2, "memory": 3, "kernel": 4}
    grid = toy_grid([0], product={"end": {name: {"training.seed": seeds[name]} for name in names}}, **keys)
    return {key: value for key, value in grid.items() if key != "seeds"}


@pytest.mark.ranks
def test_every_end_is_a_row(mark: str) -> None:
    """A bug, too much memory, a killed kernel, a hang; the study goes on, and its exit code and summary say so."""
    # Without what it holds an arm takes 0.3 GB, and twice that where torch is one for CUDA.
    grid = grid_of_ends("bug", "memory", "kernel", memory_limit="1.2 GB")
    code, output = ended(shell(mark, "run", grid, "--slots", "2"))
    assert code == 3, output  # the arm that is lost has no result
    assert "toy: 3 arms: 1 host oom, 1 error, 1 lost in results" in output
    assert "error: bug: rank 0: ValueError: a bug" in output
    code, output = ended(shell(mark, "run", grid_of_ends("hang", timeout=5)))  # a busy machine delays the others too
    assert code == 1, output
    study = lab.Study(grid_of_ends("bug", "memory", "kernel", "hang"), results="results")
    frame = study.frame
    assert frame["status"].to_dict() == {"bug": "error", "memory": "host_oom", "kernel": "lost", "hang": "timeout"}
    assert "no end after 5 s" in frame.loc["hang", "reason"]
    assert "over the limit of 1.20 GB; rank 0 had" in frame.loc["memory", "reason"]
    assert frame.loc["kernel", "reason"] == "the kernel was killed (SIGKILL)"
    table = str(study.table())
    for word in ("error", "host OOM", "lost", "timeout"):
        assert word.lower() in table.lower()
    bug, memory = (_folder(study, name).state for name in ("bug", "memory"))
    assert "raise ValueError" in bug["traceback"]
    assert memory["peak_host_bytes"] > 1.2e9
    facts = bug["provenance"]
    assert facts["packages"]["torch"]
    assert facts["environment"]
    assert len(facts["collie_lab_git"]["commit"]) == 40
    code, output = ended(shell(mark, "status", grid))
    assert (code, "lost       kernel" in output) == (3, True)
    cells = nbformat.read(_folder(study, "bug").notebook, as_version=4).cells
    assert any("a bug" in str(cell.get("outputs")) for cell in cells)


@pytest.mark.ranks
def test_interrupted_then_killed_then_finished_from_its_checkpoints(mark: str) -> None:
    grid = toy_grid([5], training={"steps": 40, "checkpoint_every": 1})

    def arm() -> ArmFolder:
        return ArmFolder(next(Path("results/arms").iterdir()))

    def steps() -> int:
        runs = arm().every_run if Path("results/arms").exists() else []
        found = checkpoints_in(runs[-1].folder.checkpoints) if runs else []
        return int(found[-1].name.removeprefix("step-")) if found else 0

    process = shell(mark, "run", grid)
    wait_until(lambda: steps() >= 2, 120)
    process.send_signal(signal.SIGINT)
    code, output = ended(process)
    assert (code, arm().status) == (130, "stopped"), output
    assert "1 stopped" in output
    first = steps()
    assert_gone(mark)

    process = shell(mark, "run", grid)
    wait_until(lambda: len(arm().every_run) == 2 and steps() >= first + 2, 120)
    assert arm().status == "running"
    process.kill()
    process.communicate()
    assert_gone(mark, 15.0)
    assert arm().status == "lost"
    second = steps()

    code, output = ended(shell(mark, "run", grid))
    assert code == 0, output
    runs = arm().every_run
    resumed = [run.folder.read("launch.json")["resume_from"] for run in runs]
    assert [path and int(path[-6:]) for path in resumed] == [None, first, second]
    assert [run.status for run in runs] == ["stopped", "stopped", "ok"]
    assert arm().state["attempts"] == 3
    study = lab.Study(grid, results="results")
    assert study.frame.loc["toy", ["status", "steps", "attempts"]].tolist() == ["ok", 40, 3]


@pytest.mark.ranks
def test_real_arms(mark: str) -> None:
    """Real training: a learning rate that works and one that does not."""
    grid = toy_grid([0], training={"steps": 3, "batch_size": 2}, product={"optimizer.lr": [1e-3, 1e30]})
    del grid["base"]["runner"]
    grid["base"] |= {"optimizer": {"kind": "sgd"}, "evaluate": [{"kind": "perplexity", "limit": 4}]}
    code, output = ended(shell(mark, "run", grid, "--slots", "2"))
    assert code == 1, output
    study = lab.Study(grid, results="results")
    assert study.statuses() == {"lr=0.001": "ok", "lr=1e+30": "diverged"}
    assert study.frame["perplexity"].notna().tolist() == [True, False]
    run = study.runs["lr=0.001"]
    assert study.frame.loc["lr=0.001", "run"] == str(run.folder.path)
    assert run.folder.path.parent.parent.parent == study.results.resolve() / "arms"


def test_a_parameter_that_the_notebook_has_not_is_an_error() -> None:
    experiment = lab.Experiment(model=lab.Model("llama-tiny", init="random"), data=lab.RandomTokens(length=16))
    experiment.to_yaml("experiment.yaml")
    done = subprocess.run([
        sys.executable, "-m", "papermill", str(ROOT / "notebooks" / "arm.ipynb"), "out.ipynb", "-p", "arm",
        "experiment.yaml", "-p", "resumed", "x"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode != 0
    assert "notebook.resumed: unknown parameter → its parameters: arm, resume" in done.stderr
    assert not Path("runs").exists()


def _folder(study: lab.Study, name: str) -> ArmFolder:
    arm = next(arm for arm in study.arms if arm.name == name)
    found = ArmFolder.find(study.results, arm.id)
    assert found is not None
    return found
