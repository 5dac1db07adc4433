"""Grid files: what they become, and what they refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

import collie_lab as lab
from collie_lab.study.arms import Arm, arms_of
from collie_lab.study.grid import Grid

BASE: dict[str, Any] = {"model": "llama-tiny", "data": {"kind": "random_tokens", "length": 16},
                        "training": {"steps": 2, "batch_size": 2}}
METHODS: dict[str, Any] = {"AdamW": {"optimizer": {"kind": "adamw", "lr": 1e-3}},
                           "LOMO": {"optimizer": {"kind": "lomo"}, "training.weights": "bf16"}}


def arms(profile: str | None = None, changes: dict[str, Any] | None = None, **keys: Any) -> list[Arm]:
    return arms_from(keys, profile, changes)


def arms_from(keys: dict[Any, Any], profile: str | None = None, changes: Any = None) -> list[Arm]:
    return arms_of(Grid.read({"name": "toy", "base": BASE, **keys}, profile, changes), Path("results"))


def test_an_arm_is_the_experiment_that_one_would_compose() -> None:
    found = {arm.name: arm.experiment for arm in arms(product={"training.batch_size": [2, 4], "method": METHODS})}
    assert list(found) == ["batch_size=2, AdamW", "batch_size=2, LOMO", "batch_size=4, AdamW", "batch_size=4, LOMO"]
    by_hand = lab.Experiment(
        model=lab.Model("llama-tiny", init="random"), data=lab.RandomTokens(length=16), optimizer=lab.Lomo(),
        training=lab.Training(steps=2, batch_size=4, weights="bf16"), name="batch_size4-LOMO")
    assert found["batch_size=4, LOMO"] == by_hand


def test_cells_stand_for_mappings() -> None:
    base = lab.Experiment(model=lab.Model("llama-tiny", init="random"), data=lab.RandomTokens(length=16),
                          optimizer=lab.AdamW(), training=lab.Training(steps=2, batch_size=2))
    axes = {"optimizer": [lab.AdamW(lr=1e-3), lab.Lion()], "adapter": [None, lab.LoRA(r=4, targets=("q_proj",))]}
    found = arms_from({"base": base, "product": axes})
    plain = arms_from({"product": {
        "optimizer": [{"kind": "adamw", "lr": 1e-3}, {"kind": "lion"}],
        "adapter": [None, {"kind": "lora", "r": 4, "targets": ["q_proj"]}]}})
    assert [(arm.id, arm.name) for arm in found] == [(arm.id, arm.name) for arm in plain]
    assert found[3].name == "lion, lora(r=4, targets=['q_proj'])"


def test_a_file_and_its_experiments_round_trip(tmp_path: Path) -> None:
    experiment = lab.Experiment(model=lab.Model("llama-tiny", init="random"), optimizer=lab.Lion(lr=3e-4),
                                adapter=lab.LoRA(r=4), evaluate=(lab.Perplexity(every=2),), name="toy")
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"name": "toy", "base": yaml.safe_load(experiment.to_yaml())}))
    arm, = arms_of(Grid.read(tmp_path / "grid.yaml"), tmp_path)
    assert arm.experiment.to_dict() == experiment.to_dict()
    assert Arm.from_json(json.loads(json.dumps(arm.to_json()))) == arm


def test_changes_are_merged_and_another_kind_replaces() -> None:
    base = {**BASE, "optimizer": {"kind": "adamw", "lr": 1.0, "weight_decay": 0.1}}
    merged, replaced = (arm.experiment.optimizer for arm in arms(
        base=base, product={"optimizer": [{"kind": "adamw", "lr": 2.0}, {"kind": "lion", "lr": 2.0}]}))
    assert merged == lab.AdamW(lr=2.0, weight_decay=0.1)
    assert replaced == lab.Lion(lr=2.0)


def test_the_smaller_part_counts_whatever_the_order_of_axes() -> None:
    for axes in ({"optimizer.lr": [0.5], "method": METHODS}, {"method": METHODS, "optimizer.lr": [0.5]}):
        assert {arm.experiment.optimizer.lr for arm in arms(product=axes)} == {0.5}


@pytest.mark.parametrize("order", [1, -1])
def test_the_smaller_part_counts_whatever_the_order_of_changes(order: int) -> None:
    changes = dict([("optimizer.lr", 0.7), ("optimizer", {"kind": "lion", "lr": 0.1})][::order])
    lion = lab.Lion(lr=0.7)
    assert arms(changes=changes)[0].experiment.optimizer == lion
    assert arms(base={**BASE, **changes})[0].experiment.optimizer == lion
    assert arms("cpu", profiles={"cpu": {"base": changes}})[0].experiment.optimizer == lion


def test_zip_include_exclude_and_seeds() -> None:
    found = arms(
        product={"method": METHODS}, zip={"model": ["llama-tiny", "llama-1m"], "training.steps": [2, 3]},
        exclude=[{"method": "LOMO", "model": "llama-1m"}], seeds=[0, 7],
        include=[{"method": "LoRA", "model": "llama-5m", "adapter": {"kind": "lora"}, "seed": 3}])
    assert [arm.name for arm in found] == [
        "AdamW, llama-tiny, steps=2, seed=0", "AdamW, llama-tiny, steps=2, seed=7",
        "AdamW, llama-1m, steps=3, seed=0", "AdamW, llama-1m, steps=3, seed=7",
        "LOMO, llama-tiny, steps=2, seed=0", "LOMO, llama-tiny, steps=2, seed=7", "LoRA, llama-5m, steps=2, seed=3"]
    assert found[-1].labels == {"method": "LoRA", "model": "llama-5m", "training.steps": 2}
    assert isinstance(found[-1].experiment.adapter, lab.LoRA)
    assert found[-1].experiment.training.seed == 3


@pytest.mark.parametrize(("rule", "left"), [
    (None, ["lora(r=4)", "lora(r=8)"]),
    ("none", ["lora(r=4)", "lora(r=8)"]),
    ({"kind": "lora", "r": 8}, ["none", "lora(r=4)"]),
    ([None, "lora(r=4)"], ["lora(r=8)"]),
])
def test_values_are_excluded_by_their_labels_or_as_the_axis_has_them(rule: Any, left: list[str]) -> None:
    adapters = [None, {"kind": "lora", "r": 4}, {"kind": "lora", "r": 8}]
    found = arms(product={"adapter": adapters}, exclude=[{"adapter": rule}])
    assert [arm.labels["adapter"] for arm in found] == left


def test_profiles_are_merged_deeply_and_replace_axes() -> None:
    keys: dict[str, Any] = {
        "product": {"model": ["llama-7b"], "method": METHODS, "training.precision": ["bf16", "fp32"]},
        "profiles": {"cpu": {"base": {"training": {"steps": 1}}, "seeds": [4],
                             "product": {"model": ["llama-tiny"], "method": ["LOMO"], "training.precision": None}}}}
    arm, = arms("cpu", **keys)
    assert arm.labels == {"model": "llama-tiny", "method": "LOMO"}
    assert (arm.experiment.training.steps, arm.experiment.training.batch_size, arm.seed) == (1, 2, 4)
    assert len(arms(**keys)) == 4
    changed, = arms("cpu", {"training.batch_size": 8}, **keys)
    assert changed.experiment.training.batch_size == 8
    assert "no profile 'gpu'" in _error(lambda: arms("gpu", **keys))


def _error(action: Any) -> str:
    with pytest.raises(lab.CellError) as error:
        action()
    return str(error.value)


def test_an_id_follows_what_decides_on_the_result(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')

    def id_of(source: Path, **keys: Any) -> str:
        base = {**BASE, "data": {"kind": "instructions", "source": str(source)}}
        return arms(base=base, **keys)[0].id

    first = id_of(data)
    assert first == id_of(data, name="renamed", timeout=9, seeds=[0])
    assert first != id_of(data, seeds=[1])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    data.rename(elsewhere / "data.jsonl")
    assert first == id_of(elsewhere / "data.jsonl")  # its place does not count
    (elsewhere / "data.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    assert first != id_of(elsewhere / "data.jsonl")


def test_the_bytes_of_a_benchmark_decide_and_its_place_does_not(tmp_path: Path) -> None:
    def id_of(place: Path) -> str:
        return arms(base={**BASE, "evaluate": [{"kind": "mmlu", "path": str(place)}]})[0].id

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "questions.csv").write_text("1+1,2")
    first = id_of(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert id_of(tmp_path / "b") == first
    large = tmp_path / "b" / "large.bin"
    large.write_bytes(bytes(2**18))
    with_zeros = id_of(tmp_path / "b")
    large.write_bytes(bytes(2**17) + b"1" + bytes(2**17 - 1))  # a model that was tuned in its middle
    os.utime(large, ns=(0, 0))
    assert id_of(tmp_path / "b") != with_zeros
    (tmp_path / "b" / "questions.csv").write_text("1+1,3")
    assert id_of(tmp_path / "b") != first


def test_results_are_found_where_their_data_are_not(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    grid = {"name": "toy", "base": {**BASE, "data": {"kind": "instructions", "source": "data.jsonl"}}}
    study = lab.Study(grid, results="results")
    study._write()
    folder = study._made(study.arms[0])
    folder.write_status({"status": "ok", "seconds": 1.0})
    data.unlink()
    assert lab.Study(grid, results="results").statuses() == {"toy": "ok"}


def test_labels_are_the_numbers_that_the_cells_take(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(
        "{name: toy, base: {model: x}, product: {optimizer.lr: [1e-3, 1e-2], training.steps: [1e3]}}")
    found = [arm.labels for arm in arms_of(Grid.read(tmp_path / "grid.yaml"), tmp_path)]
    assert found == [{"optimizer.lr": lr, "training.steps": 1000} for lr in (1e-3, 1e-2)]
    in_python = arms(product={"method": {"A": {"optimizer.lr": ["1e-3", "1e-2"]}}, "training.steps": {"1": 1, "2": 2}},
                     tune={"axis": "optimizer.lr", "metric": "loss"})
    assert [arm.labels["optimizer.lr"] for arm in in_python] == [1e-3, 1e-2] * 2
    assert {arm.labels["training.steps"] for arm in in_python} == {"1", "2"}  # names of one's own


def test_limits_in_words() -> None:
    arm, = arms(memory_limit="1.5 GB", timeout=60)
    assert (arm.memory_limit, arm.timeout) == (1_500_000_000, 60.0)
    assert arms(memory_limit="2 GiB")[0].memory_limit == 2 * 2**30


@pytest.mark.parametrize(("keys", "words"), [
    ({"prodct": {}}, "did you mean `product`?"),
    ({"product": {"methods": ["AdamW"]}}, "no field of an experiment"),
    ({"product": {"method": {"A": {"optimiser.lr": 1}}}}, "`optimiser.lr` is no field of an experiment"),
    ({"product": {"training.stepps": [1]}}, "did you mean `steps`?"),
    ({"product": {"optimizer": [{"kind": "adam"}]}}, "unknown kind 'adam'"),
    ({"product": {"training.steps": [-1]}}, "toy: Training.steps: input should be greater"),
    ({"product": {"model": []}}, "an axis has a list of values"),
    ({"product": {"model": ["llama-tiny", "llama-tiny"]}}, "two of its values are called 'llama-tiny'"),
    ({"product": {"seed": [1, 2]}}, "seeds are no axis"),
    ({"product": {"status": {"x": {"training.steps": 1}}}}, "a column of this name"),
    *(({"product": {figure: METHODS}, "base": {**BASE, "evaluate": [{"kind": "exact_match", "name": "clinc"}]}},
       f"Grid.{figure}: a figure of the arms has this name → another name for the axis")
      for figure in ("loss", "trainable", "parameters", "seconds", "planned_weights", "peak_bytes", "clinc_exact_match",
                     "clinc_exact_match_se")),
    ({"product": {"method": METHODS}, "include": [{"method": "LOMO", "training.steps": 9}]},
     "two arms that are not the same are called 'LOMO'"),
    ({"include": [{"training.steps": 9}]}, "two arms that are not the same are called 'toy'"),
    ({"zip": {"model": ["llama-tiny"], "training.steps": [1, 2]}}, "different lengths"),
    ({"product": {"model": ["llama-tiny"]}, "zip": {"model": ["llama-1m"]}}, "stands in `product` too"),
    ({"product": {"a": {"x": {"training.steps": 1}}, "b": {"y": {"training.steps": 2}}}}, "sets `training.steps` too"),
    ({"product": {"method": METHODS}, "exclude": [{"method": "Lomo"}]}, "no arm has method: Lomo"),
    ({"product": {"adapter": [None, {"kind": "lora", "r": 4}], "method": METHODS}, "exclude": [{"adapter": "LoRA"}]},
     "no arm has adapter: LoRA → the axes, and their labels, are: adapter (none, lora(r=4)); method (AdamW, LOMO)"),
    ({"product": {"method": METHODS}, "exclude": [{"method": ["AdamW", "LOMO"]}]}, "no arm is left"),
    ({"product": {"method": METHODS}, "include": [{"training.steps": 4}]}, "has no `method`"),
    ({"product": {"a": {"x": {}, "y": {}}}}, "are the same experiment"),
    ({1: 2}, "Grid.1: a field's name is a text, got 1 → quote it"),
    ({"product": {"method": {"A": {1: 2}}}}, "Grid.method.A: `1` is no field of an experiment"),
    ({"base": {1: 2}}, "Grid.base.1"),
    ({"base": {**BASE, "training": {True: 1}}}, "toy: Training.True: a field's name is a text"),
    ({"changes": {1: 2}}, "Grid.1: a field's name is a text"),
    ({"profiles": {"cpu": {"base": {1: 2}}}, "profile": "cpu"}, "Grid.1: a field's name is a text"),
    ({"profiles": {"cpu": {"product": {"method": [3]}}}, "profile": "cpu", "product": {"method": {1: {}, 2: {}}}},
     "3 is no label of the axis → there are: 1, 2"),
    ({"base": {**BASE, "model": {"source": ["x"]}}}, "Model.source: input should be a valid string"),
    ({"seeds": [1, 1]}, "a seed stands twice"),
    ({"seeds": [True, False]}, "Grid.seeds: a number is wanted, got [True, False]"),
    ({"product": {"training.steps": [True]}}, "toy: Training.steps: a number is wanted, got True"),
    ({"include": [{"seed": True}]}, "Training.seed: a number is wanted, got True"),
    ({"memory_limit": "4 apples"}, "no size in bytes"),
    ({"base": {**BASE, "runner": "peer"}}, "unknown runner 'peer'"),
    ({"profiles": {"cpu": {"seeds": [1]}, "gpu": {"seedz": [1]}}, "profile": "cpu"},
     "Grid.profiles.gpu.seedz: a profile has no such key → its keys: base, product, zip"),
    ({"profiles": {"gpu": {"name": "x"}}}, "Grid.profiles.gpu.name: a profile has no such key"),
    ({"tune": {"axis": "optimizer.lr", "metric": "loss"}}, "no list of values for it"),
])
def test_mistakes(keys: dict[Any, Any], words: str) -> None:
    options = {name: keys[name] for name in ("profile", "changes") if name in keys}
    assert words in _error(lambda: arms_from({key: value for key, value in keys.items() if key not in options},
                                             **options))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "latin.yaml").write_bytes("name: né".encode("latin1"))
    (tmp_path / "twice.yaml").write_text("name: a\nproduct: {method: {A: {},\n A: {}}}\n")
    assert "No such file" in _error(lambda: Grid.read("absent.yaml"))
    assert "is no mapping" in _error(lambda: Grid.read(tmp_path / "list.yaml"))
    assert "no valid YAML" in _error(lambda: Grid.read(tmp_path / "bad.yaml"))
    assert "latin.yaml is no text in UTF-8" in _error(lambda: Grid.read(tmp_path / "latin.yaml"))
    assert "the key `A` stands twice, in line 2 and in line 3" in _error(lambda: Grid.read(tmp_path / "twice.yaml"))
