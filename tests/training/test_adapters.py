"""Adapters: their first values, one curve in every layout, export and merging."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import collie_lab as lab
from collie_lab.cells import Adapter
from collie_lab.folder import RunFolder, read_json, write_json
from collie_lab.training.adapters import adapt
from collie_lab.training.model import build_model
from collie_lab.training.weights import blueprint
from tests.ranks import losses, run_here, run_ranks

CPU = torch.device("cpu")
IDS = torch.arange(40).reshape(2, 20)
BASE = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), data=lab.Skills(size=60, test_size=10, packing=True, max_length=96),
    optimizer=lab.AdamW(lr=1e-2), training=lab.Training(steps=5, batch_size=4, export=False),
)
ADAPTERS: dict[str, Adapter] = {
    "lora": lab.LoRA(r=2), "rslora": lab.LoRA(r=4, rslora=True, targets=("q_proj", "v_proj")),
    "dora": lab.LoRA(r=2, dora=True), "ia3": lab.IA3(), "oft": lab.OFT(block_size=4),
}
MUTATED: dict[str, Adapter] = {"pissa": lab.LoRA(r=2, init="pissa"), "olora": lab.LoRA(r=2, init="olora", rslora=True)}
REFERENCES: dict[str, Any] = {
    "lora": peft.LoraConfig(r=2, lora_alpha=16, target_modules="all-linear"),
    "rslora": peft.LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    "dora": peft.LoraConfig(r=2, lora_alpha=16, use_dora=True, target_modules="all-linear"),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM"), "oft": peft.OFTConfig(oft_block_size=4, target_modules="all-linear"),
}
pytestmark = pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")


def _plain(model: nn.Module, path: Path) -> nn.Module:
    """The base model as transformers reads it, from the weights of one that was adapted."""
    whole = build_model(BASE, CPU).causal_lm
    whole.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_that_of_peft_on_the_whole_model(name: str, tmp_path: Path) -> None:
    """The same parameters, trained or not; those that do not come by chance with the same values; logits as before."""
    built = build_model(BASE.replace(adapter=ADAPTERS[name]), CPU)
    plain = _plain(built.root, tmp_path)
    reference = peft.get_peft_model(copy.deepcopy(plain), REFERENCES[name])
    found, expected = dict(built.root.named_parameters()), dict(reference.named_parameters())
    assert {key: (each.shape, each.requires_grad) for key, each in found.items()} == {
        key: (each.shape, each.requires_grad) for key, each in expected.items()}
    assert built.size.trainable == sum(each.numel() for each in expected.values() if each.requires_grad)
    for key, parameter in found.items():
        if "lora_A" not in key:
            torch.testing.assert_close(parameter, expected[key], msg=key)
    with torch.no_grad():
        torch.testing.assert_close(built.root.eval()(input_ids=IDS).logits, plain(input_ids=IDS).logits,
                                   atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MUTATED)
def test_what_is_taken_out_of_the_weights_is_what_peft_takes_out(name: str, tmp_path: Path) -> None:
    """Factors differ by signs; products do not."""
    cell: Any = MUTATED[name]
    root: Any = build_model(BASE.replace(adapter=cell), CPU).root
    plain = _plain(root, tmp_path)
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules="all-linear", init_lora_weights=name,
                             use_rslora=cell.rslora)
    reference = peft.get_peft_model(copy.deepcopy(plain), config)
    for key, module in root.named_modules():
        if hasattr(module, "lora_A"):
            other = reference.get_submodule(key)
            torch.testing.assert_close(module.base_layer.weight, other.base_layer.weight, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(module.get_delta_weight("default"), other.get_delta_weight("default"),
                                       atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(root(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


def test_lora_plus_is_a_larger_learning_rate_of_b(tmp_path: Path) -> None:
    named = BASE.replace(adapter=ADAPTERS["lora"], optimizer=lab.AdamW(lr=1e-3, lr_scale={"*lora_B*": 16}))
    plus = BASE.replace(adapter=lab.LoRA(r=2, plus=16), optimizer=lab.AdamW(lr=1e-3))
    plain = plus.replace(adapter=ADAPTERS["lora"])
    curves = [losses(run_here(each, tmp_path / str(index))) for index, each in enumerate((named, plus, plain))]
    assert curves[0] == curves[1] != curves[2]
    assert plus.replace(optimizer=named.optimizer.replace(lr_scale={"*lora_B*": 4})).scaled_optimizer.lr_scale == {
        "*lora_B*": 4}


@pytest.mark.parametrize("name", [*ADAPTERS, *MUTATED])
def test_an_exported_adapter_loads_and_merges(name: str, tmp_path: Path) -> None:
    experiment = BASE.replace(adapter={**ADAPTERS, **MUTATED}[name]).with_("training.export", True)
    run = run_here(experiment, tmp_path / "run")
    plain = _plain(nn.Module(), tmp_path / "base")
    with torch.no_grad():
        before = plain(input_ids=IDS).logits
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), run.path / "model").eval()
        after = loaded(input_ids=IDS).logits
        assert (after - before).abs().max() > 1e-3
        merged = loaded.merge_and_unload()(input_ids=IDS).logits
        torch.testing.assert_close(merged, after, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dora", "oft", "pissa"])
def test_a_resumed_adapter_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    experiment = BASE.replace(adapter={**ADAPTERS, **MUTATED}[name]).with_("training.checkpoint_every", 3)
    whole = run_here(experiment, tmp_path / "whole")
    resumed = run_here(experiment, tmp_path / "resumed", resume=next(whole.checkpoints.glob("*3")))
    assert losses(resumed) == losses(whole)[3:]


def test_the_revision_of_the_base_stands_with_the_adapter() -> None:
    adapted = adapt(blueprint(BASE.model), lab.LoRA(), revision="0123abc")
    assert adapted.peft_config["default"].revision == "0123abc"


def test_frozen_random_weights_are_not_resumed_on_what_draws_others(tmp_path: Path) -> None:
    experiment = BASE.replace(adapter=ADAPTERS["lora"]).with_("training.checkpoint_every", 3)
    whole = run_here(experiment, tmp_path / "whole")
    checkpoint = next(whole.checkpoints.glob("*3"))
    state = read_json(checkpoint / "state.json")
    assert state["identity"]["drawn_on"] == "cpu"
    state["identity"]["drawn_on"] = "NVIDIA H200"
    write_json(checkpoint / "state.json", state)
    with pytest.raises(ValueError, match=r"drawn by another device \(NVIDIA H200\), and are others here \(cpu\)"):
        run_here(experiment, tmp_path / "resumed", resume=checkpoint)


def test_bf16_weights_take_adapters(tmp_path: Path) -> None:
    """What is added stays in fp32, and learns what it learns beside fp32 weights."""
    for name in ("lora", "dora", "ia3", "oft"):
        training = BASE.training.replace(weights="bf16", precision="bf16")
        experiment = BASE.replace(adapter=ADAPTERS[name], training=training)
        types = {parameter.dtype for parameter in build_model(experiment, CPU).root.parameters()
                 if parameter.requires_grad}
        assert types == {torch.float32}, name
        run = run_here(experiment, tmp_path / name)
        exact = run_here(BASE.replace(adapter=ADAPTERS[name]), tmp_path / f"{name}-fp32")
        assert losses(run) == pytest.approx(losses(exact), abs=0.02), name


# --- Freeze ---------------------------------------------------------------------------------------


def test_freeze_trains_what_matches_and_nothing_else(tmp_path: Path) -> None:
    experiment = BASE.replace(adapter=lab.Freeze(("model.layers.1.*", "*norm*"))).with_("training.export", True)
    before = build_model(BASE, CPU).causal_lm
    run = run_here(experiment, tmp_path / "run")
    after = AutoModelForCausalLM.from_pretrained(run.path / "model")
    changed = {name for name, parameter in after.named_parameters()
               if not torch.equal(parameter, before.get_parameter(name))}
    assert changed == {name for name, _ in before.named_parameters() if name.startswith("model.layers.1.")
                       or "norm" in name}
    assert run.read("result.json")["trainable"] == sum(before.get_parameter(name).numel() for name in changed)


def test_targets_that_name_nothing_are_told_before_the_launch(tmp_path: Path) -> None:
    wrong = BASE.replace(adapter=lab.LoRA(targets=("q_proj", "query")))
    message = r"LoRA\.targets: .* has no layer 'query'.*down_proj, .*q_proj"
    with pytest.raises(ValueError, match=message):
        build_model(wrong, CPU)
    build_model(BASE, CPU).causal_lm.save_pretrained(tmp_path)
    for model in (BASE.model, lab.Model(tmp_path, tokenizer="bytes")):
        with pytest.raises(lab.CellError, match=message.replace("down_proj, ", "")):
            wrong.replace(model=model).check().raise_for_errors()
        for right in ("q_proj", "self_attn.q_proj", "layers.0.self_attn.q_proj"):
            assert wrong.replace(model=model, adapter=lab.LoRA(targets=(right,))).check().ok


def test_freeze_keeps_ties_and_refuses_what_matches_nothing() -> None:
    model = adapt(blueprint(BASE.model), lab.Freeze(("lm_head.weight",)))
    assert [name for name, each in model.named_parameters() if each.requires_grad] == ["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"Freeze\.train: no parameter of LlamaForCausalLM matches 'bert\.\*'"):
        adapt(blueprint(BASE.model), lab.Freeze(("bert.*",)))


# --- layouts --------------------------------------------------------------------------------------

GROUPS = {"peft": {**ADAPTERS, "pissa": MUTATED["pissa"], "freeze": lab.Freeze(("*.q_proj.*", "*norm*"))},
          "four bits": {"qlora": lab.QLoRA(r=2)}}
ADALORA = BASE.replace(adapter=lab.AdaLoRA(init_r=3, target_r=2), training=BASE.training.replace(steps=10))
LAYOUTS = {"dp": lab.Parallel(dp=2), "zero3": lab.Parallel(dp=2, zero=3), "pp": lab.Parallel(pp=2)}


def _curves(folder: Path, group: str) -> None:
    for name, adapter in GROUPS[group].items():
        for layout, parallel in LAYOUTS.items():
            training = BASE.training.replace(export=layout == "zero3", micro_batch_size=1)
            experiment = BASE.replace(adapter=adapter, parallel=parallel, training=training)
            if experiment.check().ok:
                run_here(experiment, folder / f"{name}-{layout}")


@pytest.mark.ranks
@pytest.mark.parametrize("group", GROUPS)
def test_two_ranks_give_the_curve_of_one(group: str, tmp_path: Path) -> None:
    if group == "four bits":
        pytest.importorskip("bitsandbytes")
    run_ranks(_curves, 2, tmp_path, group)
    for name, adapter in GROUPS[group].items():
        experiment = BASE.replace(adapter=adapter).with_("training.export", True)
        one = run_here(experiment, tmp_path / f"{name}-one")
        for layout in LAYOUTS:
            two = tmp_path / f"{name}-{layout}"
            if name == "qlora" and layout == "zero3":
                assert not two.exists()
                continue
            assert losses(RunFolder(two)) == pytest.approx(losses(one), abs=1e-5), (name, layout)


def _adalora(folder: Path) -> None:
    run_here(ADALORA.replace(parallel=lab.Parallel(dp=2)).with_("training.export", True), folder / "two")


@pytest.mark.ranks
def test_two_ranks_find_the_ranks_of_one(tmp_path: Path) -> None:
    run_ranks(_adalora, 2, tmp_path)
    one = run_here(ADALORA, tmp_path / "one")
    assert losses(RunFolder(tmp_path / "two")) == pytest.approx(losses(one), abs=1e-5)
