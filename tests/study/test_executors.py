"""The same grid on this machine, on a Slurm and on a Ray: the same table, also where it was interrupted."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from collie_lab.study import Study
from tests.processes import wait_until
from tests.study.executors import REAL, finish, running, steps
from tests.study.local_slurm import local_slurm, missing

pytestmark = [pytest.mark.executors, pytest.mark.timeout(900)]

_COLUMNS = ["method", "seed", "status", "loss", "steps", "tokens"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """On this machine, without an interruption."""
    return Study(REAL, results=tmp_path_factory.mktemp("local") / "real").run(progress=False)


@pytest.fixture
def options(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Of the command line, for a cluster that runs."""
    if request.param == "ray":
        if importlib.util.find_spec("ray") is None:
            pytest.skip("ray is not installed")
        yield ["--executor", "ray"]
        return
    if absent := [*missing(), *(["submitit"] if importlib.util.find_spec("submitit") is None else [])]:
        pytest.skip(f"not installed: {', '.join(absent)}")
    with local_slurm() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield ["--executor", "slurm", "--time", "30", "--memory", "1500MB"]


@pytest.mark.parametrize("options", ["slurm", "ray"], indirect=True)
def test_a_cluster_gives_the_table_of_this_machine(options: list[str], reference: pd.DataFrame, tmp_path: Path) -> None:
    results = tmp_path / "real"
    with running(REAL, results, *options) as process:
        wait_until(lambda: process.poll() is not None or max(steps(REAL, results), default=0) > 12, 300)
        process.send_signal(signal.SIGINT)
        code, words = finish(process)
    assert code == 130, words
    interrupted = Study(REAL, results=results)
    assert "stopped" in interrupted.statuses().values(), words
    assert max(steps(REAL, results)) < 120
    with running(REAL, results, *options) as process:
        code, words = finish(process)
    assert code == 0, words
    frame = Study(REAL, results=results).frame
    assert 2 in set(frame["attempts"])
    pd.testing.assert_frame_equal(frame[_COLUMNS], reference[_COLUMNS])
