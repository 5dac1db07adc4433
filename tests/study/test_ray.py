"""What becomes of arms when Ray loses the process that runs them, and what is left of a Ray of one's own."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import pytest

from collie_lab.cells import CellError
from collie_lab.study import Study
from tests.processes import wait_until
from tests.study.executors import finish, running, steps
from tests.study.grids import ROOT, toy_grid

ray = pytest.importorskip("ray", reason="ray is not installed")
pytestmark = [pytest.mark.executors, pytest.mark.timeout(600)]

#: One arm, of 12 seconds.
_GRID = toy_grid([5], training={"steps": 60, "checkpoint_every": 5})


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def _with(words: str) -> list[psutil.Process]:
    """Processes whose command has these words."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if words in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_an_arm_whose_worker_dies_is_lost_and_gone_on_with(tmp_path: Path) -> None:
    results = tmp_path / "toy"
    with running(_GRID, results, "--executor", "ray") as process:
        wait_until(lambda: steps(_GRID, results) > [8], 240)
        [arm] = _with(f"collie_lab.study.arm {results}")
        arm.parent().kill()
        code, words = finish(process)
    assert code == 3, words
    assert not _with(str(results))
    [row] = Study(_GRID, results=results).frame.to_dict("records")
    assert (row["status"], row["reason"].partition(":")[0]) == ("lost", "Ray")
    with running(_GRID, results, "--executor", "ray") as process:
        code, words = finish(process)
    assert code == 0, words
    [row] = Study(_GRID, results=results).frame.to_dict("records")
    assert (row["attempts"], row["steps"], row["resumed"]) == (2, 60, True)


def test_arms_that_no_node_has_room_for_are_refused_and_a_ray_of_its_own_ends() -> None:
    before = {process.pid for process in _with("raylet")}
    grid = toy_grid([0], training={"batch_size": 4096, "micro_batch_size": 1})
    grid["base"]["parallel"] = {"dp": 4096}
    with pytest.raises(CellError, match="takes 4096 CPUs; no node has more than"):
        Study(grid, results="refused").run(executor="ray", progress=False)
    assert not Path("refused").exists()
    wait_until(lambda: {process.pid for process in _with("raylet")} <= before)
    assert not ray.is_initialized()
