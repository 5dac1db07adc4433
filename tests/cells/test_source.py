"""Experiments as Python source."""

from __future__ import annotations

import pytest

import collie_lab as lab
from collie_lab.cells._source import literal, to_source
from tests.cells.test_cells import FULL


def test_the_code_of_a_small_experiment_is_one_line() -> None:
    experiment = lab.Experiment(model=lab.Model("x"), optimizer=lab.AdaLomo(lr=1e-4, in_backward=True))
    assert experiment.to_code() == 'lab.Experiment(model=lab.Model("x"), optimizer=lab.AdaLomo(lr=1e-4))'


def test_the_code_of_a_large_one_is_as_a_person_writes_it() -> None:
    assert FULL.to_code() == """\
lab.Experiment(
    model=lab.Model("llama-7b", init="random", config={"num_hidden_layers": 2}),
    data=lab.Instructions("alpaca.json", max_length=512, packing=True),
    optimizer=lab.Lomo(lr=0.01),
    adapter=lab.LoRA(r=16, targets=("q_proj", "v_proj")),
    parallel=lab.Parallel(dp=2, zero=3),
    training=lab.Training(steps=20, batch_size=32, precision="bf16", schedule="cosine", warmup=0.03),
    evaluate=[lab.Perplexity(every=5, data=lab.Text("val.txt")), lab.ExactMatch(limit=None)],
    name="full",
)"""


@pytest.mark.parametrize("experiment", [
    FULL, lab.Experiment(model="x", optimizer=lab.AdamW(lr_scale={"*B*": 16, "it's \"so\"": 2e-5}, eps=1e-10)),
    lab.Experiment(model="x", parallel=lab.Parallel(zero=1)),
    lab.Experiment(model="x", parallel=lab.Parallel(zero=1, engine="torch")),  # a default that zero=1 would change
    lab.Experiment(model="x", data=lab.Text(["a" * 200, "b\n'\""]), adapter=lab.LoRA(targets=("q",))),
    FULL.replace(training=lab.Training(**{name: getattr(FULL.training, name) for name in lab.Training.model_fields})),
])
def test_the_code_makes_an_equal_experiment(experiment: lab.Experiment) -> None:
    code = experiment.to_code()
    assert eval(code, {"lab": lab}) == experiment
    assert max(map(len, code.splitlines())) <= 110 or "aaaa" in code


def test_what_is_in_memory_alone_stands_by_its_name() -> None:
    def count(answer: str, reference: str) -> float:
        return float(len(answer) == len(reference))

    records = [{"prompt": "a", "completion": "b"}] * 100
    experiment = lab.Experiment(
        model="x", data=lab.Instructions(records, format=lambda record: (record["prompt"], record["completion"])),
        evaluate=[lab.ExactMatch(score=count), lab.ExactMatch(score=count, name="again")], callbacks=(print, min))
    code, held = to_source(experiment)
    assert held == {"source": experiment.data.source, "format": experiment.data.format,  # type: ignore[attr-defined]
                    "count": count, "print": print, "min": min}
    assert eval(code, {"lab": lab, **held}) == experiment
    assert experiment.to_code().splitlines()[0] == "# defined elsewhere: source, format, count, print, min"


def test_two_functions_of_one_name_are_told_apart() -> None:
    experiment = lab.Experiment(model="x", callbacks=(lambda trainer: None, lambda trainer: 1))
    code, held = to_source(experiment)
    assert "callbacks=(callbacks, callbacks_2)" in code
    assert tuple(held.values()) == experiment.callbacks


def test_a_class_of_a_users_own_stands_without_lab() -> None:
    class Mine(lab.Evaluation):
        weight: float = 1.0

    experiment = lab.Experiment(model="x", evaluate=[Mine(weight=2e-9)])
    assert "evaluate=[Mine(weight=2e-9)]" in experiment.to_code()
    assert eval(experiment.to_code(), {"lab": lab, "Mine": Mine}) == experiment


@pytest.mark.parametrize(("value", "text"), [
    (5e-4, "5e-4"), (2e-5, "2e-5"), (2.5e-9, "2.5e-9"), (-1e-7, "-1e-7"), (1e16, "1e16"), (0.0, "0.0"), (0.05, "0.05"),
    (0.0025, "0.0025"), (16.0, "16.0"), (123456.75, "123456.75"), (3, "3"), (True, "True"), (None, "None"),
    ("a", '"a"'), ("it's", '"it\'s"'), ('say "a"', "'say \"a\"'"), ("\n\n", '"\\n\\n"'),
])
def test_literals(value: object, text: str) -> None:
    assert literal(value) == text
    assert eval(text) == value


def test_what_was_written_with_all_defaults_is_read_as_if_it_were_not() -> None:
    plain = lab.Experiment(model=lab.Model("llama-tiny", init="random"), data=lab.RandomTokens(length=16))
    assert plain.check().problems == []
    read = lab.Experiment.from_yaml(plain.to_yaml())
    assert read == plain
    assert read.check().problems == []  # no option without effect
    given = plain.replace(parallel=lab.Parallel(schedule="gpipe"))
    assert "schedule: without effect" in repr(lab.Experiment.from_yaml(given.to_yaml()).check())
