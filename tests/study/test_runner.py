"""The runner: every arm once, whoever is killed and however many share the work. Fake arms, real processes."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import typer

import collie_lab as lab
from collie_lab.study.commands import _leave
from collie_lab.study.executor import LocalExecutor
from collie_lab.study.progress import Progress
from collie_lab.study.runner import Runner
from collie_lab.study.store import ArmFolder
from tests.processes import assert_gone, marked, wait_until
from tests.study.grids import diary, fake_command, start, toy_grid

ARMS = 8


@pytest.fixture
def mark() -> Iterator[str]:
    with marked(5.0) as mark:
        yield mark


@pytest.fixture
def fake() -> Iterator[None]:
    with mock.patch("collie_lab.study.executor.command", fake_command):
        yield


def folders(results: Path) -> list[Path]:
    return sorted(path.parent for path in results.glob("arms/*/arm.json"))


def done(results: Path) -> int:
    """Steps of all arms so far."""
    return sum(line.startswith("step") for folder in folders(results) for line in diary(folder))


def assert_each_once(results: Path) -> None:
    assert len(folders(results)) == ARMS
    for folder in folders(results):
        lines = diary(folder)
        assert lines.count("done") == 1
        assert lines[-1] == "done"  # nothing runs again
        steps = [int(line.partition(" ")[2]) for line in lines if line.startswith("step")]
        assert sorted(set(steps)) == [*range(1, 9)]
        begun = [int(line.partition(" ")[2]) for line in lines if line.startswith("begin")]
        assert begun == sorted(begun)  # an attempt goes on from the last
        assert ArmFolder(folder).state["attempts"] == len(begun)


def test_killed_at_five_moments_nothing_is_lost_or_run_twice(tmp_path: Path, mark: str) -> None:
    results = tmp_path / "results"
    moments = sorted(random.Random(8).sample(range(2, ARMS * 8 - 4), 5))
    for moment in moments:
        process = start(mark, "-m", "tests.study.runner_process", str(results), str(ARMS))
        wait_until(lambda moment=moment, process=process: done(results) >= moment or process.poll() is not None)
        assert process.poll() is None, process.communicate()[0].decode()
        process.kill()
        process.communicate()
        assert_gone(mark)
        study = lab.Study(toy_grid(range(ARMS)), results=results)
        assert set(study.statuses().values()) <= {"ok", "lost", "pending"}
        assert study.status()["arms"] == ARMS
    process = start(mark, "-m", "tests.study.runner_process", str(results), str(ARMS))
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output
    assert set(lab.Study(toy_grid(range(ARMS)), results=results).statuses().values()) == {"ok"}
    assert_each_once(results)


def test_two_runners_share_the_work(tmp_path: Path, mark: str) -> None:
    results = tmp_path / "results"
    two = [start(mark, "-m", "tests.study.runner_process", str(results), str(ARMS)) for _ in range(2)]
    for process in two:
        output = process.communicate()[0].decode()
        assert process.returncode == 0, output  # each waits until all is done
    assert_each_once(results)


def test_an_arm_that_fails_keeps_no_other_from_running(tmp_path: Path, fake: None, capfd: pytest.CaptureFixture[str],
                                                       ) -> None:
    study = lab.Study(toy_grid([99, 0, 1]), results=tmp_path / "results")
    frame = study.run(slots=2)
    assert frame["status"].to_dict() == {"seed=99": "error", "seed=0": "ok", "seed=1": "ok"}
    assert frame.loc["seed=99", "reason"] == "a bug"
    assert study.reasons() == {"seed=99": "a bug"}
    assert repr(study) == "<Study toy: 3 arms: 2 ok, 1 error>"
    told = capfd.readouterr().err
    assert re.search(r"seed=99: error +\(\d of 3", told)
    assert "3 of 3" in told


def test_programs_that_end_before_they_begin(tmp_path: Path) -> None:
    """What their exit code tells is the arm's status, the last words of their log the reason; none is begun again."""
    programs = ["import no_such_module", "import os; os.abort()", "import os; os.kill(os.getpid(), 9)",
                "import os; os.kill(os.getpid(), 15)"]
    begun: list[str] = []

    def command(folder: Path) -> list[str]:
        begun.append(folder.name)
        seed = json.loads((folder / "arm.json").read_text())["seed"]
        return fake_command(folder) if seed == 4 else [sys.executable, "-I", "-S", "-c", programs[seed]]

    study = lab.Study(toy_grid(range(5)), results=tmp_path / "results")
    with mock.patch("collie_lab.study.executor.command", command):
        study.run(progress=False)
    assert len(begun) == len(set(begun)) == 5
    assert [*study.statuses().values()] == ["error", "error", "lost", "stopped", "ok"]
    assert [*study.reasons().values()] == [
        "the arm's program: exit code 1; its last words: ModuleNotFoundError: No module named 'no_such_module'",
        "the arm's program: aborted (SIGABRT)", "the arm's program was killed (SIGKILL)",
        "stopped before it began (ended (SIGTERM))"]
    assert study._folder(study.arms[0]).state["traceback"].startswith("Traceback")
    for seeds, code in (([0, 1, 4], 1), ([2, 4], 3)):
        with pytest.raises(typer.Exit) as left:
            _leave(lab.Study(toy_grid(seeds), results=study.results))
        assert left.value.exit_code == code


def test_what_is_said_of_an_arm_is_not_said_of_its_earlier_attempts(tmp_path: Path) -> None:
    folder = ArmFolder(tmp_path)
    folder.write_status({"status": "ok", "ended": 1.0})
    folder.conclude("error", "a library is missing", since=2.0)
    assert folder.state == {"status": "ok", "ended": 1.0}  # by another runner, a moment ago
    folder.write_status({"status": "stopped", "started": 10.0, "ended": 40.0, "seconds": 30.0, "seconds_before": 5.0})
    folder.conclude("lost", "killed", since=30.0)
    assert folder.status == "stopped"
    folder.conclude("lost", "killed", since=50.0)
    state = folder.state
    assert (state["status"], state["seconds"], state["seconds_before"]) == ("lost", 0.0, 35.0)


def test_what_waits_elsewhere_is_queued(tmp_path: Path) -> None:
    class Job:
        alive, waits = True, True

    shown, job = [], Job()
    study = lab.Study(toy_grid([0, 1, 2]), results=tmp_path / "results")
    executor = mock.Mock(has_room=mock.Mock(side_effect=[True, True, False, False]), submit=mock.Mock(return_value=job))
    runner = Runner(lambda: study.arms, study._made, executor, mock.Mock(update=shown.append))
    runner._step()
    job.waits = False
    runner._step()
    assert [[*each.values()] for each in shown] == [["queued", "queued", "pending"], ["running", "running", "pending"]]
    progress = Progress(3, list)
    progress.update(shown[0])
    progress.close()
    assert "1 pending, 2 queued" in progress._text()


def test_finished_arms_are_skipped_and_new_ones_added(tmp_path: Path, fake: None) -> None:
    results = tmp_path / "results"
    lab.Study(toy_grid([0, 1]), results=results).run(slots=2, progress=False)
    study = lab.Study(toy_grid([1, 2], timeout=77), results=results)
    assert study.statuses() == {"seed=1": "ok", "seed=2": "pending"}
    study.run(slots=2, progress=False)
    assert set(study.statuses().values()) == {"ok"}
    assert [diary(folder).count("done") for folder in folders(results)] == [1, 1, 1]


def test_retry(tmp_path: Path, fake: None) -> None:
    results = tmp_path / "results"
    study = lab.Study(toy_grid([99, 0]), results=results)
    assert study.retry("error") == []  # nothing has run
    study.run(slots=2, progress=False)
    assert study.retry("error") == ["seed=99"]
    assert study.statuses() == {"seed=99": "pending", "seed=0": "ok"}
    state = study._folder(study.arms[0]).state
    assert state["seconds_before"] == 0.1  # what went on is counted whole
    study.run(progress=False)
    state = study._folder(study.arms[0]).state
    assert (state["status"], state["attempts"]) == ("error", 2)
    assert (study._folder(study.arms[0]).path / "attempts" / "1" / "status.json").exists()
    for wrong in ({"status": "eror"}, {"arms": "seed=5"}, {}):
        with pytest.raises(lab.CellError):
            study.retry(**wrong)


def test_other_code(tmp_path: Path, fake: None) -> None:
    study = lab.Study(toy_grid([0, 1]), results=tmp_path / "results")
    study.run(slots=2, progress=False)
    assert study.outdated == ["seed=0", "seed=1"]  # fake arms tell no version
    study.run(slots=2, progress=False)
    assert [study._folder(arm).state["attempts"] for arm in study.arms] == [1, 1]
    study.run(slots=2, progress=False, fresh_code=True)
    assert [study._folder(arm).state["attempts"] for arm in study.arms] == [2, 2]


def test_mistakes_start_nothing(tmp_path: Path) -> None:
    study = lab.Study(toy_grid([0], training={"batch_size": 4, "micro_batch_size": 3}), results=tmp_path / "results")
    assert "does not divide" in repr(study.check())
    with pytest.raises(lab.CellError, match=r"does not divide.*\(toy\)"):
        study.run()
    for wrong in ({"executor": "cloud"}, {"slots": 0}):
        with pytest.raises(lab.CellError):
            lab.Study(toy_grid([0]), results=tmp_path / "results").run(**wrong)
    assert not (tmp_path / "results").exists()


def test_gpus_are_shared_out(tmp_path: Path) -> None:
    from collie_lab.study.executor import LocalExecutor

    with mock.patch("collie_lab.study.executor.visible_gpus", return_value=["a", "b", "c"]), \
            mock.patch("collie_lab.study.executor._LOCKS", tmp_path), \
            mock.patch("collie_lab.study.executor.command", lambda folder: [
                "sh", "-c", f"echo $CUDA_VISIBLE_DEVICES > {folder}/seen; sleep 60"]):
        one, other = LocalExecutor(), LocalExecutor()
        jobs = []
        for executor, gpus in ((one, 2), (other, 1)):
            place = tmp_path / str(gpus)
            place.mkdir()
            assert executor.has_room(gpus)
            jobs.append(executor.submit(place, gpus))
            wait_until(lambda place=place: (place / "seen").exists() and (place / "seen").read_text())
        assert [(tmp_path / name / "seen").read_text().strip() for name in "21"] == ["a,b", "c"]
        assert not one.has_room(1)
        jobs[0].kill()
        assert not jobs[0].alive
        assert other.has_room(2)
        jobs[1].kill()


def test_an_arm_that_has_ended_gives_its_gpu_to_one_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"visible_gpus": lambda: ["made-up"], "command": lambda _: ["true"],
                        "conclude": lambda *_: None, "_LOCKS": tmp_path}.items():
        monkeypatch.setattr(f"collie_lab.study.executor.{name}", value)
    executor = LocalExecutor()
    first = executor.submit(tmp_path, 1)
    second = executor.submit(tmp_path, 1)  # nobody has asked for the first
    assert not first.alive
    wait_until(lambda: not second.alive)
