"""`BestCheckpoint(restore=True)`: what a run leaves is its best model, as the best checkpoint has it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from transformers import AutoModelForCausalLM

import collie_lab as lab
from collie_lab.folder import RunFolder
from collie_lab.launch import Run
from collie_lab.training.model import build_model
from collie_lab.view.facts import facts
from collie_lab.view.history import History
from collie_lab.view.units import number_text
from tests.ranks import run_here, run_ranks

CPU = torch.device("cpu")
IDS = torch.arange(24).reshape(2, 12)
BASE = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), data=lab.Skills(size=60, test_size=20, packing=True, max_length=96),
    optimizer=lab.Lion(lr=0.02), evaluate=[lab.Perplexity(every=1)], callbacks=[lab.BestCheckpoint(restore=True)],
    training=lab.Training(steps=4, batch_size=4))


def _script(patch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Evaluations give these figures, one after the other, and the last one ever after."""
    script = itertools.chain(values[:-1], itertools.repeat(values[-1]))
    patch.setattr("collie_lab.training.trainer.evaluate", lambda *_, **__: {"perplexity": next(script)})


@torch.no_grad()
def _assert_model_is_that_of(run: Run, experiment: lab.Experiment, checkpoint: Path) -> None:
    """Logits of the run's model are those of the weights that lie in a checkpoint, read by torch alone."""
    assert run.model_path is not None
    expected: Any = build_model(experiment, CPU).root.eval()
    trained = {f"model.{name}": weight for name, weight in expected.named_parameters() if weight.requires_grad}
    load(trained, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    if experiment.adapter is None:
        found = AutoModelForCausalLM.from_pretrained(run.model_path)
    else:
        plain: Any = build_model(experiment.replace(adapter=None), CPU).root
        found = peft.PeftModel.from_pretrained(plain, run.model_path)
    torch.testing.assert_close(found.eval()(input_ids=IDS).logits, expected(input_ids=IDS).logits, atol=1e-5, rtol=0)


def test_model_figures_and_answers_are_those_of_the_best_step(tmp_path: Path) -> None:
    """The rate is far too high at first: figures go up and down. What only the end asks is asked of the best model."""
    seen: list[tuple[int, list[str]]] = []

    class Seen(lab.Callback):
        def on_evaluation(self, trainer: Any, figures: Any) -> None:
            seen.append((trainer.step, sorted(figures)))

    experiment = BASE.replace(
        evaluate=[lab.Perplexity(every=1), lab.ExactMatch(limit=3, max_new_tokens=4)],
        callbacks=[*BASE.callbacks, lab.EarlyStopping(patience=3), Seen()],
        training=lab.Training(steps=8, batch_size=4))
    run = Run(run_here(experiment, tmp_path / "run"))
    result, curve = run.result, run.evaluations.set_index("step")["perplexity"].dropna()
    best = int(curve.idxmin())
    assert best < result["steps"], "the rate no longer makes the figures go up again"
    assert (result["restored"], result["perplexity"]) == (best, curve[best])
    asked = run.evaluations.dropna(subset="exact_match")
    assert asked[["step", "exact_match"]].to_numpy().tolist() == [[best, result["exact_match"]]]
    assert len(run.answers("exact_match", step=best)) == 3
    assert [step for step, _ in seen] == list(range(1, result["steps"] + 1))  # no step twice, none out of order
    history = History(run.folder)
    history.update(alive=False)
    assert history.evaluated("perplexity")[0].tolist() == curve.index.tolist()
    assert facts(history)["perplexity"] == f"{number_text(curve[best])} ± {number_text(result['perplexity_se'])}"
    assert run.best_checkpoint is not None
    _assert_model_is_that_of(run, experiment, run.best_checkpoint)


def test_the_last_step_may_be_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _script(monkeypatch, [4.0, 3.0, 2.0, 1.0])
    run = Run(run_here(BASE, tmp_path / "run"))
    assert run.evaluations["perplexity"].tolist() == [4.0, 3.0, 2.0, 1.0]
    assert ("restored" in run.result, run.result["perplexity"]) == (False, 1.0)
    assert run.best_checkpoint == run.folder.checkpoints / "step-000004"
    _assert_model_is_that_of(run, BASE, run.best_checkpoint)


@pytest.mark.parametrize("ending", ["diverged", "stopped"])
def test_a_run_that_ends_early_leaves_its_best_model(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                     ) -> None:
    class End(lab.Callback):
        def after_step(self, trainer: Any) -> None:
            if trainer.step == 2 and ending == "stopped":
                trainer.stop()
            elif trainer.step == 3 and ending == "diverged":
                next(iter(trainer.trained_parameters().values())).data.view(-1)[0] = math.nan

    _script(monkeypatch, [2.0, 3.0])
    run = Run(run_here(BASE.replace(callbacks=[*BASE.callbacks, End()]), tmp_path / "run"))
    assert (run.result["status"], run.result["restored"]) == (ending, 1)
    _assert_model_is_that_of(run, BASE, run.folder.checkpoints / "step-000001")


def test_the_best_step_may_be_one_of_the_run_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = BASE.replace(training=lab.Training(steps=2, batch_size=4, checkpoint_every=2, export=False))
    _script(monkeypatch, [2.0, 3.0])
    first = run_here(before, tmp_path / "first")
    _script(monkeypatch, [4.0, 5.0, 2.5])  # of steps 3 and 4, and of the best weights again
    run = Run(run_here(BASE, tmp_path / "second", resume=first.checkpoints / "step-000002"))
    assert (run.result["restored"], run.result["perplexity"]) == (1, 2.5)
    _assert_model_is_that_of(run, BASE, first.checkpoints / "step-000001")


@pytest.mark.parametrize("best", [2, 9])
def test_ranks_of_adalora_are_those_of_the_best_step(best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                     ) -> None:
    """Before and after the last choice, which the model keeps beside the weights."""
    _script(monkeypatch, [5.0 if step != best else 1.0 for step in range(1, 11)])
    experiment = BASE.replace(adapter=lab.AdaLoRA(init_r=4, target_r=2, targets=("q_proj", "v_proj")),
                              optimizer=lab.AdamW(lr=0.02), training=lab.Training(steps=10, batch_size=4))
    run = Run(run_here(experiment, tmp_path / "run"))
    assert run.result["restored"] == best
    _assert_model_is_that_of(run, experiment, run.folder.checkpoints / f"step-{best:06d}")


LAYOUTS: dict[str, lab.Experiment] = {
    "dp": BASE.replace(parallel=lab.Parallel(dp=2), adapter=lab.LoRA(r=2)),
    "zero2": BASE.replace(parallel=lab.Parallel(dp=2, zero=2)),
    "zero3": BASE.replace(parallel=lab.Parallel(dp=2, zero=3), optimizer=lab.Lomo(lr=0.1)),
    "tp": BASE.replace(parallel=lab.Parallel(tp=2)),
    "pp": BASE.replace(parallel=lab.Parallel(pp=2)),
}


def _on_two_ranks(folder: str) -> None:
    for name, experiment in LAYOUTS.items():
        with pytest.MonkeyPatch.context() as patch:
            _script(patch, [3.0, 1.0, 2.0])
            run_here(experiment, Path(folder, name))


@pytest.mark.ranks
def test_every_layout_goes_back(tmp_path: Path) -> None:
    run_ranks(_on_two_ranks, 2, str(tmp_path))
    for name, experiment in LAYOUTS.items():
        run = Run(RunFolder(tmp_path / name))
        assert (run.result["restored"], run.result["perplexity"]) == (2, 1.0), name
        _assert_model_is_that_of(run, experiment.replace(parallel=lab.Parallel()),
                                 run.folder.checkpoints / "step-000002")
