"""A resumed run equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from collie_lab import (
    AdaLomo,
    AdamW,
    Adan,
    Callback,
    ExactMatch,
    Experiment,
    Lion,
    Lomo,
    LoRA,
    Model,
    Parallel,
    Perplexity,
    Skills,
    Sophia,
    Training,
)
from collie_lab.folder import RunFolder, Tail, read_json
from collie_lab.training._safe_reader import SafeReader
from collie_lab.training.identity import known_figures, told_figures
from tests.ranks import losses, run_here, run_ranks

BASE = Experiment(
    model=Model("llama-tiny", init="random"), data=Skills(size=60, test_size=20, packing=True, max_length=96),
    optimizer=AdamW(lr=3e-3), training=Training(steps=5, batch_size=4, micro_batch_size=2, schedule="linear",
                                                checkpoint_every=3, keep_checkpoints=1),
)


IN_BACKWARD = BASE.with_("training.micro_batch_size", None)
BF16 = IN_BACKWARD.replace(training=IN_BACKWARD.training.replace(precision="bf16", weights="bf16"))
EXACT = {
    "adamw": BASE,
    "lora": BASE.replace(adapter=LoRA(r=4, dropout=0.1)),  # dropout: the random state matters too
    "lomo": IN_BACKWARD.replace(optimizer=Lomo(lr=0.05)),
    # Stochastic rounding, a sampled Hessian, a norm that is carried over, a restart, a second bf16 number.
    "adalomo, bf16": BF16.replace(optimizer=AdaLomo(lr=5e-3)),
    "sophia, in backward": IN_BACKWARD.replace(
        optimizer=Sophia(lr=1e-3, hessian_every=2, in_backward=True, clip_by="previous_norm"),
        training=IN_BACKWARD.training.replace(clip_grad_norm=0.5)),
    "adan": BASE.replace(optimizer=Adan(lr=5e-3, restart_every=4)),
    "lion, bf16": BF16.replace(optimizer=Lion(lr=1e-3, rounding="kahan")),
}


@pytest.mark.parametrize("arm", EXACT)
def test_resume_is_exact(arm: str, tmp_path: Path) -> None:
    experiment = EXACT[arm]
    whole = run_here(experiment, tmp_path / "whole")
    checkpoint = whole.latest_checkpoint()
    assert checkpoint == whole.checkpoints / "step-000003"
    resumed = run_here(experiment, tmp_path / "resumed", resume=checkpoint)
    assert losses(resumed) == losses(whole)[3:]
    name = "adapter_model.safetensors" if arm == "lora" else "model.safetensors"
    a, b = (load_file(run.path / "model" / name) for run in (whole, resumed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


SHARDED = {
    "adamw": BASE.with_("training.micro_batch_size", 1),
    "adalomo": IN_BACKWARD.replace(optimizer=AdaLomo(lr=5e-3)),  # states of rows and columns, sharded and not
}


def _train(folder: str, resume: str | None, zero: int, arm: str) -> None:
    experiment = SHARDED[arm].replace(parallel=Parallel(dp=2, zero=zero))
    run_here(experiment, Path(folder), resume=Path(resume) if resume else None)


@pytest.mark.ranks
@pytest.mark.parametrize(("zero", "arm"), [(0, "adamw"), (3, "adamw"), (3, "adalomo")])
def test_two_ranks_resume_exactly_and_one_process_goes_on_from_their_checkpoint(zero: int, arm: str,
                                                                                tmp_path: Path) -> None:
    run_ranks(_train, 2, str(tmp_path / "whole"), None, zero, arm)
    whole = RunFolder(tmp_path / "whole")
    checkpoint = whole.latest_checkpoint()
    assert checkpoint is not None
    run_ranks(_train, 2, str(tmp_path / "resumed"), str(checkpoint), zero, arm)
    assert losses(RunFolder(tmp_path / "resumed")) == losses(whole)[3:]
    alone = run_here(SHARDED[arm], tmp_path / "alone", resume=checkpoint)
    assert losses(alone) == pytest.approx(losses(whole)[3:], abs=1e-5)


MOVED = {
    "adamw": BASE,
    "adalomo": IN_BACKWARD.replace(optimizer=AdaLomo(lr=5e-3, accumulate="hold")),
    "lora": BASE.replace(adapter=LoRA(r=4)),
}


def _train_moved(folder: str, resume: str | None, layout: str) -> None:
    cell = {"pp2 tp2": Parallel(pp=2, tp=2), "dp2 zero3": Parallel(dp=2, zero=3)}[layout]
    for arm, experiment in MOVED.items():
        checkpoint = RunFolder(Path(resume) / arm).latest_checkpoint() if resume else None
        run_here(experiment.replace(parallel=cell).with_("training.micro_batch_size", None), Path(folder) / arm,
                 resume=checkpoint)


def _exported(run: RunFolder) -> dict[str, torch.Tensor]:
    """Of one file, or of one for each stage."""
    files = (run.path / "model").glob("*.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.mark.ranks
def test_a_run_goes_on_under_another_layout(tmp_path: Path) -> None:
    """Begun as a pipeline of tensor-parallel ranks; ended sharded, and on one process."""
    run_ranks(_train_moved, 4, str(tmp_path / "begun"), None, "pp2 tp2")
    run_ranks(_train_moved, 2, str(tmp_path / "sharded"), str(tmp_path / "begun"), "dp2 zero3")
    for arm, experiment in MOVED.items():
        begun, plain = RunFolder(tmp_path / "begun" / arm), experiment.with_("training.micro_batch_size", None)
        whole = losses(run_here(plain, tmp_path / "whole" / arm))
        alone = run_here(plain, tmp_path / "alone" / arm, resume=begun.latest_checkpoint())
        for run, expected in ((begun, whole), (RunFolder(tmp_path / "sharded" / arm), whole[3:]), (alone, whole[3:])):
            assert losses(run) == pytest.approx(expected, abs=1e-5), arm
        exported, direct = (_exported(run) for run in (begun, RunFolder(tmp_path / "whole" / arm)))
        assert exported.keys() == direct.keys()
        for name, value in direct.items():
            torch.testing.assert_close(exported[name], value, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_stop_flag_ends_the_run_with_a_checkpoint_and_a_result(tmp_path: Path) -> None:
    def stop_at_three(trainer: object) -> None:
        if trainer.step == 3:  # type: ignore[attr-defined]
            trainer.folder.stop_flag.touch()  # type: ignore[attr-defined]

    run = run_here(BASE.replace(callbacks=(stop_at_three,)), tmp_path / "run")
    result = run.read("result.json")
    assert (result["status"], result["steps"]) == ("stopped", 4)
    assert run.latest_checkpoint() == run.checkpoints / "step-000004"
    resumed = run_here(BASE, tmp_path / "resumed", resume=run.latest_checkpoint())
    whole = run_here(BASE, tmp_path / "whole")
    assert losses(run) + losses(resumed) == losses(whole)


def test_the_figures_of_a_resumed_run_are_those_of_the_whole(tmp_path: Path) -> None:
    def stop_at_three(trainer: object) -> None:
        if trainer.step == 3:  # type: ignore[attr-defined]
            trainer.stop()  # type: ignore[attr-defined]

    experiment = BASE.replace(evaluate=[Perplexity(every=2, limit=4)])
    begun = run_here(experiment.replace(callbacks=(stop_at_three,)), tmp_path / "begun")
    run = run_here(experiment, tmp_path / "run", resume=begun.latest_checkpoint())
    whole = run_here(experiment, tmp_path / "whole")
    earlier, resumed, expected = (each.read("result.json") for each in (begun, run, whole))
    assert earlier["steps"] == 4
    assert resumed["loss"] == expected["loss"]
    assert resumed["tokens_per_second"] == earlier["tokens_per_second"]  # the one step here is a warm-up
    assert resumed["seconds"] > read_json(begun.checkpoints / "step-000004" / "state.json")["so_far"]["seconds"] > 0
    assert resumed["peak_bytes"] >= earlier["peak_bytes"]
    # What was due after the last step of a run that was stopped is made up for.
    assert [*_evaluated(begun), *_evaluated(run)] == _evaluated(whole) == [2, 4, 5]


def test_what_no_longer_holds_of_an_earlier_run_is_left(tmp_path: Path) -> None:
    """Its peak and speed under another setting; the figures of other evaluations."""
    begun = run_here(BASE.replace(evaluate=[Perplexity(every=3, limit=4)], training=BASE.training.replace(
        micro_batch_size=4)), tmp_path / "begun")
    other = BASE.replace(evaluate=[Perplexity(every=3, limit=8)]).with_("training.micro_batch_size", 1)
    run = run_here(other, tmp_path / "run", resume=begun.checkpoints / "step-000003")
    alone = run_here(other, tmp_path / "alone")
    earlier, resumed, expected = (each.read("result.json") for each in (begun, run, alone))
    assert resumed["peak_bytes"] == pytest.approx(expected["peak_bytes"], rel=0.01)
    assert resumed["peak_bytes"] < earlier["peak_bytes"] / 1.1
    assert resumed["tokens_per_second"] is None  # two steps, both of them a warm-up
    assert _evaluated(run) == [3, 5]


def test_an_evaluation_is_known_by_its_code_too() -> None:
    def score(limit: float) -> Callable[[str, str], float]:
        return lambda answer, reference: float(answer == reference and len(answer) < limit)

    def told(*functions: Callable[[str, str], float] | None) -> Experiment:
        return BASE.replace(evaluate=[ExactMatch(score=each, name=f"n{place}") for place, each in enumerate(functions)])

    figures = told_figures(told(score(3)), {0: {"exact_match": 0.5}})
    assert known_figures(told(score(3)), figures) == {0: {"exact_match": 0.5}}  # another object, the same code
    assert known_figures(told(score(4)), figures) == {}
    assert known_figures(told(lambda answer, reference: 0.0), figures) == {}
    assert known_figures(told(None), figures) == {}


def test_a_run_that_would_have_ended_makes_no_step_more(tmp_path: Path) -> None:
    def stop_at_three(trainer: object) -> None:
        if trainer.step == 3:  # type: ignore[attr-defined]
            trainer.stop()  # type: ignore[attr-defined]

    class Enough(Callback):
        def on_evaluation(self, trainer: object, figures: object) -> None:
            trainer.finish("enough")  # type: ignore[attr-defined]

    experiment = BASE.replace(evaluate=[Perplexity(every=4, limit=4)], callbacks=(Enough(), stop_at_three))
    begun = run_here(experiment, tmp_path / "begun")
    run = run_here(experiment, tmp_path / "run", resume=begun.latest_checkpoint())
    assert begun.read("result.json")["steps"] == run.read("result.json")["steps"] == 4
    assert run.read("result.json")["status"] == "ok"


def _evaluated(run: RunFolder) -> list[int]:
    return [event["step"] for event in Tail(run.path / "events.jsonl").new() if event["kind"] == "evaluation"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run = run_here(BASE, tmp_path / "run")
    other = BASE.replace(adapter=LoRA(r=4))
    with pytest.raises(ValueError, match="another model or adapter"):
        run_here(other, tmp_path / "other", resume=run.latest_checkpoint())


def test_a_checkpoint_of_another_rounding_is_refused(tmp_path: Path) -> None:
    run = run_here(BF16.replace(optimizer=Lion(rounding="master")), tmp_path / "run")
    with pytest.raises(ValueError, match="another optimizer or rounding"):
        run_here(BF16.replace(optimizer=Lion(rounding="kahan")), tmp_path / "other", resume=run.latest_checkpoint())


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return eval, ("1 + 1",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(pickle.UnpicklingError, match=r"may not name builtins\.eval"):
        SafeReader(tmp_path).read_metadata()


def test_diverging_is_a_status(tmp_path: Path) -> None:
    run = run_here(BASE.replace(optimizer=Lomo(lr=1e38)).with_("training.micro_batch_size", None), tmp_path / "run")
    result = run.read("result.json")
    assert result["status"] == "diverged"
    assert result["loss"] is None
    assert not (run.path / "model").exists()
