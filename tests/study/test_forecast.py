"""The forecast of a study: planned once for arms that are alike, and corrected by what arms took."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

import collie_lab as lab
from collie_lab.folder import RunFolder, write_json
from tests.study.grids import toy_grid


def plan(experiment: lab.Experiment, gpu: Any = None, **options: Any) -> Any:
    """100 tokens a second; a larger batch does not fit, and LOMO cannot be planned."""
    if experiment.optimizer.kind == "lomo":
        raise lab.CellError([lab.Problem("Experiment", "optimizer", "no plan of this")])
    size = experiment.training.batch_size
    return SimpleNamespace(peak_bytes=1000 * size, fits=size < 4, tokens_per_second=100.0, length=16,
                           worst={"components": {"weights": 1000 * size}})


def test_forecast_is_made_once_and_corrected(tmp_path: Path) -> None:
    grid = toy_grid([0, 1], training={"steps": 50}, product={
        "training.batch_size": [2, 4], "optimizer": [{"kind": "adamw"}, {"kind": "lomo"}]})
    study = lab.Study(grid, results=tmp_path)
    with mock.patch.object(lab.Experiment, "plan", autospec=True, side_effect=plan) as planned:
        with pytest.raises(lab.CellError, match="no GPU 'H2000' in the catalogue"):
            study.forecast("H2000")
        assert planned.call_count == 0
        frame = study.forecast("H200")
        assert planned.call_count == 4  # seeds are alike
        study.forecast("H200")
        assert planned.call_count == 4
        rates = toy_grid([0], product={"optimizer.lr": [1e-3, 1e-2]})
        lab.Study(rates, results=tmp_path / "rates").forecast()
        assert planned.call_count == 5  # and so are learning rates
        assert frame.loc["batch_size=2, adamw, seed=0", ["planned_bytes", "fits", "seconds"]].tolist() == [
            2000, True, pytest.approx(50 * 2 * 16 / 100)]
        assert not frame.loc["batch_size=4, adamw, seed=1", "fits"]
        assert frame.loc["batch_size=2, lomo, seed=0", "note"] == "Experiment.optimizer: no plan of this"
        first = "batch_size=2, adamw, seed=0"
        ran(study, first, "NVIDIA H200", seconds=24.0, seconds_before=12.0, trained=32.0)
        frame = study.forecast("H200")
    assert frame.loc["batch_size=2, adamw, seed=1", "seconds"] == pytest.approx(36.0)  # twice what was planned, and 4
    assert frame.loc["batch_size=4, adamw, seed=0", "seconds"] == pytest.approx(68.0)
    assert frame.loc["batch_size=4, lomo, seed=0", "seconds"] == pytest.approx(36.0)  # as those that ran
    assert frame.loc[first, "remaining"] == 0
    assert frame["gpu_hours"].sum() == pytest.approx(frame["seconds"].sum() / 3600)
    assert study.frame.loc["batch_size=4, adamw, seed=0", "planned_bytes"] == 4000


def ran(study: lab.Study, name: str, gpu: str | None, **status: Any) -> None:
    """An arm that has ended, with a run on a GPU, or on a CPU (None)."""
    folder = study._made(next(arm for arm in study.arms if arm.name == name))
    run = RunFolder.create(folder.runs, "run")
    run.write("env.json", {"gpu": gpu})
    run.write("launch.json", {"created": 0.0})
    (run.path / "metrics.jsonl").write_text(json.dumps({"step": 1, "mfu": None, "tokens": 1}) + "\n")
    run.write("result.json", {"status": "ok", "seconds": status.pop("trained", 1.0)})
    run.write("status.json", {"status": "ok", "pid": 1, "pid_started": 0.0, "ended": 1.0})
    folder.write_status({"status": "ok", "seconds": 1.0, **status})


def plan_by_gpu(experiment: lab.Experiment, gpu: Any = None, **options: Any) -> Any:
    made = plan(experiment)
    made.peak_bytes += {None: 0, "H100": 100, "H200": 200}[gpu]
    return made


def test_the_plan_beside_a_peak_is_of_the_same_device(tmp_path: Path) -> None:
    study = lab.Study(toy_grid([0, 1, 2, 3]), results=tmp_path)
    ran(study, "seed=0", None)
    ran(study, "seed=1", "NVIDIA H200")
    ran(study, "seed=2", "NVIDIA A100-SXM4-80GB")
    with mock.patch.object(lab.Experiment, "plan", autospec=True, side_effect=plan_by_gpu) as planned:
        for gpu, times in ((None, 1), ("h200", 2), ("H100", 3), ("H200", 3), (None, 3)):
            study.forecast(gpu)
            assert planned.call_count == times
    found = study.frame["planned_bytes"]
    assert found["seed=0"] == 1000
    assert found["seed=1"] == 1200
    assert found[["seed=2"]].isna().all()
    assert found["seed=3"] == 1200  # nobody ran on an H100
    assert study.frame.loc["seed=0", "planned_weights"] == 1000


def test_a_forecast_is_corrected_by_training_on_its_own_device_alone(tmp_path: Path) -> None:
    """Two arms of 9 s on a CPU, nearly all of it their start, say nothing of the speed of an H200."""
    study = lab.Study(toy_grid([0, 1, 2, 3], training={"steps": 500}), results=tmp_path)
    planned_seconds = 500 * 16 / 100
    ran(study, "seed=0", None, seconds=9.0, trained=0.1)
    ran(study, "seed=1", None, seconds=9.0, trained=0.1)
    with mock.patch.object(lab.Experiment, "plan", autospec=True, side_effect=plan):
        frame = study.forecast("H200")
        assert frame["seconds"].tolist() == pytest.approx([9.0, 9.0, planned_seconds, planned_seconds])
        ran(study, "seed=2", "NVIDIA H200", seconds=planned_seconds + 30, trained=planned_seconds)
        frame = study.forecast("H200")
    assert frame.loc["seed=3", "remaining"] == pytest.approx(planned_seconds + 30)  # it starts too


def test_a_forecast_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    study = lab.Study(toy_grid([0]), results=tmp_path)
    kept = {"gpu": None, "bytes": 7, "fits": None, "tokens_per_second": None, "seconds": None, "note": ""}
    write_json(tmp_path / "forecast.json", {study.arms[0].id: kept})
    assert study.forecast().loc["toy", "planned_bytes"] == 7
