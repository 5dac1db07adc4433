"""check(): every conflict, with its reason and remedy, before anything starts."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import collie_lab as lab
from collie_lab.check import check_resume, identity
from collie_lab.check_evaluation import TAKEN
from collie_lab.check_patterns import pattern_problems
from collie_lab.folder import write_json
from tests.ranks import run_here

GOOD = lab.Experiment(model=lab.Model("llama-tiny", init="random"), data=lab.Skills(size=40, test_size=10),
                      training=lab.Training(steps=2, batch_size=4), evaluate=[lab.Perplexity(), lab.ExactMatch()])


def _named(name: str) -> Callable[[str, str], float]:
    def metric(answer: str, reference: str) -> float:
        return 1.0

    metric.__name__ = name
    return metric


def test_a_sound_experiment_has_no_problems() -> None:
    report = GOOD.check()
    assert report.ok
    assert repr(report) == "no problems"


@pytest.mark.parametrize(("experiment", "message"), [
    (GOOD.with_("model.init", "pretrained"), "Model.init: llama-tiny is a named shape and has no trained weights"),
    (GOOD.replace(model=lab.Model("./nowhere")), "neither a folder here nor a named shape"),
    (GOOD.with_("data.max_length", 4096), "Skills.max_length: 4096 tokens do not fit the model's context of 512"),
    (GOOD.replace(parallel=lab.Parallel(dp=3)), "Training.batch_size: 4 sequences cannot be shared equally by 3"),
    (GOOD.replace(parallel=lab.Parallel(dp=8)), "Training.batch_size: 4 sequences cannot be shared equally by 8"),
    (GOOD.with_("training.micro_batch_size", 3), "3 does not divide the 4 sequences of a rank"),
    (GOOD.with_("training.warmup", 2), "2 steps of warm-up, but only 2 steps"),
    (GOOD.replace(optimizer=lab.Lomo()).with_("training.micro_batch_size", 2), "are not added up"),
    (GOOD.replace(optimizer=lab.Lion(in_backward=True, accumulate="each")), "do not add up"),
    (GOOD.replace(optimizer=lab.Lomo(accumulate="hold")).with_("training.clip_grad_norm", 1.0), "only when all of it"),
    (GOOD.replace(optimizer=lab.Lomo(accumulate="each")).with_("training.clip_grad_value", 1.0), "clipped parts"),
    (GOOD.with_("training.weights", "bf16"), "bf16 weights compute in bf16"),
    (GOOD.replace(optimizer=lab.Adafactor(in_backward=True)), "updates all parameters at once"),
    (GOOD.replace(optimizer=lab.Adafactor(), parallel=lab.Parallel(dp=2, zero=3)), "fails on sharded tensors"),
    (GOOD.replace(data=lab.RandomTokens(length=64)), "ExactMatch.data: RandomTokens has no prompts"),
    (GOOD.replace(adapter=lab.LoRA(targets=("lm_head",))), "LoRA.targets: lm_head is the output head"),
    (GOOD.replace(adapter=lab.IA3(targets=("k_proj",), feedforward=("down_proj",))),
     "IA3.feedforward: down_proj is none of targets"),
    (GOOD.replace(adapter=lab.IA3(), parallel=lab.Parallel(tp=2)), "Parallel.tp: IA3 needs whole matrices"),
    (GOOD.replace(adapter=lab.LoRA(dora=True), parallel=lab.Parallel(tp=2)), "Parallel.tp: DoRA needs whole matrices"),
    (GOOD.replace(evaluate=[lab.Perplexity(), lab.Perplexity(limit=3)]), "two evaluations would write the same"),
    *[(GOOD.replace(evaluate=[lab.Generation(metrics=metrics)]), message) for metrics, message in (
        ((_named("tokens_per_second"),), "Generation.metrics: 'tokens_per_second' is a figure of every run"),
        ((_named("status"),), "'status' is a figure of every run"),
        ((_named("<lambda>"), _named("<lambda>")), "two metrics would write '<lambda>'"),
        (("exact_match", _named("exact_match")), "two metrics would write 'exact_match'"),
        (("rouge", _named("rouge1")), "two metrics would write 'rouge1'"),
        ((functools.partial(_named("a"), "b"),), "Generation.metrics: a figure goes by its function's name"))],
    (GOOD.replace(evaluate=[lab.Perplexity(), lab.Generation(metrics=(_named("nll"),))]),
     "Generation.name: two evaluations would write the same"),
    (GOOD.replace(data=lab.Instructions("absent.json")), "no such file: absent.json"),
    (GOOD.replace(data=lab.Instructions([])), "holds no records"),
    (GOOD.replace(data=lab.Text([" "])), "holds no text"),
    (GOOD.replace(data=lab.Instructions([{"prompt": "x"}])), "record 0 has no field 'completion'"),
])
def test_errors(experiment: lab.Experiment, message: str) -> None:
    report = experiment.check()
    assert not report.ok
    assert message in repr(report)
    with pytest.raises(lab.CellError):
        report.raise_for_errors()


@pytest.mark.parametrize(("experiment", "message"), [
    (GOOD.with_("parallel.zero", 3), "Parallel.zero: nothing to shard on one data-parallel rank"),
    (GOOD.with_("training.checkpoint_every", 5), "no checkpoint within 2 steps"),
    (GOOD.with_("training.final_lr", 0.1), "a constant schedule never falls"),
    (GOOD.replace(evaluate=[lab.Perplexity(every=9)]), "only at the end"),
    (GOOD.replace(optimizer=lab.AdaLomo(clip_by="previous_norm")), "AdaLomo.clip_by: without effect"),
    (GOOD.replace(optimizer=lab.AdamW(accumulate="hold")), "AdamW.accumulate: without effect"),
    (GOOD.replace(optimizer=lab.Lomo(accumulate="hold")), "Lomo.accumulate: without effect: a step is one micro-batch"),
    (GOOD.replace(optimizer=lab.AdamW(rounding="kahan")), "AdamW.rounding: without effect on fp32 weights"),
    (GOOD.replace(optimizer=lab.Adan(restart_every=2)), "no restart within 2 steps"),
    (GOOD.replace(optimizer=lab.Muon(), training=lab.Training(steps=2, batch_size=4, precision="bf16", weights="bf16")),
     "rounds bf16 weights to nearest"),
    (GOOD.replace(adapter=lab.IA3(feedforward=("down_proj",))), "IA3.feedforward: without effect"),
    (GOOD.replace(optimizer=lab.Sophia()), "no Hessian within 2 steps: sign momentum"),
    (GOOD.replace(optimizer=lab.AdaLomo()).with_("training.clip_grad_norm", 1.0), "clipping its norm does little"),
])
def test_options_without_effect_warn(experiment: lab.Experiment, message: str) -> None:
    report = experiment.check()
    assert report.ok
    assert message in str(report.warnings[0])


def test_resuming_another_run_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "state.json", {"step": 1, "identity": identity(GOOD, "abc")})
    check_resume(GOOD, "abc", tmp_path)
    for other, message in [
        (GOOD.replace(optimizer=lab.SGD()), "launch.resume: optimizer was 'adamw'"),
        (GOOD.with_("training.batch_size", 8), "batch_size was 4"),
        (GOOD.with_("training.steps", 1), "is at step 1 of 1"),
        (GOOD.with_("data.shuffle", False), "shuffle was True"),
        (GOOD.with_("data.packing", True), "packing was False"),
        (GOOD.with_("data.group_by_length", True), "group_by_length was False"),
    ]:
        with pytest.raises(lab.CellError, match=message):
            check_resume(other, "abc", tmp_path)
    with pytest.raises(lab.CellError, match="data was 'abc'"):
        check_resume(GOOD, "other", tmp_path)


def test_no_figure_of_a_run_may_be_a_metrics_name(tmp_path: Path) -> None:
    run = run_here(GOOD.replace(evaluate=[]), tmp_path / "run")
    assert set(run.read("result.json")) <= TAKEN


def test_what_is_not_trained_is_that_of_the_resumed_run(tmp_path: Path) -> None:
    weights = bytearray(random.Random(0).randbytes(300_000))
    for name, change in (("a", 0), ("moved", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        weights[150_000] ^= change
        (tmp_path / name / "model.safetensors").write_bytes(weights)

    def on(name: str, **fields: Any) -> lab.Experiment:
        return GOOD.replace(model=lab.Model(tmp_path / name), adapter=lab.LoRA(r=4, **fields))

    write_json(tmp_path / "state.json", {"step": 1, "identity": identity(on("a"), "abc")})
    check_resume(on("moved", dropout=0.1), "abc", tmp_path)
    for other, message in ((on("b"), "frozen_weights was"), (on("a", alpha=800), "adapter was .*'alpha': 16.0"),
                           (on("a").replace(adapter=None), "adapter was"),
                           (on("a").replace(adapter=lab.Freeze(("*norm*",))), "adapter was")):
        with pytest.raises(lab.CellError, match=message):
            check_resume(other, "abc", tmp_path)
    write_json(tmp_path / "state.json", {"step": 1, "identity": identity(GOOD, "abc")})
    check_resume(GOOD.replace(model=lab.Model(tmp_path / "b")), "abc", tmp_path)  # all of it is in the checkpoint


@pytest.mark.parametrize(("change", "message"), [
    ({"adapter": lab.Freeze(("*norm*", "nope*"))},
     "Freeze.train: no parameter of llama-tiny matches 'nope*' → there are: lm_head.weight, "),
    ({"optimizer": lab.AdamW(lr_scale={"*q_proj*": 2.0, "*nope*": 0.1})},
     "AdamW.lr_scale: no trained parameter matches '*nope*' → there are: lm_head.weight, "),
    ({"optimizer": lab.AdamW(lr_scale={"*q_proj*": 2.0}), "adapter": lab.Freeze("*norm*")},
     "AdamW.lr_scale: no trained parameter matches '*q_proj*' → there are: model.layers.*.input_layernorm.weight, "),
    ({"callbacks": [lab.GradientStatistics(groups={"b": "*", "a": ("*nope*", "no")})]},
     "GradientStatistics.groups: no trained parameter matches ('*nope*', 'no') → there are: lm_head.weight, "),
])
def test_patterns_that_match_nothing(change: dict[str, Any], message: str) -> None:
    (problem,) = GOOD.replace(**change).check().errors
    assert str(problem).startswith(message)


@pytest.mark.parametrize("change", [
    {"adapter": lab.Freeze("lm_head*"), "optimizer": lab.AdamW(lr_scale={"*embed*": 0.1})},  # they are tied
    {"adapter": lab.LoRA(), "optimizer": lab.AdamW(lr_scale={"*lora_B*": 16.0})},
    {"model": GOOD.model.replace(config={"attention_bias": True}), "adapter": lab.Freeze("*.o_proj.bias")},
    {"model": GOOD.model.replace(config={"model_type": "qwen3"}), "adapter": lab.Freeze("*.q_norm.*")},
])
def test_patterns_are_refused_only_for_sure(change: dict[str, Any]) -> None:
    assert GOOD.replace(**change).check().problems == []


@pytest.mark.parametrize(("model_type", "known"), [("llama", True), ("gpt_neox", False)])
def test_patterns_by_the_files_of_a_model(model_type: str, known: bool, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": model_type, "max_position_embeddings": 64})
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"model.layers.0.a.weight": "x.safetensors"}})
    for pattern, wrong in (("model.layers.?.a.*", False), ("lm_head*", False), ("nope*", known)):
        experiment = lab.Experiment(model=lab.Model(tmp_path, init="random"), adapter=lab.Freeze(pattern))
        assert bool([*pattern_problems(experiment)]) == wrong


def test_an_output_head_is_one_problem() -> None:
    (problem,) = GOOD.replace(adapter=lab.LoRA(targets=("q_proj", "lm_head"))).check().errors
    assert "lm_head is the output head" in str(problem)


def test_all_problems_come_at_once() -> None:
    bad = GOOD.replace(data=lab.Instructions("absent.json"), parallel=lab.Parallel(dp=3))
    assert len(bad.check().errors) == 2


@pytest.mark.parametrize(("experiment", "message"), [
    (GOOD.replace(data=lab.Instructions([{"prompt": "x" * 600, "completion": "y"}], overlong="error", holdout=0)),
     "1 of 1 documents are longer than 512 tokens"),
    (GOOD.replace(data=lab.Instructions([{"prompt": "x", "completion": "y"}], holdout=0)), "nothing is held out"),
    (GOOD.replace(data=lab.RandomTokens(length=600), evaluate=[]), "600 tokens do not fit into sequences of 512"),
    (GOOD.with_("model.config", {"vocab_size": 100}), "the model's vocabulary has 100"),
])
def test_what_only_tokenization_can_tell_comes_before_any_process(experiment: lab.Experiment, message: str,
                                                                 tmp_path: Path) -> None:
    with pytest.raises(lab.CellError, match=message):
        experiment.launch(folder=tmp_path / "runs")
    assert not list((tmp_path / "runs").iterdir())  # nothing is left of the attempt


def test_nothing_is_written_over(tmp_path: Path) -> None:
    with pytest.raises(lab.CellError):
        GOOD.replace(parallel=lab.Parallel(dp=3)).launch(folder=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_schedule_free_wants_no_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.ScheduleFree, "package", "torch")  # whether its own is installed or not
    report = GOOD.replace(optimizer=lab.ScheduleFree()).with_("training.warmup", 1).check()
    assert report.ok
    assert "replaces the schedule by an average" in str(report.warnings[0])


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.GaLore, "package", "not_installed_anywhere")
    report = GOOD.replace(optimizer=lab.GaLore()).check()
    assert "GaLore needs the package galore-torch → pip install galore-torch" in repr(report)
