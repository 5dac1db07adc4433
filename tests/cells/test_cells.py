"""Cells: validation in plain words, variants, and the way to YAML and back."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import collie_lab as lab

FULL = lab.Experiment(
    model=lab.Model("llama-7b", init="random", config={"num_hidden_layers": 2}),
    data=lab.Instructions("alpaca.json", max_length=512, packing=True), optimizer=lab.Lomo(lr=1e-2),
    adapter=lab.LoRA(r=16, targets=("q_proj", "v_proj")), parallel=lab.Parallel(dp=2, zero=3),
    training=lab.Training(steps=20, batch_size=32, schedule="cosine", warmup=0.03, precision="bf16"),
    evaluate=[lab.Perplexity(every=5, data=lab.Text("val.txt")), lab.ExactMatch(limit=None)], name="full",
)


@pytest.mark.parametrize("experiment", [
    FULL, lab.Experiment(model="x"), lab.Experiment(model="x", data=lab.RandomTokens(length=7)),
    lab.Experiment(model="x", data=lab.Skills(tasks=("add",)), optimizer=lab.SGD(momentum=0.5)),
    lab.Experiment(model="x", data=lab.Text(["a", "b"])),
])
def test_yaml_round_trip(experiment: lab.Experiment, tmp_path: Path) -> None:
    text = experiment.to_yaml(tmp_path / "e.yaml")
    assert lab.Experiment.from_yaml(text) == experiment
    assert lab.Experiment.from_yaml(tmp_path / "e.yaml") == experiment


def test_yaml_is_as_documented() -> None:
    experiment = lab.Experiment.from_yaml("""
model: {source: llama-1m, init: random}
optimizer: {kind: lomo, lr: 5.0e-4}
data: {kind: random_tokens, length: 2048, seed: 1}
evaluate: [{kind: perplexity, every: 10}]
""")
    assert experiment.optimizer == lab.Lomo(lr=5e-4)
    assert experiment.data == lab.RandomTokens(length=2048, seed=1)
    assert yaml.safe_load(experiment.to_yaml())["optimizer"]["kind"] == "lomo"


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1E3", 1e3), ("-.5e1", -5.0), ("2.e+2", 200.0)])
def test_floats_in_yaml_need_no_dot(text: str, value: float) -> None:
    read = lab.Experiment.from_yaml(f"model: {{source: x, config: {{a: {text}, b: '{text}', c: {text}m}}}}")
    assert read.model.config == {"a": value, "b": text, "c": f"{text}m"}
    assert lab.Experiment.from_yaml(read.to_yaml()) == read


def test_whole_floats_are_steps() -> None:
    steps = lab.Experiment.from_yaml("model: x\ntraining: {steps: 1e3}").training.steps
    assert (steps, type(steps)) == (1000, int)


def test_a_key_of_yaml_stands_once_and_overrides_what_is_merged() -> None:
    with pytest.raises(lab.CellError, match="key `training` stands twice, in line 2 and in line 4"):
        lab.Experiment.from_yaml("model: x\ntraining: {steps: 1}\n\ntraining: {batch_size: 2}")
    merged = "model: {source: x, config: {a: &a {p: 1, q: 1}, b: &b {<<: *a, p: 2}, c: {<<: *b, q: 3}}}"
    assert lab.Experiment.from_yaml(merged).model.config["c"] == {"p": 2, "q": 3}
    several = "model: {source: x, config: {a: &a {one: 1, two: 1}, b: &b {two: 2, six: 2}, c: {<<: [*a, *b], one: 3}}}"
    assert lab.Experiment.from_yaml(several).model.config["c"] == {"one": 3, "two": 1, "six": 2}
    itself = "model: {source: x, config: {a: &a {<<: *a, one: 1}}}"
    assert lab.Experiment.from_yaml(itself).model.config["a"] == {"one": 1}
    with pytest.raises(lab.CellError, match="found scalar"):
        lab.Experiment.from_yaml("model: {source: x, config: {<<: 1}}")


def test_a_file_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_bytes("model: x\nname: \"né\"".encode("latin1"))
    with pytest.raises(lab.CellError, match=r"Experiment: .*old.yaml is no text in UTF-8: line 2 .* save it as UTF-8"):
        lab.Experiment.from_yaml(tmp_path / "old.yaml")


def test_variants() -> None:
    assert FULL.with_("optimizer.lr", 0.5).optimizer == lab.Lomo(lr=0.5)
    assert FULL.with_("adapter", None).adapter is None
    assert FULL.with_("optimizer", {"kind": "lion", "lr": 1e-4}).optimizer == lab.Lion(lr=1e-4)
    assert FULL.replace(optimizer=lab.AdamW()).parallel == FULL.parallel
    assert FULL.optimizer == lab.Lomo(lr=1e-2)  # the original is as it was
    with pytest.raises(Exception, match="frozen"):
        FULL.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(("make", "message"), [
    (lambda: lab.AdamW(lrr=1), "AdamW.lrr: unknown field → did you mean `lr`?"),
    (lambda: lab.AdamW(lr=-1), "AdamW.lr: input should be greater than 0, got -1"),
    (lambda: lab.Parallel(zero=4), "Parallel.zero: input should be 0, 1, 2 or 3, got 4"),
    (lambda: lab.Skills(tasks=("dance",)), "Skills.tasks: unknown tasks"),
    (lambda: lab.Training(warmup=1.5), "Training.warmup: from 1 on, warmup counts whole steps"),
    (lambda: lab.AdamW(betas=(1.5, 0.9)), "AdamW.betas.0: input should be less than 1"),
    (lambda: lab.SGD(nesterov=True), "nesterov needs momentum"),
    (lambda: lab.AdamW(lr=float("inf")), "AdamW.lr: input should be a finite number"),
    (lambda: lab.Training(seed=-1), "Training.seed"),
    (lambda: lab.Training(steps=True), "Training.steps: a number is wanted, got True"),
    (lambda: lab.Training(micro_batch_size=False), "Training.micro_batch_size: a number is wanted, got False"),
    (lambda: lab.AdamW(lr=True), "AdamW.lr: a number is wanted, got True"),
    (lambda: lab.AdamW(betas=(0.9, False)), "AdamW.betas: a number is wanted, got (0.9, False)"),
    (lambda: lab.AdamW(lr_scale={"*": True}), "AdamW.lr_scale: a number is wanted, got {'*': True}"),
    (lambda: lab.Parallel(zero=True), "Parallel.zero: a number is wanted, got True"),  # type: ignore[arg-type]
    (lambda: lab.Experiment.from_yaml("model: {init: random}"), "Model.source: this field is required"),
    (lambda: lab.Experiment.from_yaml("kind: study\nmodel: x"), "'study' is no experiment"),
    (lambda: lab.Experiment.from_yaml("model: [x"), "this is no valid YAML"),
    (lambda: lab.Experiment.from_yaml("model: 2026-02-30"), "this is no valid YAML: day is out of range"),
    (lambda: lab.Experiment(), "Experiment.model: this field is required"),
    (lambda: lab.Experiment(model="x", optimiser=1), "did you mean `optimizer`?"),
    (lambda: FULL.with_("optimizer.lrr", 1), "AdamW|Lomo.lrr: unknown field"),
    (lambda: FULL.with_("optimiser.lr", 1), "Experiment.optimiser: unknown field"),
    (lambda: lab.Experiment.from_yaml("model: x\noptimizer: {kind: adam}"),
     "unknown kind 'adam' → there are: adafactor, adalomo"),
    (lambda: lab.AdamW(1e-3), "AdamW: its fields are given by name, got 0.001 → its fields: in_backward, lr"),  # type: ignore[misc]
    (lambda: lab.LoRA(targets="q_proj"), "got 'q_proj' → one in a list: ['q_proj']"),  # type: ignore[arg-type]
    (lambda: lab.Experiment(model="x", optimizer=lab.Lion), "a class, where one of it is wanted: Lion()"),
    (lambda: lab.Experiment(model="x", optimizer="lion"),
     "Experiment.optimizer: neither a cell nor its mapping: 'lion' → there are: AdaLomo, Adafactor"),
    (lambda: lab.Experiment(model="x", evaluate=lab.Perplexity()),
     "Experiment.evaluate: a list is wanted, got Perplexity("),
    (lambda: lab.Experiment(model="x", optimizer={"kind": "lion", "lrr": 1}), "Lion.lrr: unknown field"),
    (lambda: lab.Experiment(model="x", training={"stps": 1}), "Training.stps: unknown field → did you mean `steps`?"),
    (lambda: lab.Experiment.from_yaml("model: x\noptimizer: {lr: 1}"), "`kind` is missing"),
    (lambda: lab.Experiment.from_yaml("model: x\nsteps: 3"), "Experiment.steps: unknown field"),
    (lambda: lab.Experiment.from_yaml("absent.yaml"), "no such file: absent.yaml"),
    (lambda: lab.Experiment.from_yaml("model: x\ntraining: {on: true}"),
     "Training.True: a field's name is a text, got True → quote it; YAML reads on, yes, off and no as true and false"),
    (lambda: lab.Experiment.from_yaml("model: x\n1: 2"), "Experiment.1: a field's name is a text, got 1 → quote it"),
    (lambda: lab.Experiment.from_yaml("model: x\noptimizer: {kind: adamw, 1: 2}"), "AdamW.1: a field's name is a text"),
    (lambda: lab.Experiment.from_yaml("model: x\nevaluate: [{kind: perplexity, data: {kind: skills, 1: 2}}]"),
     "Skills.1: a field's name is a text"),
    (lambda: lab.Experiment.from_yaml("model: x\noptimizer: {kind: [a]}"), "Experiment.optimizer: unknown kind ['a']"),
    (lambda: lab.Experiment.from_yaml("model: {source: [a]}"), "Model.source: input should be a valid string"),
    (lambda: lab.Experiment(model="x", callbacks=(print,)).to_yaml(), "a callable cannot be written to YAML"),
])
def test_mistakes_name_cell_and_field(make: object, message: str) -> None:
    with pytest.raises(lab.CellError) as caught:
        make()  # type: ignore[operator]
    assert any(part in str(caught.value) for part in message.split("|"))


def test_of_items_that_are_wrong_it_is_not_said_that_they_are_too_few() -> None:
    with pytest.raises(lab.CellError) as caught:
        lab.Generation(metrics=("meteor",))  # type: ignore[arg-type]
    assert "at least 1 item" not in str(caught.value)


def test_what_is_no_number_may_be_a_bool() -> None:
    assert lab.SGD(in_backward=True).in_backward
    assert lab.Model("x", config={"tie_word_embeddings": True, "n": [1, True]}).config["n"] == [1, True]
    assert lab.Text([{"text": "a", "good": True}]).source == [{"text": "a", "good": True}]


def test_paths_become_text() -> None:
    path = Path("a/b")
    assert [lab.Model(path, tokenizer=path).tokenizer, lab.LoRA(load=path).load, lab.CSV(folder=path).folder,
            lab.LMEval("x", include_path=path).include_path] == ["a/b"] * 4  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "meant"), [("LOMO", "Lomo"), ("LoRa", "LoRA"), ("Adam", "AdamW")])
def test_a_name_that_is_not_there_tells_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}'; did you mean `{meant}`"):
        getattr(lab, name)


def test_import_is_light() -> None:
    code = "import sys, collie_lab; assert not {'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_signatures_show_plain_types() -> None:
    parameters = inspect.signature(lab.LoRA).parameters
    assert str(parameters["r"]) == "r: int = 8"
    assert str(parameters["load"]) == "load: str | None = None"
    assert {each.kind for each in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
