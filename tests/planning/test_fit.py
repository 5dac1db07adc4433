"""What fits on some GPUs; plans side by side."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import collie_lab as lab
from collie_lab.cli import app
from collie_lab.planning import METHODS, find_gpu
from collie_lab.planning._rough import Shape, rough_bytes
from collie_lab.planning._search import Option

TINY = dataclasses.replace(find_gpu("3090"), name="tiny", memory=5_000_000 + 804_061_184 + 17_039_360)


def _shape(name: str) -> Shape:
    return Shape.of(lab.Model(name, init="random"), lab.SHAPES[name])


@pytest.fixture
def no_dry_runs(monkeypatch: pytest.MonkeyPatch) -> list[Option]:
    """Dry runs that take arithmetic at its word; the options that were tried."""
    tried: list[Option] = []
    _say(monkeypatch, lambda option: tried.append(option) or _Said(option.rough_bytes))
    return tried


@dataclasses.dataclass
class _Said:
    """A plan that repeats an option's own figures."""

    process_bytes: float
    speed: None = None
    mfu: float = 0.5


def _say(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Option], _Said]) -> None:
    plan = functools.cached_property(answer)
    plan.__set_name__(Option, "plan")
    monkeypatch.setattr(Option, "plan", plan)


@pytest.mark.parametrize("name", ["llama-1b", "llama-7b", "llama-65b"])
def test_the_number_of_parameters(name: str) -> None:
    billions = {"llama-1b": 1.100, "llama-7b": 6.738, "llama-65b": 65.286}  # the papers' tables, with embeddings
    assert _shape(name).parameters / 1e9 == pytest.approx(billions[name], rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_rough_figures_are_near_the_closed_form(name: str, recompute: str) -> None:
    experiment = lab.Experiment(model=lab.Model("llama-7b", init="random"), data=lab.RandomTokens(length=2048),
                                training=lab.Training(batch_size=32, precision="bf16", recompute=recompute))
    for path, value in {**METHODS[name], "training.micro_batch_size": None}.items():
        experiment = experiment.with_(path, value)
    for layout in (lab.Parallel(dp=8, zero=3), lab.Parallel(dp=8)):
        laid_out = experiment.replace(parallel=layout)
        exact = lab.estimate(laid_out, "H100").peak_bytes
        rough = rough_bytes(laid_out, _shape("llama-7b"), find_gpu("H100"), 2048)
        assert 0.75 <= rough / exact <= 1.3, (layout, rough / exact)


def test_seven_billion_on_eight_gpus(no_dry_runs: list[Option]) -> None:
    found = lab.fit("llama-7b", 8, "3090", progress=False)
    assert {option.method for option in found} == set(METHODS)
    assert len(no_dry_runs) == 3
    assert len({option.method for option in no_dry_runs}) == 3  # the best of each method before any second one
    assert [option.confirmed for option in found] == [True] * 3 + [False] * (len(found) - 3)
    speeds = [option.tokens_per_second for option in found[3:]]
    assert speeds == sorted(speeds, reverse=True)
    for option in found:
        assert option.experiment.parallel.world_size == 8
        assert option.process_bytes <= 25.3e9
        assert not lab.check.check_cells(option.experiment).errors
    best = found.best.experiment
    assert lab.Experiment.from_yaml(best.to_yaml()) == best  # ready to launch
    reasons = found.reasons.set_index(["method", "layout"])["reason"]
    assert reasons["AdamW", "dp=8"].startswith("out of memory by about ")  # 16 bytes a parameter on one GPU
    assert "in a pipeline nothing can be updated" in reasons["LOMO", "pp=8"]
    assert f"{len(found.refused)} layouts do not do" in found._repr_html_()


def test_a_folder_with_a_configuration_alone(no_dry_runs: list[Option], tmp_path: Path) -> None:
    fields = {"model_type": "llama", **lab.SHAPES["llama-tiny"]}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    experiment = lab.Experiment(model=lab.Model(tmp_path), data=lab.RandomTokens(length=64))
    for init in ("random", "pretrained"):  # a plan needs no weights, a run those that are there
        for model in (tmp_path, lab.Model(tmp_path), experiment):
            found = lab.fit(model, 1, "3090", methods=["AdamW"], batch_size=8, progress=False)
            assert found.best.experiment.model.init == init
        (tmp_path / "model.safetensors").touch()


def test_the_least_memory(no_dry_runs: list[Option]) -> None:
    found = lab.fit("llama-7b", 8, "H100", goal="memory", methods=["AdamW", "LOMO"], progress=False)
    assert found.best.method == "LOMO"
    for options in (found[:3], found[3:]):  # by dry runs, and by arithmetic
        sizes = [option.process_bytes for option in options]
        assert sizes == sorted(sizes)


def test_an_experiment_is_the_one_method(no_dry_runs: list[Option]) -> None:
    experiment = lab.Experiment(model=lab.Model("llama-1b", init="random"), optimizer=lab.Lion(lr=1e-4),
                                data=lab.RandomTokens(length=512), name="mine",
                                training=lab.Training(batch_size=12, precision="bf16", steps=7))
    found = lab.fit(experiment, 2, "H100", progress=False)
    assert {option.method for option in found} == {"Lion"}
    assert found.best.experiment.replace(parallel=lab.Parallel()).training.steps == 7
    several = lab.fit(experiment, 2, "H100", progress=False,
                      methods={"bf16": {"training.weights": "bf16"}, "LoRA": {"adapter": lab.LoRA(r=4)}})
    assert {option.method for option in several} == {"bf16", "LoRA"}


@pytest.mark.parametrize(("arguments", "message"), [
    ({"gpu": "3091"}, "plan.gpu: no GPU '3091' in the catalogue"),
    ({"gpus": 0}, "fit.gpus: 0 is no number of gpus"),
    ({"goal": "speed"}, "fit.goal: no goal 'speed' → there are: throughput, memory"),
    ({"methods": ["AdamV"]}, "fit.methods: no method 'AdamV' → there are: AdamW, Lion"),
    ({"length": 4096}, "fit.length: 4096 tokens do not fit the model's context of 2048"),
    ({"model": "./nowhere"}, "Model.source: './nowhere' is neither a folder here nor a named shape"),
    ({"length": 8, "data": lab.Skills()}, "fit.length: the data have a length of their own"),
])
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(lab.CellError) as caught:
        lab.fit(**{"model": "llama-7b", "progress": False, **arguments})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("name", "found"), [
    ("A100-80GB", "A100"), ("a100 80 gb", "A100"), ("A100-80G", "A100"), ("A100-SXM", "A100"),
    ("A100 40GB", "A100-40GB"), ("H100-80GB", "H100"), ("h100 sxm", "H100"), ("h100pcie", "H100 PCIe"),
    ("rtx4090 24GB", "RTX 4090"), ("T4 16GB", "T4"),
])
def test_gpus_by_what_people_write(name: str, found: str) -> None:
    assert find_gpu(name) is lab.GPUS[found]


@pytest.mark.parametrize(("gpu", "message"), [
    ("A100-64GB", r"no GPU 'A100-64GB' of this memory .* there are: A100 \(85 GB for a process\), A100-40GB"),
    ("H2000", "no GPU 'H2000' in the catalogue → did you mean 'H200'"), ("", "no GPU '' .* there are: B200, H200"),
    (80, "plan.gpu: 80 is no GPU → a name of"), (0, "plan.gpu: 0 is no GPU → a name of"),
])
def test_what_is_no_gpu(gpu: Any, message: str) -> None:
    with pytest.raises(lab.CellError, match=message):
        find_gpu(gpu)


@pytest.mark.parametrize(("field", "value"), [
    ("memory", 0), ("memory", "80GB"), ("bandwidth", -1.0), ("flops", float("nan")), ("link", 0), ("fp32", 0.0)])
def test_a_gpu_has_more_than_nothing(field: str, value: Any) -> None:
    with pytest.raises(lab.CellError, match=rf"GPU\.{field}: {value!r} is no"):
        dataclasses.replace(TINY, **{field: value})


def test_a_price_below_nothing() -> None:
    experiment = lab.Experiment(model=lab.Model("llama-tiny", init="random"), data=lab.RandomTokens(length=64))
    with pytest.raises(lab.CellError, match=r"plan\.price_per_gpu_hour: -1 is no price → 0 or more"):
        lab.Plan(experiment, TINY, 64, ()).cost(-1)


def test_shapes_and_batches_that_do_not_divide(no_dry_runs: list[Option]) -> None:
    found = lab.fit("llama-7b", 3, "H200", batch_size=8, methods=["LoRA"], progress=False)
    reasons = found.reasons.set_index("layout")["reason"]
    assert reasons["dp=3"] == "8 sequences cannot be shared equally by 3 data-parallel ranks"
    assert reasons["tp=3"] == "3 ranks cannot share num_attention_heads=32 equally"
    assert {option.experiment.parallel.pp for option in found} == {3}
    with pytest.raises(lab.CellError, match="nothing fits"):
        lab.fit("llama-65b", 1, "3090", methods=["AdamW"], progress=False).best  # noqa: B018


def test_dry_runs_decide() -> None:
    found = lab.fit("llama-tiny", 1, TINY, methods=["AdamW"], length=64, batch_size=8, confirm=1, progress=False)
    best = found.best
    assert best.confirmed
    assert best.process_bytes == best.plan.process_bytes
    assert best.plan.speed is None or best.seconds == best.plan.speed.seconds


def test_what_does_not_fit_after_all_makes_place(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
                                                 ) -> None:
    _say(monkeypatch, lambda option: _Said(option.gpu.memory + 10**9 if option.micro > 2 else option.rough_bytes))
    found = lab.fit("llama-7b", 8, "H100", methods=["LoRA"], confirm=4)
    assert all(option.micro <= 2 for option in found if option.confirmed)
    assert "out of memory by 1.00 GB" in capsys.readouterr().out


def test_plans_side_by_side() -> None:
    base = lab.Experiment(model=lab.Model("llama-tiny", init="random"), data=lab.RandomTokens(length=64),
                          training=lab.Training(batch_size=4))
    plans = [base.plan(TINY), base.replace(optimizer=lab.Lomo()).plan(TINY)]
    found = plans[0].compare(*plans[1:])
    assert list(found.frame.index) == ["AdamW", "Lomo"]  # what differs
    assert list(found.frame["peak"]) == [each.peak_bytes for each in plans]
    parts = found.frame.loc["AdamW", ["weights", "gradients", "optimizer", "activations", "loss", "temporaries",
                                      "communication", "workspace"]]
    assert parts.sum() == plans[0].peak_bytes
    assert list(found.table()["fits"]) == ["yes" if each.fits else "no" for each in plans]
    assert "optimizer" in found.table()
    assert "communication" not in found.table()  # nobody has any
    assert found._repr_html_().count("<img") == 1
    assert [label.get_text() for label in found.figure().axes[0].get_yticklabels()] == ["AdamW", "Lomo"]
    assert list(lab.Plan.compare(*plans, labels=["a", "b"]).plans) == ["a", "b"]
    with pytest.raises(lab.CellError, match="1 labels for 2 plans"):
        plans[0].compare(plans[1], labels=["a"])


def test_in_a_shell(no_dry_runs: list[Option]) -> None:
    arguments = ["fit", "llama-1b", "--gpus", "2", "--gpu", "H200", "--method", "LOMO", "--to", "new/best.yaml"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "LOMO" in result.output
    assert lab.Experiment.from_yaml("new/best.yaml").optimizer == lab.Lomo()
    assert CliRunner().invoke(app, ["fit", "llama-65b", "--gpus", "1", "--gpu", "T4"]).exit_code == 1
