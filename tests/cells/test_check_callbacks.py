"""What check() says of callbacks, and how they travel."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

import collie_lab as lab
from collie_lab import code
from collie_lab.cells._source import to_source
from collie_lab.folder import RunFolder

GOOD = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), data=lab.Skills(size=40, test_size=10),
    training=lab.Training(steps=40, batch_size=4), evaluate=[lab.Perplexity(every=5), lab.ExactMatch(name="own")],
    callbacks=[lab.EarlyStopping(), lab.BestCheckpoint(monitor="own_exact_match"), lab.GradientStatistics(),
               lab.WeightStatistics(groups={"norms": ("*norm*",)}), lab.SystemMeters(), lab.Profile(),
               lab.CSV(folder="x"), print])


def _with(*callbacks: Any, **cells: Any) -> lab.Experiment:
    return GOOD.replace(callbacks=callbacks, **cells)


def test_a_sound_experiment_has_only_advice() -> None:
    report = GOOD.check()
    assert [str(problem) for problem in report.problems] == [
        "BestCheckpoint.monitor: without effect: 'own_exact_match' is found at the end alone → ExactMatch(every=...)"]
    assert report.ok


@pytest.mark.parametrize(("experiment", "message"), [
    (_with(lab.EarlyStopping(monitor="accuracy")), "EarlyStopping.monitor: no evaluation gives 'accuracy' → there are: "
     "perplexity, nll, bits_per_byte, own_exact_match"),
    (_with(lab.BestCheckpoint(), evaluate=[]), "BestCheckpoint.monitor: nothing is evaluated"),
    (_with(lab.EarlyStopping(), lab.EarlyStopping(patience=1)), "two of a kind"),
    (_with(lab.BestCheckpoint(restore=True), lab.BestCheckpoint(monitor="nll", restore=True)),
     "BestCheckpoint.restore: a run has one model at its end"),
    (_with(lab.CSV(), lab.CSV()), "two of a kind"),
    (_with(lab.GradientStatistics(), optimizer=lab.Lomo()), "GradientStatistics: Lomo updates in backward"),
    (_with(lab.GradientStatistics(), parallel=lab.Parallel(dp=2, zero=2, engine="deepspeed")), "flat pieces"),
    (_with(lab.WeightStatistics(), parallel=lab.Parallel(dp=2, zero=3, engine="deepspeed")), "weights of zero=3"),
])
def test_errors(experiment: lab.Experiment, message: str) -> None:
    report = experiment.check()
    assert message in repr(report)
    assert not report.ok


@pytest.mark.parametrize(("experiment", "message"), [
    (_with(lab.EarlyStopping(patience=7)), "EarlyStopping.patience: without effect: there are too few evaluations"),
    (_with(lab.EarlyStopping(), evaluate=[lab.Perplexity()]), "EarlyStopping.monitor: without effect: 'perplexity' is"),
    (_with(lab.WeightStatistics(every=50)), "WeightStatistics.every: without effect: there are 40 steps"),
])
def test_what_has_no_effect_is_a_warning(experiment: lab.Experiment, message: str) -> None:
    report = experiment.check()
    assert report.ok
    assert [message in str(problem) for problem in report.warnings] == [True]


@pytest.mark.parametrize(("monitor", "ok"), [("rouge", False), ("perplexity", True)])
def test_an_evaluation_that_does_not_say_its_figures(monitor: str, ok: bool) -> None:
    """What it will give is its own business; only the direction must be known."""
    class Mine(lab.Evaluation):
        pass

    cell = lab.EarlyStopping(monitor=monitor)
    report = _with(cell, evaluate=[Mine(every=2), lab.Perplexity(every=2)]).check()
    assert report.ok == ok
    if not ok:
        assert "EarlyStopping.mode: it is not known whether less or more of 'rouge' is better" in repr(report)
        assert _with(cell.replace(mode="max"), evaluate=[Mine(every=2)]).check().ok


@pytest.mark.parametrize(("cell", "package"), [
    (lab.TensorBoard(), "tensorboard"), (lab.WandB(), "wandb"), (lab.MLflow(), "mlflow")])
def test_a_sink_whose_package_is_absent(cell: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a folder of that name lies in the working directory, as W&B makes one."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    assert f"{type(cell).__name__} needs the package {package} → pip install {package}" in repr(_with(cell).check())
    folder = importlib.machinery.ModuleSpec(package, None, is_package=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: folder if name == package else find(name))
    assert not _with(cell).check().ok


@pytest.mark.parametrize("cell", [lab.EarlyStopping, lab.BestCheckpoint])
def test_the_figure_may_come_first(cell: Any) -> None:
    assert cell("nll", mode="min") == cell(monitor="nll", mode="min")
    assert cell() == cell("perplexity")
    assert cell("nll").replace(monitor="perplexity") == cell()
    first, second = _with(cell("nll"), cell()).to_code().split("callbacks=[")[1].split("],")[0].split(", ")
    assert (first, second) == (f'lab.{cell.__name__}("nll")', f"lab.{cell.__name__}()")
    with pytest.raises(lab.CellError, match=rf"{cell.__name__}\.monitor: input should be a valid string, got 3"):
        cell(3)


class Own(lab.Callback):
    """A user's own, with a state."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def after_step(self, trainer: Any) -> None:
        self.steps.append(trainer)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: lab.Experiment(model="x", callbacks=[lab.EarlyStopping]), "where one of it is wanted: EarlyStopping()"),
    (lambda: lab.Experiment(model="x", callbacks=[Own]), "where one of it is wanted: Own()"),
    (lambda: lab.Experiment(model="x", callbacks=["csv"]), "neither a callback nor a function: 'csv'"),
    (lambda: lab.Experiment.from_yaml("model: x\ncallbacks: [{kind: csvs}]"), "unknown kind 'csvs' → there are: best_"),
    (lambda: lab.WeightStatistics(groups={"a/b": "*"}), "'a/b' becomes part of a column's name"),
    (lambda: lab.EarlyStopping(patience=0), "EarlyStopping.patience"),
])
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises(lab.CellError) as caught:
        make()
    assert message in str(caught.value)


def test_callbacks_round_trip_and_travel(tmp_path: Path) -> None:
    """Cells through YAML and code; with a function and an object among them through `code.pkl`."""
    cells = _with(*(item for item in GOOD.callbacks if item is not print), lab.MLflow(uri="sqlite:///x.db"),
                  lab.WandB(project="p", mode="offline"), lab.TensorBoard(folder="tb"))
    assert lab.Experiment.from_yaml(cells.to_yaml()) == cells
    assert eval(cells.to_code(), {"lab": lab}) == cells
    own = Own()
    mixed = _with(lab.CSV(folder="a"), own, lab.EarlyStopping(), print)
    source, held = to_source(mixed)
    assert eval(source, {"lab": lab, **held}) == mixed
    mapping, packed = code.pack(mixed)
    folder = RunFolder.create(tmp_path, "x")
    (folder.path / "code.pkl").write_bytes(packed)
    (folder.path / "experiment.yaml").write_text(yaml.safe_dump(mapping))
    first, second, third, fourth = code.load_experiment(folder).callbacks
    assert (first, third, fourth) == (lab.CSV(folder="a"), lab.EarlyStopping(), print)
    second(7)
    assert isinstance(second, lab.Callback)
    assert second.steps == [7]  # type: ignore[attr-defined]
