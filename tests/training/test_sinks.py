"""Sinks: what they are told is what the run folder says, once, however often the run is begun again."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import collie_lab as lab
from collie_lab.folder import RunFolder
from collie_lab.launch import Run
from collie_lab.training.callbacks import sinks
from collie_lab.training.callbacks.tables import Tables
from tests.ranks import run_here

BASE = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), data=lab.Skills(size=60, test_size=20, packing=True, max_length=96),
    optimizer=lab.AdamW(lr=3e-3), evaluate=[lab.Perplexity(every=2)],
    training=lab.Training(steps=6, batch_size=4, checkpoint_every=3, export=False))


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails waits for its sinks, also on a machine with much else to do."""
    monkeypatch.setattr(sinks, "_PATIENCE_OF_ERRORS", 120.0)


def _stopped(trainer: Any) -> None:
    """The first run goes on to step 5, beyond its checkpoint of step 3."""
    if trainer.step == 5 and trainer.resumed_from is None:
        raise InterruptedError


def _twice(sink: Any, tmp_path: Path) -> tuple[Run, Run]:
    """A run that fails in step 5, and one that is resumed from step 3."""
    experiment = BASE.replace(callbacks=[sink, lab.WeightStatistics(every=2, groups={"norms": "*norm*"}), _stopped])
    with pytest.raises(InterruptedError):
        run_here(experiment, tmp_path / "first")
    first = RunFolder(tmp_path / "first")
    resumed = run_here(experiment, tmp_path / "second", resume=first.latest_checkpoint())
    return Run(first), Run(resumed)


Columns = dict[str, dict[int, float]]


def _told(first: Run, second: Run, *, eval_prefix: str = "eval/", train_prefix: str = "train/") -> Columns:
    """Every figure by step, as both run folders together say."""
    expected: Columns = {}
    for run in (first, second):
        begin = 0 if run is first else 3
        for frame, prefix in ((run.metrics, train_prefix), (run.evaluations.set_index("step"), eval_prefix)):
            for name in frame.columns:
                if name in ("step", "time"):
                    continue
                column = expected.setdefault(name if "/" in name else prefix + name, {})
                for step, value in frame[name].dropna().items():
                    if begin or step <= 3:
                        column[int(step)] = value
    return {name: column for name, column in expected.items() if column}


def test_csv(tmp_path: Path) -> None:
    first, second = _twice(lab.CSV(folder="csv"), tmp_path)
    found: Columns = {}
    for kind in ("metrics", "evaluations"):
        frame = pd.read_csv(tmp_path / "csv" / first.id / f"{kind}.csv", index_col="step")
        assert frame.index.is_unique
        assert frame["time"].is_monotonic_increasing
        found |= {name: frame[name].dropna().to_dict() for name in frame.columns if name != "time"}
    assert found == _told(first, second, eval_prefix="", train_prefix="")


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, second = _twice(lab.TensorBoard(folder="tb"), tmp_path)
    events = EventAccumulator(str(tmp_path / "tb" / first.id)).Reload()
    found = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    expected = _told(first, second)
    assert found.keys() == expected.keys()
    for name, column in expected.items():
        assert found[name] == pytest.approx(column, rel=1e-6), name
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "kind: adamw" in texts["experiment/text_summary"]
    assert json.loads(texts["result/text_summary"].split("```")[1].removeprefix("json"))["status"] == "ok"


def test_mlflow(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy", reason="MLflow's own stores need SQLAlchemy")
    uri = f"sqlite:///{tmp_path}/store.db"
    first, second = _twice(lab.MLflow(uri=uri, experiment="mine"), tmp_path)
    client = mlflow.MlflowClient(uri)
    run, = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (run.info.status, run.info.run_name, run.data.tags["collie_lab.status"]) == ("FINISHED", first.id, "ok")
    assert (run.data.params["optimizer.kind"], run.data.params["training.steps"]) == ("adamw", "6")
    found = {name: {metric.step: metric.value for metric in history} for name in run.data.metrics
             if len(history := client.get_metric_history(run.info.run_id, name)) and not name.startswith("result/")}
    for name, column in _told(first, second).items():
        if "memory" not in name and "tokens_per" not in name:  # step 4 is the first run's, and was not taken twice
            assert found[name] == pytest.approx(column), name
        assert len(client.get_metric_history(run.info.run_id, name)) == len(column)
    assert run.data.metrics["result/perplexity"] == second.result["perplexity"]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its client is told; nothing is sent."""
    wandb = pytest.importorskip("wandb")
    found: Columns = {}
    begin, seen = wandb.init, []

    def init(**options: Any) -> Any:
        session = begin(**options)
        seen.append((options["id"], session.config["optimizer"]["kind"], session.settings.mode))
        log, finish = session.log, session.finish

        def note(figures: dict[str, float], step: int) -> None:
            for name, value in figures.items():
                found.setdefault(name, {})[step] = value
            log(figures, step=step)

        monkeypatch.setattr(session, "log", note)
        monkeypatch.setattr(session, "finish", lambda exit_code: (seen.append(exit_code), finish(exit_code)))
        return session

    monkeypatch.setattr(wandb, "init", init)
    first, second = _twice(lab.WandB(project="mine", mode="offline"), tmp_path)
    assert seen == [(first.id, "adamw", "offline"), 1, (first.id, "adamw", "offline"), 0]
    assert found == _told(first, second)
    assert not (tmp_path / "wandb").exists()
    assert list((second.folder.path / "wandb").glob("offline-run-*"))


def test_a_sink_that_fails_warns_once_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    before = threading.active_count()
    monkeypatch.setattr(Tables, "write", full)
    run = run_here(BASE.replace(callbacks=[lab.CSV()]), tmp_path / "run")
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [event["text"] for event in events if event["kind"] == "warning"] == [
        "CSV gets no more figures: OSError: no space left on device"]
    assert run.read("result.json")["status"] == "ok"
    assert threading.active_count() == before


def test_nobody_waits_for_a_sink_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(Tables, "write", lambda *_: released.wait())
    monkeypatch.setattr(sinks, "_PATIENCE", 0.05)
    monkeypatch.setattr(sinks, "_LONGEST", 3)
    try:
        run = run_here(BASE.replace(callbacks=[lab.CSV()]), tmp_path / "run")
        assert "it is 3 lines behind" in (run.path / "events.jsonl").read_text()
        assert run.read("result.json")["status"] == "ok"
    finally:
        released.set()


def test_a_column_may_come_later_and_no_number_stands_empty(tmp_path: Path) -> None:
    def late(trainer: Any) -> None:
        if trainer.step >= 2:
            trainer.log({"late, or \"never\"": math.nan if trainer.step == 3 else 0.1 * trainer.step})

    run = run_here(BASE.replace(callbacks=[late, lab.CSV()], evaluate=[]), tmp_path / "run")
    frame = pd.read_csv(run.path / "metrics.csv", index_col="step")
    expected = Run(run).metrics.set_index("step")
    assert frame.columns.tolist()[-1] == "late, or \"never\""
    pd.testing.assert_frame_equal(frame, expected[frame.columns], check_dtype=False, check_index_type=False)
