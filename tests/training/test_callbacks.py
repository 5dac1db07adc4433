"""Callbacks: when they are called, and what the built-in ones decide, keep and measure."""

from __future__ import annotations

import gzip
import json
import math
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import collie_lab as lab
from collie_lab.folder import RunFolder, checkpoints_in
from collie_lab.launch import Run
from collie_lab.optim.shards import local
from collie_lab.parallel import Strategy
from collie_lab.training.callbacks.profiler import Profiler
from collie_lab.training.evaluate import evaluate
from tests.ranks import losses, run_here, run_ranks

CPU = torch.device("cpu")
BASE = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), data=lab.Skills(size=60, test_size=20, packing=True, max_length=96),
    optimizer=lab.AdamW(lr=3e-3), training=lab.Training(steps=4, batch_size=4, export=False))


def _events(folder: RunFolder, kind: str) -> list[dict[str, Any]]:
    lines = (folder.path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for line in lines if (event := json.loads(line))["kind"] == kind]


class Recorder(lab.Callback):
    """Notes what is called, with the step; a checkpoint is told of when it happens to be written."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.checkpoints: list[int] = []

    def on_start(self, trainer: Any) -> None:
        self.calls.append(("start", trainer.step))

    def before_step(self, trainer: Any) -> None:
        self.calls.append(("before", trainer.step))

    def before_update(self, trainer: Any) -> None:
        assert all(weight.grad is not None for weight in trainer.trained_parameters().values())
        self.calls.append(("update", trainer.step))

    def after_step(self, trainer: Any) -> None:
        assert all(weight.grad is None for weight in trainer.trained_parameters().values())
        self.calls.append(("after", trainer.step))

    def on_metrics(self, trainer: Any, metrics: Any) -> None:
        self.calls.append(("metrics", metrics["step"], metrics["loss"]))

    def on_evaluation(self, trainer: Any, figures: Any) -> None:
        self.calls.append(("evaluation", trainer.step, sorted(figures)))

    def on_checkpoint(self, trainer: Any, written: Any) -> None:
        assert (written.path / "state.json").exists()
        self.checkpoints.append(written.step)

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self.calls.append(("exception", trainer.step, str(error)))

    def on_end(self, trainer: Any, result: Any) -> None:
        self.calls.append(("end", result["status"]))


def test_hooks_are_called_in_their_order(tmp_path: Path) -> None:
    recorder = Recorder()
    exact = lab.ExactMatch(every=3, limit=2, max_new_tokens=2)
    run = run_here(BASE.replace(callbacks=[recorder], evaluate=[lab.Perplexity(every=3), exact]).with_(
        "training.checkpoint_every", 2), tmp_path / "run")
    figures = ["bits_per_byte", "exact_match", "exact_match_se", "nll", "nll_se", "perplexity", "perplexity_se"]
    step = [[("before", n), ("update", n), ("after", n), ("metrics", n, loss)] for n, loss in enumerate(losses(run), 1)]
    assert recorder.calls == [("start", 0), *step[0], *step[1], *step[2], ("evaluation", 3, figures), *step[3],
                              ("evaluation", 4, figures), ("end", "ok")]
    assert recorder.checkpoints == [2, 4]


def test_an_exception_is_told_to_all_and_stays_what_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Careless(lab.Callback):
        def on_exception(self, trainer: Any, error: BaseException) -> None:
            raise RuntimeError("hides the error")

    def fails(trainer: Any) -> None:
        if trainer.step == 2:
            raise KeyError("a mistake in the notebook")

    recorder, before = Recorder(), threading.active_count()
    with pytest.raises(KeyError, match="a mistake in the notebook") as caught:
        run_here(BASE.replace(callbacks=[Careless(), lab.SystemMeters(), lab.CSV(), fails, recorder]), tmp_path / "run")
    assert caught.traceback[-1].name == "fails"
    assert recorder.calls[-2:] == [("update", 2), ("exception", 2, "'a mistake in the notebook'")]
    assert "hides the error" in capsys.readouterr().err
    assert threading.active_count() == before  # meters and sinks have ended
    assert len(Run(tmp_path / "run").metrics) == 1


def test_figures_of_ones_own_are_columns(tmp_path: Path) -> None:
    def log(trainer: Any) -> None:
        if trainer.step % 2 == 0:
            trainer.log({"squares": trainer.step**2, "weights/first": next(iter(trainer.model.parameters())).sum()})

    metrics = Run(run_here(BASE.replace(callbacks=[log]), tmp_path / "run")).metrics
    assert metrics["squares"].dropna().to_dict() == {2: 4.0, 4: 16.0}
    assert metrics["weights/first"].notna().tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match="'loss' is a column of its own"):
        run_here(BASE.replace(callbacks=[lambda trainer: trainer.log({"loss": 0.0})]), tmp_path / "again")


# --- monitors


def _scripted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Evaluations give these figures, one after the other."""
    script = iter(values)
    monkeypatch.setattr("collie_lab.training.trainer.evaluate", lambda *_, **__: {"perplexity": next(script)})


#: With a least change of 0.1 and a patience of 2: the best (5, 4, 3.8), what is none (-), the third in a row ends it.
CURVE = [5.0, 4.0, 3.95, 3.8, 3.75, 3.9, 1.0]


def test_early_stopping_ends_a_run_that_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _scripted(monkeypatch, CURVE)
    experiment = BASE.replace(evaluate=[lab.Perplexity(every=2)], callbacks=[
        lab.EarlyStopping(patience=2, min_delta=0.1)]).replace(training=BASE.training.replace(steps=40, export=True))
    folder = run_here(experiment, tmp_path / "run")
    result = folder.read("result.json")
    assert (result["status"], result["steps"], result["perplexity"]) == ("ok", 12, 3.9)
    reason = "early stopping after step 12: perplexity has not improved on 3.8 (step 8) for 2 evaluations"
    assert result["detail"] == reason
    assert [(event["step"], event["text"]) for event in _events(folder, "finish")] == [(12, reason)]
    assert Run(folder).evaluations["perplexity"].tolist() == CURVE[:6]  # the last is not made twice
    assert (folder.path / "model" / "model.safetensors").exists()


def test_more_may_be_better_and_patience_outlives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed between two evaluations without an improvement, it stops where the whole run would have."""
    class Quality(lab.Perplexity):
        better = {"perplexity": "max"}  # noqa: RUF012

    experiment = BASE.replace(
        evaluate=[Quality(every=1)], callbacks=[lab.EarlyStopping(patience=3)],
        training=lab.Training(steps=30, batch_size=4, checkpoint_every=4, export=False))
    curve = [0.1, 0.5, 0.4, 0.3, math.nan, 0.9]
    _scripted(monkeypatch, curve)
    whole = run_here(experiment, tmp_path / "whole")
    assert (whole.read("result.json")["steps"], "0.5 (step 2)" in whole.read("result.json")["detail"]) == (5, True)
    _scripted(monkeypatch, curve[4:])
    resumed = run_here(experiment, tmp_path / "resumed", resume=whole.checkpoints / "step-000004")
    assert resumed.read("result.json")["detail"] == whole.read("result.json")["detail"]


def test_the_best_checkpoint_stays_and_gives_its_figure_again(tmp_path: Path) -> None:
    """With a rate that is far too high at first the figures go up and down; the rolling window moves on."""
    found = {}

    class Again(lab.Callback):
        def on_start(self, trainer: Any) -> None:
            if trainer.resumed_from is not None:
                alone = Strategy(lab.Parallel(), CPU, "fp32")
                found[trainer.step] = evaluate(experiment.evaluate[0], trainer.model, trainer._held_out[0],
                                               trainer._tokenizer, alone, flat=True)["perplexity"]

    experiment = BASE.replace(
        optimizer=lab.Lion(lr=0.02), evaluate=[lab.Perplexity(every=1)],
        callbacks=[lab.BestCheckpoint(keep=2), Again()],
        training=lab.Training(steps=8, batch_size=4, checkpoint_every=1, keep_checkpoints=1, export=False))
    run = Run(run_here(experiment, tmp_path / "run"))
    figures = run.evaluations.set_index("step")["perplexity"]
    best = figures.sort_values(kind="stable")[:2]
    assert best.index[0] not in (1, 8), "the rate no longer makes the figures go up again"
    kept = run.best_checkpoints
    assert kept["step"].tolist() == best.index.tolist()
    assert kept["value"].tolist() == best.tolist()
    assert run.best_checkpoint == kept["path"][0] == run.folder.checkpoints / f"step-{best.index[0]:06d}"
    assert {path.name for path in checkpoints_in(run.folder.checkpoints)} == {
        f"step-{step:06d}" for step in {*best.index, 8}}
    resumed = run_here(experiment, tmp_path / "resumed", resume=run.best_checkpoint)
    assert found == {best.index[0]: best.iloc[0]}
    assert losses(resumed) == losses(run.folder)[best.index[0]:]
    again = Run(resumed)
    assert again.best_checkpoint == run.best_checkpoint  # that of the run before counts, and stays there
    assert again.best_checkpoints["value"].tolist() == best.tolist()


def test_no_number_poisons_a_checkpoint(tmp_path: Path) -> None:
    """A gradient that is no number spoils the weights of a step whose loss was sound."""
    class Poison(lab.Callback):
        def before_update(self, trainer: Any) -> None:
            if trainer.step == 4:
                next(iter(trainer.trained_parameters().values())).grad.view(-1)[7] = math.nan

    training = lab.Training(steps=20, batch_size=4, checkpoint_every=1, keep_checkpoints=1)
    folder = run_here(BASE.replace(callbacks=[Poison(), lab.GradientStatistics(every=2)], training=training),
                      tmp_path / "run")
    result = folder.read("result.json")
    assert (result["status"], result["loss"], result["checkpoint"]) == ("diverged", None, "checkpoints/step-000003")
    assert result["detail"] == "the loss of step 5 is nan; the last good checkpoint: checkpoints/step-000003"
    assert [path.name for path in checkpoints_in(folder.checkpoints)] == ["step-000003"]
    assert [event["text"] for event in _events(folder, "warning")] == [
        "weights are not finite after step 4: they make no checkpoint"]
    metrics = Run(folder).metrics
    assert metrics["gradients/nonfinite"][4] == pytest.approx(1 / 119_616)
    assert metrics[["gradients/norm", "gradients/max"]].loc[4].isna().all()
    last = run_here(BASE.replace(callbacks=[Poison()]), tmp_path / "last").read("result.json")  # in the last step
    assert (last["status"], last["detail"]) == (
        "diverged", "weights are not finite after step 4; there is no checkpoint")
    resumed = run_here(BASE.with_("training.steps", 6), tmp_path / "resumed", resume=folder.path / result["checkpoint"])
    whole = run_here(BASE.with_("training.steps", 6), tmp_path / "whole")
    assert losses(resumed) == losses(whole)[3:]


# --- statistics and meters


def _log_first(trainer: Any) -> None:
    """A piece on each rank, or the whole."""
    trainer.log({"own/first": next(iter(trainer.trained_parameters().values())).detach().square().mean()})


STATISTICS = BASE.replace(callbacks=[
    _log_first,
    lab.GradientStatistics(every=2, groups={"attention": "*self_attn*", "ends": ("*embed_tokens*", "*lm_head*")}),
    lab.WeightStatistics(every=3, groups={"norms": "*norm*"})])


def _reference(tensors: list[torch.Tensor]) -> list[float]:
    whole = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).double()
    return [whole.norm().item(), whole.square().mean().sqrt().item(), whole.abs().max().item(),
            (whole == 0).double().mean().item(), (~whole.isfinite()).double().mean().item()]


def test_statistics_are_those_of_the_whole_model(tmp_path: Path) -> None:
    expected: dict[str, list[float]] = {}

    def look(trainer: Any, what: str, **groups: str) -> None:
        named = {name: weight.grad if what == "gradients" else weight
                 for name, weight in trainer.model.named_parameters()}
        expected[what] = _reference(list(named.values()))
        for group, pattern in groups.items():
            expected[f"{what}/{group}"] = _reference([x for name, x in named.items() if re.search(pattern, name)])

    class Look(lab.Callback):
        def before_update(self, trainer: Any) -> None:
            if trainer.step == 2:
                look(trainer, "gradients", attention="self_attn", ends="embed|lm_head")

        def after_step(self, trainer: Any) -> None:
            if trainer.step == 3:
                look(trainer, "weights", norms="norm")

    metrics = Run(run_here(STATISTICS.replace(callbacks=[*STATISTICS.callbacks, Look()]), tmp_path / "run")).metrics
    for name, values in expected.items():
        columns = [f"{name}/{figure}" for figure in ("norm", "rms", "max", "zeros", "nonfinite")]
        step = 2 if name.startswith("gradients") else 3
        assert metrics.loc[step, columns].tolist() == pytest.approx(values, rel=1e-5), name
        assert metrics[columns[0]].dropna().index.tolist() == ([2, 4] if step == 2 else [3])
    assert metrics["gradients/norm"][2] == pytest.approx(metrics["grad_norm"][2], rel=1e-6)


LAYOUTS = {"zero3": lab.Parallel(dp=2, zero=3), "tp2": lab.Parallel(tp=2), "pp2": lab.Parallel(pp=2)}


def _on_two_ranks(folder: str) -> None:
    for name, layout in LAYOUTS.items():
        training = BASE.training.replace(checkpoint_every=1, keep_checkpoints=1)
        experiment = STATISTICS.replace(parallel=layout, training=training)
        if name == "zero3":  # rank 1 sees a bad weight before rank 0, and both refuse
            experiment = experiment.replace(callbacks=[*STATISTICS.callbacks, _spoil_on_rank_one])
        run_here(experiment, Path(folder) / name)
    stopping = BASE.replace(parallel=lab.Parallel(dp=2), evaluate=[lab.Perplexity(every=1)], callbacks=[
        lab.EarlyStopping(patience=1, min_delta=1e6), lab.BestCheckpoint()])
    run_here(stopping, Path(folder) / "stopping")


def _spoil_on_rank_one(trainer: Any) -> None:
    if trainer.step == 4 and dist.get_rank() == 1:
        local(next(iter(trainer.trained_parameters().values()))).view(-1)[0] = math.inf


@pytest.mark.ranks
def test_two_ranks_find_the_same_and_decide_alike(tmp_path: Path) -> None:
    run_ranks(_on_two_ranks, 2, str(tmp_path))
    alone = Run(run_here(STATISTICS, tmp_path / "alone")).metrics
    columns = [name for name in alone if "/" in name]
    assert len(columns) == 26
    for name in LAYOUTS:
        found = Run(tmp_path / name).metrics
        assert found[columns].dropna(how="all").index.tolist() == [1, 2, 3, 4]
        for column in columns:
            assert found[column].dropna().tolist() == pytest.approx(alone[column].dropna().tolist(), rel=2e-4), column
    spoiled = RunFolder(tmp_path / "zero3")
    assert [path.name for path in checkpoints_in(spoiled.checkpoints)] == ["step-000003"]
    stopped = RunFolder(tmp_path / "stopping")
    assert (stopped.read("result.json")["status"], stopped.read("result.json")["steps"]) == ("ok", 2)
    assert Run(stopped).best_checkpoints["step"].tolist() == [2]


def test_a_group_that_nothing_belongs_to_is_a_mistake(tmp_path: Path) -> None:
    experiment = BASE.replace(callbacks=[lab.WeightStatistics(groups={"norms": "*norm*", "mlp": "*feed_forward*"})])
    with pytest.raises(ValueError, match=r"no trained parameter's name matches '\*feed_forward"):
        run_here(experiment, tmp_path / "run")


def test_a_profile_tells_operators_and_leaves_traces(tmp_path: Path) -> None:
    run = Run(run_here(BASE.replace(callbacks=[lab.Profile(first=2, steps=2)]), tmp_path / "run"))
    table = run.profile
    assert {"aten::mm", "aten::embedding"} <= set(table["operator"])
    embedding = table[table["operator"] == "aten::embedding"]
    assert list(embedding["calls"]) == [2]  # once a step
    assert (table["host"] >= 0).all()
    assert not table["kernel"].any()
    assert table["host"].is_monotonic_decreasing
    with gzip.open(run.folder.path / "profile" / "rank-0.json.gz") as trace:
        assert json.load(trace)["traceEvents"]
    plain = run_here(BASE, tmp_path / "plain")
    assert losses(plain) == losses(run.folder)
    short = Run(run_here(BASE.replace(callbacks=[lab.Profile(first=BASE.training.steps, steps=9)]), tmp_path / "short"))
    assert len(short.profile)


def test_a_run_that_begins_again_is_profiled_anew(tmp_path: Path) -> None:
    trainer = SimpleNamespace(device=CPU, rank=0, step=1, folder=RunFolder(tmp_path), event=lambda *_, **__: None)
    for _ in range(2):
        profiler = Profiler(lab.Profile(first=1, steps=1))
        profiler.before_step(trainer)
        torch.ones(2).exp()
        profiler.after_step(trainer)
    operators = Run(trainer.folder).profile["operator"]
    assert len(operators) == len(set(operators)) > 0


def test_system_meters_see_the_machine_and_end(tmp_path: Path) -> None:
    before = threading.active_count()
    run = Run(run_here(BASE.replace(callbacks=[lab.SystemMeters(every_seconds=0.05)],
                                    training=BASE.training.replace(steps=100)), tmp_path / "run"))
    assert threading.active_count() == before
    seen = run.system
    assert len(seen) > 1
    assert seen["time"].is_monotonic_increasing
    assert (seen["memory"] > 1e6).all()
    assert seen["cpu"].between(0, 100).all()
    assert seen.notna().all().all()
