"""The fairness guard on cases that have misled: each difference is found, and what is compared is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import collie_lab as lab
from collie_lab.study.conditions import ASPECTS, Conditions
from tests.study.fabricate import BASE, ENVIRONMENT, Fabricated, made_run


def _compared(*runs: lab.Run, axis: str = "method") -> Fabricated:
    made = Fabricated(axis)
    for name, run in zip("abc", runs, strict=False):
        made.add(name, run=run)
    return made


def _aspects(made: Fabricated, **options: Any) -> list[str]:
    return [difference.aspect for difference in made.fairness(**options)]


def test_equal_conditions_are_no_difference_whatever_the_optimizer() -> None:
    lomo = BASE.replace(optimizer=lab.Lomo(lr=0.1), name="lomo", adapter=None)
    made = _compared(made_run(), made_run(lomo, tokens=2010))  # half a percent: other padding
    assert _aspects(made) == []
    assert "no other difference" in str(made.fairness())


def test_lomo_without_accumulation_against_adamw_with() -> None:
    half = BASE.replace(optimizer=lab.Lomo(lr=0.1)).with_("training.batch_size", 4)
    made = _compared(made_run(), made_run(), made_run(half, tokens=1000))
    found = made.fairness()
    assert [each.aspect for each in found] == ["tokens per step", "batch size"]
    assert found[0].odd == ["c"]
    assert str(found[0]) == "tokens per step: 2.00k (a, b); 1.00k (c)"
    assert "8 sequences, 4 a forward pass (a, b); 4 sequences, 4 a forward pass (c)" in str(found[1])


def test_equal_tokens_in_other_micro_batches() -> None:
    whole = BASE.with_("training.micro_batch_size", None)
    assert _aspects(_compared(made_run(), made_run(whole))) == ["batch size"]


def test_bf16_against_fp32_unless_that_is_what_is_compared() -> None:
    runs = made_run(), made_run(BASE.with_("training.precision", "bf16").with_("training.weights", "bf16"))
    assert _aspects(_compared(*runs)) == ["precision"]
    assert _aspects(_compared(*runs), intended=["precision"]) == []
    assert _aspects(_compared(*runs, axis="training.precision")) == []
    assert _aspects(_compared(*runs, axis="training")) == []
    assert _aspects(_compared(*runs, axis="precision")) == []
    assert _aspects(_compared(*runs, axis="training.batch_size")) == ["precision"]
    with pytest.raises(ValueError, match="no aspect is called 'presicion'"):
        _compared(*runs).fairness(intended=["presicion"])


def test_other_seeds() -> None:
    made = Fabricated("method", "seed")
    for name, seeds in (("a", (0, 1)), ("b", (0, 2)), ("c", (0, 1))):
        for seed in seeds:
            made.add(name, seed, run=made_run(BASE.with_("training.seed", seed)))
    assert [str(each) for each in made.fairness()] == ["seed: 0, 1 (a, c); 0, 2 (b)"]
    same = Fabricated("method", "seed")
    for name in "ab":
        for seed in (0, 1):
            same.add(name, seed, run=made_run(BASE.with_("training.seed", seed)))
    assert _aspects(same) == []


@pytest.mark.parametrize(("aspect", "other"), [
    ("steps", {"experiment": BASE.with_("training.steps", 20)}),
    ("steps", {"steps": 12}),  # stopped early
    ("model", {"experiment": BASE.replace(model=lab.Model("llama-1m", init="random"))}),
    ("training data", {"fingerprint": "0000"}),
    ("data order", {"experiment": BASE.with_("data.shuffle", False)}),
    ("data order", {"experiment": BASE.with_("data.packing", False)}),
    ("learning-rate schedule", {"experiment": BASE.with_("training.schedule", "cosine")}),
    ("recomputation", {"experiment": BASE.with_("training.recompute", "full")}),
    ("compilation", {"experiment": BASE.with_("training.compile", True)}),
    ("loss", {"experiment": BASE.with_("training.loss", torch.nn.functional.cross_entropy)}),
    ("gradient clipping", {"experiment": BASE.with_("training.clip_grad_norm", 0.5)}),
    ("evaluation set", {"experiment": BASE.replace(evaluate=(lab.Perplexity(limit=50),))}),
    ("hardware", {"environment": {"gpu": "NVIDIA H200"}}),
    ("ranks", {"environment": {"threads": 2}}),
    ("versions", {"environment": {"packages": {"torch": "2.11.0"}}}),
    ("commit", {"environment": {"collie_lab_git": {"commit": "1a7fb8003a3cdc98", "diff": "abc"}}}),
])
def test_each_condition_is_looked_at(aspect: str, other: dict[str, Any]) -> None:
    assert _aspects(_compared(made_run(), made_run(**other))) == [aspect]


def test_how_long_a_schedule_falls_counts_where_it_falls_at_the_end() -> None:
    for schedule, found in (("wsd", ["learning-rate schedule"]), ("linear", [])):
        runs = [made_run(BASE.with_("training.schedule", schedule).with_("training.decay", decay))
                for decay in (0.1, 0.5)]
        assert _aspects(_compared(*runs)) == found


def test_what_an_axis_does_not_set_is_a_difference_along_it_too() -> None:
    layouts = made_run(), made_run(BASE.with_("parallel.dp", 2), environment={"gpu": "NVIDIA H200", "threads": 2})
    assert _aspects(_compared(*layouts, axis="parallel")) == ["hardware"]
    optimizers = made_run(), made_run(BASE.replace(optimizer=lab.Lomo()).with_("training.precision", "bf16"))
    assert _aspects(_compared(*optimizers, axis="optimizer")) == ["precision"]


def test_how_often_one_evaluates_is_no_difference() -> None:
    often = BASE.replace(evaluate=(lab.Perplexity(every=5, batch_size=2),))
    assert _aspects(_compared(made_run(), made_run(often))) == []


def test_a_failed_run_has_its_settings_compared_and_not_what_it_never_did() -> None:
    made = _compared(made_run(), made_run(BASE.with_("training.steps", 20), "cuda_oom", steps=1, tokens=10))
    assert _aspects(made) == ["steps"]


def test_tuning_budgets_are_counted() -> None:
    made = Fabricated("method", "lr", tuned={"lr": "loss"})
    for method, rates in (("a", (1, 2, 3)), ("b", (1, 2, 3)), ("c", (1,))):
        for lr in rates:
            made.add(method, lr, loss=abs(lr - 2))
    assert [str(each) for each in made.fairness()] == ["tuning budget: 3 settings (a, b); 1 setting (c)"]


def test_models_are_told_in_words() -> None:
    grown = BASE.with_("model.tokenizer", lab.ExtendTokenizer(learn=256))
    difference = next(each for each in _compared(made_run(), made_run(grown)).fairness() if each.aspect == "model")
    plain, extended = difference.values.values()
    assert plain == "llama-tiny (random)"
    assert extended.startswith("llama-tiny (random), tokenizer (extend_tokenizer, ")
    assert "learn 256" in extended


def test_a_best_value_at_the_end_of_its_range_is_told() -> None:
    made = Fabricated("method", "optimizer.lr", tuned={"optimizer.lr": "loss"})
    for method, best in (("a", 1), ("b", 2), ("c", 3), ("d", 1)):
        for lr in (1, 2, 3):
            made.add(method, lr, loss=abs(lr - best))
    for lr in (1, 2, 3):
        made.add("e", lr, status="diverged")  # none is the best
    difference, = made.fairness()
    assert difference.aspect == "tuning range"
    assert difference.values == {
        "a": "the best lr is the least that was tried", "b": "it lies between others",
        "c": "the best lr is the most that was tried", "d": "the best lr is the least that was tried"}
    assert not made.fairness(intended=["tuning range"])
    words = Fabricated("method", "schedule", tuned={"schedule": "loss"})
    for method in "ab":
        for place, schedule in enumerate((None, "linear", "cosine")):  # in no order
            words.add(method, schedule, loss=place)
    assert not words.fairness()


def test_sets_of_arms_are_told_apart_and_marked_in_the_table() -> None:
    made = Fabricated("method", "model")
    for model in ("1m", "5m"):
        for method in "abc":
            odd = (method, model) == ("c", "5m")
            made.add(method, model, run=made_run(BASE.with_("training.steps", 20 if odd else 30)), loss=1.0)
    difference, = made.fairness()
    assert difference.where == ({"model": "5m"},)
    table = made.table(["loss"])
    mark, = [note.mark for note in table.notes if "steps" in note.text]
    assert table.row_marks == {("c", "5m"): mark}
    assert made.table(["loss"], fair=False).notes[-1].mark == ""
    assert made.table(["loss"], fair=["steps"]).row_marks == {}
    frame = made.fairness().frame
    assert frame[frame["odd"]][["where", "label", "value"]].to_numpy().tolist() == [["model 5m", "c", "20"]]


def test_two_arms_without_a_majority_are_both_marked() -> None:
    made = _compared(made_run(), made_run(BASE.with_("training.steps", 20)))
    assert set(made.table(["loss"]).row_marks) == {("a",), ("b",)}


def test_every_condition_is_known_of_a_run_of_today() -> None:
    run = Conditions(made_run())
    unknown = [aspect.name for aspect in ASPECTS if aspect.read(run) is None]
    assert unknown == []
    assert ENVIRONMENT.keys() <= run.environment.keys()
