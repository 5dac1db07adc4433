"""Which parameters decay, and which learn at another pace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from collie_lab import cells
from collie_lab.optim import AdaLomo, RuleOptimizer, build, parameter_groups

MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def _model(tied: bool) -> nn.Module:
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, attention_bias=True, tie_word_embeddings=tied)
    model: nn.Module = LlamaForCausalLM(config)
    return model


def _kinds(model: nn.Module, group: dict[str, Any]) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {".".join(names[id(parameter)].split(".")[-2:]) for parameter in group["params"]}


@pytest.mark.parametrize("tied", [False, True])
def test_norms_biases_and_embeddings_do_not_decay(tied: bool) -> None:
    model = _model(tied)
    decayed, spared = parameter_groups(model, cells.AdamW(weight_decay=0.1))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    heads = set() if tied else {"lm_head.weight"}  # a tied head is an embedding
    assert _kinds(model, decayed) == {f"{name}.weight" for name in MATRICES} | heads
    assert _kinds(model, spared) == {
        "embed_tokens.weight", "norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight",
        *[f"{name}.bias" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]}
    assert sum(len(group["params"]) for group in (decayed, spared)) == len(list(model.parameters()))


def test_all_decay() -> None:
    model = _model(True)
    (group,) = parameter_groups(model, cells.AdamW(weight_decay=0.1, decay="all"))
    assert group["weight_decay"] == 0.1
    assert len(group["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_in_no_group() -> None:
    model = _model(True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj.weight" in name)
    (group,) = parameter_groups(model, cells.AdamW(weight_decay=0.1))
    assert _kinds(model, group) == {"q_proj.weight"}


def test_the_first_pattern_scales_the_learning_rate() -> None:
    model = _model(True)
    scales = {"*layers.0.*q_proj.weight": 3.0, "*q_proj*": 2.0, "*norm*": 0.0}
    groups = parameter_groups(model, cells.AdamW(lr=0.1, weight_decay=0.1, lr_scale=scales))
    found = {(group["lr"], group["weight_decay"]): _kinds(model, group) for group in groups}
    assert len(groups) == len(found)
    assert groups[0]["lr"] == 0.1  # what a loop reports
    assert groups[0]["weight_decay"] == 0.1
    assert found[0.1 * 3.0, 0.1] == {"q_proj.weight"}
    assert found[0.1 * 2.0, 0.1] == {"q_proj.weight"}
    assert found[0.1 * 2.0, 0.0] == {"q_proj.bias"}
    assert found[0.0, 0.0] == {"norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight"}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_pattern_without_a_match_raises() -> None:
    with pytest.raises(ValueError, match=r"AdamW\.lr_scale.*'\*lora_B\*'"):
        parameter_groups(_model(True), cells.AdamW(lr_scale={"*lora_B*": 16.0, "*q_proj*": 2.0}))


def test_a_pattern_may_be_for_a_parameter_elsewhere() -> None:
    """On another stage of a pipeline, say; a pattern before it that matches too leaves it without a match."""
    scales = {"*norm*": 0.5, "*layers.7.*": 2.0}
    (group, other) = parameter_groups(_model(True), cells.AdamW(decay="all", lr=0.1, lr_scale=scales),
                                      elsewhere=["model.layers.7.mlp.up_proj.weight"])
    assert (group["lr"], other["lr"]) == (0.1, 0.1 * 0.5)
    with pytest.raises(ValueError, match=r"layers\.7"):
        parameter_groups(_model(True), cells.AdamW(lr_scale=scales), elsewhere=["model.layers.7.norm.weight"])


def test_groups_reach_the_updates() -> None:
    """With gradients of 0 only weight decay moves: θ ← θ(1 − ηλ), in the groups that decay, at their own pace."""
    model = _model(True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    cell = cells.AdamW(lr=0.5, weight_decay=0.1, lr_scale={"*o_proj*": 2.0})
    optimizer = build(cell, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 1.0 * 0.1 if "o_proj.weight" in name else 1 - 0.5 * 0.1 if "proj.weight" in name else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


@pytest.mark.parametrize("cell", [
    cells.AdamW(), cells.SGD(), cells.SGD(momentum=0.9, nesterov=True), cells.Lomo(), cells.Lion(), cells.Adan(),
    cells.Adan(proximal=False), cells.Sophia(), cells.AdaLomo(), cells.AdamW(in_backward=True),
], ids=repr)
def test_every_cell_trains(cell: cells.Optimizer) -> None:
    model = _model(True)
    optimizer = build(cell, model)
    assert isinstance(optimizer, RuleOptimizer)
    assert optimizer.in_backward == cell.in_backward
    before = [parameter.detach().clone() for parameter in model.parameters()]
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    # Biases of keys have no effect on attention, hence no gradient but noise.
    assert sum(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)) >= len(before) - 2


def test_a_group_of_its_own_by_hand() -> None:
    weight, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = RuleOptimizer([weight], AdaLomo(), lr=0.1, weight_decay=0.0)
    optimizer.add_param_group({"params": [other], "lr": 0.2})
    for parameter in (weight, other):
        parameter.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2,), 0.9))
    torch.testing.assert_close(other.detach(), torch.full((2,), 0.8))
