"""What loops do to optimizers in practice must be right, or raise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from collie_lab import AdaLomo, AdamW, Lomo, Muon, Sophia, optim
from collie_lab.optim import SGD, Lion, RuleOptimizer

PLAIN: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0}


def _steep(parameter: nn.Parameter, slope: float = 100.0) -> None:
    """A gradient of `slope` everywhere."""
    (parameter * slope).sum().backward()


def test_accumulate_matters_in_backward_only() -> None:
    parameter = nn.Parameter(torch.ones(4))
    optimizer = RuleOptimizer([parameter], SGD(), accumulate="each", max_norm=1.0, **PLAIN)
    _steep(parameter)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4,), 0.5))  # a norm of 1
    RuleOptimizer([parameter], Lion(), accumulate="each", betas=(0.9, 0.99), **PLAIN)


def test_a_model_that_changed_its_type_raises() -> None:
    model = nn.Linear(64, 64)
    optimizer = optim.build(AdamW(), model)
    model.double()
    model(torch.ones(1, 64, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match=r"became torch.float64 .* change the model before"):
        optimizer.step()


def test_a_graph_that_needs_the_old_weight_raises() -> None:
    x, weight = torch.ones(8, requires_grad=True), nn.Parameter(torch.ones(8))
    optimizer = RuleOptimizer([weight], SGD(), **PLAIN)
    loss = (x * weight).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("successor", [AdamW(lr=0.1), AdaLomo(lr=0.1), Muon(lr=0.1)], ids=lambda cell: cell.kind)
def test_the_last_optimizer_made_is_the_one_that_trains(successor: Any) -> None:
    """A notebook cell that is run again."""
    model = nn.ModuleList([nn.Linear(4, 4)])
    first = optim.build(AdaLomo(lr=0.1), model)
    optimizer = optim.build(successor, model)
    model[0](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert all(int(state["step"]) == 0 for state in first.state.values())
    assert all(optimizer.state[parameter] for parameter in model.parameters())


def test_a_hessian_pass_wants_no_gradients_of_training() -> None:
    model = nn.Linear(4, 1, bias=False)
    optimizer = optim.build(Sophia(hessian_every=1), model)
    assert isinstance(optimizer, RuleOptimizer)
    _steep(model.weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="zero_grad"), optimizer.refresh_hessian(tokens=10):
        pass
    optimizer.zero_grad()
    with optimizer.refresh_hessian(tokens=10):
        _steep(model.weight, 1.0)
    torch.testing.assert_close(optimizer.state[model.weight]["h"], torch.full((1, 4), 0.1))


def test_a_measured_norm_is_good_for_one_batch() -> None:
    parameter = nn.Parameter(torch.ones(4))
    optimizer = RuleOptimizer([parameter], SGD(), in_backward=True, max_norm=1.0, **PLAIN)
    with optimizer.measure():
        _steep(parameter, 0.001)  # then the updating pass fails: the next batch measures anew
    assert optimizer.needs_measure
    with optimizer.measure():
        _steep(parameter)
    _steep(parameter)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4,), 0.5))


def test_the_previous_norm_survives_an_empty_step_and_goes_with_its_state() -> None:
    parameter = nn.Parameter(torch.ones(4))
    optimizer = RuleOptimizer([parameter], SGD(), in_backward=True, max_norm=1.0, clip_by="previous_norm", **PLAIN)
    fresh = optimizer.state_dict()
    with optimizer.measure():
        _steep(parameter)
    _steep(parameter)
    optimizer.step()
    optimizer.step()  # nothing came
    assert optimizer.norm is not None
    assert float(optimizer.norm) == pytest.approx(200)
    assert not optimizer.needs_measure
    optimizer.load_state_dict(fresh)
    assert optimizer.needs_measure


def test_restarting_does_not_repeat_the_noise() -> None:
    """bf16 weights of 1 that 400 updates of 2⁻¹¹ move by .195: each by itself, if every update has its own noise."""
    parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = RuleOptimizer([parameter], SGD(), rounding="stochastic", lr=2.0**-11, weight_decay=0.0)
    for _ in range(400):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.restart()
    moved = 1 - parameter.detach().float()
    assert float(moved.mean()) == pytest.approx(400 * 2**-11, abs=0.01)
    assert float(moved.std()) < 0.06


def test_held_gradients_of_an_expert_that_the_last_part_does_not_use() -> None:
    ends = []
    for in_backward in (False, True):
        experts = nn.ParameterList([torch.ones(3), torch.ones(3)])
        optimizer = optim.build(Lomo(lr=0.1, in_backward=in_backward, accumulate="hold"), experts)
        assert isinstance(optimizer, RuleOptimizer)
        if in_backward:
            with optimizer.hold():
                (experts[0].sum() + 2 * experts[1].sum()).backward()
        else:
            (experts[0].sum() + 2 * experts[1].sum()).backward()
        experts[1].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ends.append([expert.detach().clone() for expert in experts])
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


def test_options_that_a_library_would_ignore_are_refused() -> None:
    with pytest.raises(ValueError, match="Muon takes no max_norm"):
        optim.build(Muon(), nn.ModuleList([nn.Linear(2, 2)]), max_norm=1.0)


def test_lazy_states_are_those_of_the_pieces_that_are_adopted() -> None:
    """As DeepSpeed does it: a flat piece in the place of the parameters, the groups stepped through one by one."""
    weights = [nn.Parameter(torch.full((2, 2), float(n))) for n in (1, 2)]
    plain = RuleOptimizer([{"params": [w.detach().clone().requires_grad_()], "lr": lr} for w, lr in
                           zip(weights, (0.1, 0.2), strict=True)], Lion(), betas=(0.9, 0.99), **PLAIN)
    lazy = RuleOptimizer([{"params": [w], "lr": lr} for w, lr in zip(weights, (0.1, 0.2), strict=True)], Lion(),
                         lazy=True, betas=(0.9, 0.99), **PLAIN)
    assert not lazy.state
    pieces = [nn.Parameter(weight.detach().flatten()) for weight in weights]
    for index, (group, piece) in enumerate(zip(lazy.param_groups, pieces, strict=True)):
        group["params"] = [piece]
        lazy.adopt(piece, index)
    assert [entries["m"].shape for entries in lazy.state.values()] == [(4,), (4,)]
    for _ in range(2):
        groups = lazy.param_groups
        for group, piece in zip(groups, pieces, strict=True):
            _steep(piece)
            lazy.param_groups = [group]
            lazy.step()
            piece.grad = None
        lazy.param_groups = groups
        for group in plain.param_groups:
            _steep(group["params"][0])
        plain.step()
        plain.zero_grad()
    for group, piece in zip(plain.param_groups, pieces, strict=True):
        torch.testing.assert_close(piece.detach(), group["params"][0].detach().flatten(), atol=0, rtol=0)
