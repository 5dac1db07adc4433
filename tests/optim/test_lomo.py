"""LOMO against its formula and SGD; which parameters decay; what an optimizer in backward must refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from collie_lab import SGD, AdamW, Experiment, Model
from collie_lab import Lomo as LomoCell
from collie_lab.optim import Lomo, build, parameter_groups
from collie_lab.training.model import build_model


def test_the_formula_in_float64() -> None:
    rng = np.random.default_rng(0)
    theta, decay = rng.normal(size=(4, 3)), 0.1
    parameter = nn.Parameter(torch.from_numpy(theta.copy()))
    optimizer = Lomo([parameter], lr=1.0, weight_decay=decay)
    for step in range(1, 21):
        gradient, lr = rng.normal(size=(4, 3)), 0.5 / step
        optimizer.param_groups[0]["lr"] = lr
        (parameter * torch.from_numpy(gradient)).sum().backward()
        optimizer.step()
        theta = theta * (1 - lr * decay) - lr * gradient
        assert parameter.grad is None
        np.testing.assert_allclose(parameter.detach().numpy(), theta, rtol=0, atol=1e-12)


def test_in_backward_equals_sgd_on_a_model_with_tied_weights() -> None:
    ends = []
    for cell in (LomoCell(lr=0.1, weight_decay=0.1), SGD(lr=0.1, weight_decay=0.1)):
        model, _ = build_model(Experiment(model=Model("llama-tiny", init="random")), torch.device("cpu"))
        optimizer = build(cell, model)
        ids = torch.arange(40)[None]
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([parameter.detach() for parameter in model.parameters()])
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)


def test_a_second_gradient_in_one_step_raises() -> None:
    parameter = nn.Parameter(torch.ones(2))
    Lomo([parameter], lr=0.1)
    parameter.sum().backward()
    with pytest.raises(RuntimeError, match="second gradient"):
        parameter.sum().backward()


def test_few_gradients_live_at_once() -> None:
    layers = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    optimizer = Lomo(layers.parameters(), lr=0.1)
    living = []
    for layer in layers:
        layer.weight.register_post_accumulate_grad_hook(
            lambda _: living.append(sum(p.grad is not None for p in layers.parameters())))
    layers(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    assert max(living) == 0  # each is gone before the next hook


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    model, _ = build_model(Experiment(model=Model("llama-tiny", init="random")), torch.device("cpu"))
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all("norm" in names[id(p)] or "embed" in names[id(p)] for p in spared["params"])
    assert isinstance(build(AdamW(), model), torch.optim.AdamW)
