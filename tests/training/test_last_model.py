"""What a pool's rank keeps of a model is what filling it anew would give."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from collie_lab.cells import OFT, Adapter, LoRA, Model
from collie_lab.training import last_model, weights
from collie_lab.training.adapters import adapt

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_keeps", True), ("_key", ""), ("_values", {})):
        monkeypatch.setattr(last_model, name, value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def filled(cell: Model, seed: int = 0) -> nn.Module:
    model = weights.blueprint(cell)
    weights.fill(model, cell, seed, CPU)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("init", ["random", "pretrained"])
def test_the_first_weights_come_back_and_not_the_trained(saved: Path, init: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Model("llama-tiny", init="random") if init == "random" else Model(str(saved))
    first = filled(cell)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    monkeypatch.setattr(weights, "_source", None)  # from now on nothing can be drawn or read
    again = filled(cell)
    monkeypatch.undo()
    monkeypatch.setattr(last_model, "_keeps", False)
    monkeypatch.setattr(last_model, "_values", {})
    assert same(again, filled(cell))


def test_an_adapters_own_buffers_are_not_those_of_another() -> None:
    """OFT keeps indices in buffers; the base model is the same for all adapters, and so are its parameters' names."""
    cell = Model("llama-tiny", init="random")

    def adapted(adapter: Adapter) -> nn.Module:
        model = adapt(weights.blueprint(cell), adapter)
        weights.fill(model, cell, 0, CPU)
        return model

    for adapter in (LoRA(r=2), OFT(block_size=4), OFT(block_size=2), OFT(block_size=4)):
        wanted = {name: buffer.clone() for name, buffer in adapt(weights.blueprint(cell), adapter).named_buffers()}
        found = dict(adapted(adapter).named_buffers())
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_another_seed_or_a_changed_file_is_another_model(saved: Path) -> None:
    shape = Model("llama-tiny", init="random")
    assert not same(filled(shape, seed=0), filled(shape, seed=1))
    before = filled(Model(str(saved)))
    model = LlamaForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(saved)
    os.utime(saved / "model.safetensors", ns=(1, 1))
    assert torch.equal(filled(Model(str(saved))).lm_head.weight, 2 * before.lm_head.weight)


def test_what_has_no_room_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_model, "_SHARE", 0.0)
    filled(Model("llama-tiny", init="random"))
    assert not last_model._values
