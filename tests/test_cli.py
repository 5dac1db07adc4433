"""The shell's commands: the same words, files and errors as in Python, and exit codes that tell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import collie_lab as lab
from collie_lab.cli import app
from tests.processes import MARK, marked, wait_until
from tests.study.fabricate import made_run

EXPERIMENT = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), data=lab.RandomTokens(length=32, documents=8),
    training=lab.Training(steps=2, batch_size=2, export=False))


def _call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def file() -> str:
    EXPERIMENT.to_yaml("exp.yaml")
    return "exp.yaml"


def test_nothing_heavy_is_imported_for_help() -> None:
    code = ("import sys\nfrom typer.testing import CliRunner\nfrom collie_lab.cli import app\n"
            "print('doctor' in CliRunner().invoke(app, ['--help']).output,\n"
            "      {'torch', 'pandas', 'matplotlib', 'transformers', 'ipywidgets'} & set(sys.modules))")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                            cwd=Path(lab.__file__).parents[1]).stdout
    assert output.strip() == "True set()"
    assert _call("--version").strip() == lab.__version__


def test_a_run_is_that_of_the_file_with_its_changes(file: str) -> None:
    output = _call("run", file, "--set", "optimizer.lr=3e-4", "--set", "optimizer={kind: lion}", "--set",
                   "training.steps=3")
    run, = lab.runs()
    launched = lab.Experiment.from_yaml(run.experiment_yaml)
    assert launched.optimizer == lab.Lion(lr=3e-4)
    assert run.steps == 3
    assert run.id in output
    assert "step 3/3" in output
    assert f"{run.id}     ok     3" in _call("runs")

    assert "run.json" not in _call("export", f"Lion={run.id}", "--to", "out")
    assert "| Lion" in Path("out/table.md").read_text(encoding="utf-8")
    for twice in ((f"Lion={run.id}", f"Lion={run.id}"), (run.id, str(run.folder.path))):
        assert "two rows are called" in _call("export", *twice, "--to", "again", code=2)
    assert not Path("again").exists()


def test_a_row_of_an_export_may_have_equals_signs_in_its_folder() -> None:
    run = made_run()
    Path("runs").rename("lr=0.1")
    place = f"lr=0.1/{run.id}"
    for given, name in ((place, run.id), (f"Mine={place}", "Mine"), (f"a=b={place}", "a=b")):
        _call("export", given, "--to", "out")
        assert f"| {name} " in Path("out/table.md").read_text(encoding="utf-8")
    _call("export", f"Mine={run.id[-4:]}", "--to", "out", "--folder", "lr=0.1")
    assert "| Mine " in Path("out/table.md").read_text(encoding="utf-8")


def test_the_exit_code_tells_how_a_run_ended(file: str) -> None:
    assert "timeout" in _call("run", file, "--timeout", "0.01", code=124)
    assert [run.status for run in lab.runs()] == ["timeout"]


def test_sigterm_stops_a_run_with_a_checkpoint(file: str) -> None:
    command = [sys.executable, "-c", "from collie_lab.cli import app; app()", "run", file, "--set",
               "training.steps=100000"]
    with marked() as mark:
        process = subprocess.Popen(command, env={**os.environ, MARK: mark})
        wait_until(lambda: any(run.steps for run in lab.runs()))
        process.terminate()
        assert process.wait(timeout=60) == 130
    run, = lab.runs()
    assert run.status == "stopped"
    assert run.folder.latest_checkpoint() == run.folder.checkpoints / f"step-{run.steps:06d}"


@pytest.mark.parametrize(("arguments", "words"), [
    (("run", "none.yaml"), "no such file: none.yaml"),
    (("run", "exp.yaml", "--set", "optimizer.lrr=1"), "did you mean `lr`?"),
    (("run", "exp.yaml", "--set", "optimizer.lr"), "is no FIELD=VALUE"),
    (("run", "exp.yaml", "--set", "optimizer={kind: lino}"), "unknown kind 'lino'"),
    (("run", "exp.yaml", "--set", "data={seed: 1, seed: 2}"),
     "--set.data: {seed: 1, seed: 2} is no valid YAML: the key `seed` stands twice"),
    (("run", "exp.yaml", "--resume", "no-such-run"), "no run in 'runs' for 'no-such-run'"),
    (("check", "exp.yaml", "--set", "parallel.dp=4"), "cannot be shared equally by 4"),
    (("plan", "exp.yaml", "--gpu", "3091"), "no GPU '3091' in the catalogue"),
    (("plan", "exp.yaml", "--figure", "plan.xyz"), "plan.xyz is no file of a picture"),
    (("residuals", "--figure", "plan"), "plan is no file of a picture"),
    (("run", "exp.yaml", "--timeout", "-1"), "launch.timeout: a number, 0 or more, got -1"),
    (("doctor", "llama-tiny", "--check", "sanity"), "unknown check 'sanity'"),
    (("export", "no-such-run", "--to", "out"), "no run in 'runs' for 'no-such-run'"),
])
def test_mistakes_are_told_in_words(file: str, arguments: tuple[str, ...], words: str) -> None:
    assert words in _call(*arguments, code=2)
    assert not lab.runs()


def test_a_folder_that_cannot_be_is_told_in_words(file: str) -> None:
    assert "error: [Errno 20] Not a directory" in _call("run", "exp.yaml", "--folder", "exp.yaml/runs", code=1)


def test_a_plan_says_whether_it_fits(file: str) -> None:
    output = _call("plan", file, "--gpu", "3090", "--figure", "new/plan.png")
    assert "fits on RTX 3090" in output
    assert Path("new/plan.png").stat().st_size > 10_000
    assert "does not fit" in _call("plan", file, "--gpu", "3090", "--set", "training.batch_size=16384",
                                    "--set", "data.length=256", code=1)


def test_defaults_that_a_file_names_are_no_choices(file: str) -> None:
    assert _call("check", file) == "no problems\n"
    assert _call("runs") == "no runs in runs\n"
