"""The part of the conformance suite of update rules that runs on several ranks: shards equal one process.

Each check is called on every rank of a process group (gloo will do). Gradients are prescribed, so that all
ranks and the one process have the very same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from typing_extensions import override

from collie_lab.optim import Rule, RuleOptimizer

__all__ = ["check_fsdp", "check_mesh", "check_tensor_parallel", "is_elementwise"]

Hyper = Mapping[str, Any]

# Rows that two ranks cannot share evenly, and a single one: the second rank's piece is empty.
SHAPES = ((5, 4), (1, 6), (8, 3), (3, 4, 5), (1, 2, 3), (7,), (1,))
EVEN = ((8, 4), (4, 8), (4, 4, 8))


class Prescribed(nn.Module):
    """Parameters whose gradients are given: those of step t are `gradients(t)`."""

    def __init__(self, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype):
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(shape, generator=source).to(dtype) for shape in shapes)

    @override
    def forward(self, step: int) -> Tensor:
        """A loss that is linear in the parameters."""
        source = torch.Generator().manual_seed(100 + step)
        total = torch.zeros(())
        for weight in self.weights:
            gradient = torch.randn(weight.shape, generator=source).to(weight.dtype)
            if isinstance(weight, DTensor):
                placements = [Replicate()] * weight.device_mesh.ndim
                gradient = DTensor.from_local(gradient, weight.device_mesh, placements, run_check=False)
            total = total + _full((weight * gradient).float().sum())
        return total


def is_elementwise(rule: Rule) -> bool:
    """Whether a rule treats every element alike: its states are laid out as their parameter."""
    return type(rule).layout is Rule.layout


def check_fsdp(rule: Rule, hyper: Hyper) -> None:
    """Shards of `fully_shard` end as one process does, in and out of backward, clipped or not; so do their states.

    In fp32 to 1e-6. In bf16 with stochastic rounding bit for bit, for the noise belongs to the place in the whole;
    a rule with sums over shards may round differently now and then.
    """
    for in_backward in (False, True):
        for options in ({}, {"record_norm": True, "max_value": 0.5}):
            _compare(rule, hyper, torch.float32, in_backward, options)
        _compare(rule, hyper, torch.bfloat16, in_backward, {"rounding": "stochastic"})


def check_tensor_parallel(rule: Rule, hyper: Hyper) -> None:
    """Parameters cut along any one dimension, or kept whole with gradients that are partial sums, end the same."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for in_backward in (False, True):
        for dim in (0, 1, None):
            here: list[Placement] = [Replicate() if dim is None else Shard(dim)]
            _compare(rule, hyper, torch.float32, in_backward, {}, lambda model, here=here: _cut(model, mesh, here))
    _check_partial_gradients(rule, hyper, mesh)


def check_mesh(rule: Rule, hyper: Hyper) -> None:
    """FSDP2 over tensor parallelism on four ranks, along the same dimension and along another."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for dim in (0, 1):
        def layout(model: nn.Module, dim: int = dim) -> nn.Module:
            cut = _cut(model, mesh["tp"], [Shard(dim)])
            fully_shard(cut, mesh=mesh["dp"])
            return cut

        for in_backward in (False, True):
            _compare(rule, hyper, torch.float32, in_backward, {"record_norm": True}, layout, EVEN)


def _compare(rule: Rule, hyper: Hyper, dtype: torch.dtype, in_backward: bool, options: Mapping[str, Any],
             layout: Any = fully_shard, shapes: Iterable[tuple[int, ...]] = SHAPES) -> None:
    """Train one model whole and one in a layout, the latter through a checkpoint; compare weights, states, norms."""
    whole, pieces = Prescribed(shapes, dtype), layout(Prescribed(shapes, dtype))
    one = RuleOptimizer(whole.parameters(), rule, **options, **hyper)
    many = RuleOptimizer(pieces.parameters(), rule, in_backward=in_backward, **options, **hyper)
    for step in range(4):
        if step == 2:  # resumed
            for hook in [weight._post_accumulate_grad_hooks for weight in pieces.parameters()]:
                (hook or {}).clear()
            saved = copy.deepcopy(many.state_dict())
            many = RuleOptimizer(pieces.parameters(), rule, in_backward=in_backward, **options, **hyper)
            many.load_state_dict(saved)
        for model, optimizer in ((whole, one), (pieces, many)):
            model(step).backward()
            optimizer.step()
            optimizer.zero_grad()
    exact = dtype == torch.bfloat16 and is_elementwise(rule)
    for expected, weight in zip(whole.parameters(), pieces.parameters(), strict=True):
        _assert_close(expected, weight, exact, f"weights {tuple(expected.shape)}")
        for name, state in one.state[expected].items():
            _assert_close(state, many.state[weight][name], exact, f"state {name} of {tuple(expected.shape)}")
    if one.norm is not None:
        assert many.norm is not None
        _assert_close(one.norm, many.norm, False, "norm")


def _check_partial_gradients(rule: Rule, hyper: Hyper, mesh: DeviceMesh) -> None:
    """A weight on all ranks, of a batch that is cut: its gradient is a partial sum."""
    source = torch.Generator().manual_seed(0)
    value, inputs = torch.randn(6, generator=source), torch.randn(2 * mesh.size(), 6, generator=source)
    expected = nn.Parameter(value.clone())
    whole = RuleOptimizer([expected], rule, record_norm=True, **hyper)
    (inputs * expected).sum().backward()
    whole.step()
    for in_backward in (False, True):
        weight = nn.Parameter(distribute_tensor(value.clone(), mesh, [Replicate()]))
        optimizer = RuleOptimizer([weight], rule, in_backward=in_backward, record_norm=True, **hyper)
        (distribute_tensor(inputs, mesh, [Shard(0)]) * weight).sum().backward()
        optimizer.step()
        _assert_close(expected, weight, False, "a replicated weight with a partial gradient")
        assert whole.norm is not None
        assert optimizer.norm is not None
        _assert_close(whole.norm, optimizer.norm, False, "the norm of a partial gradient")


def _cut(model: nn.Module, mesh: DeviceMesh, placements: list[Placement]) -> nn.Module:
    """The parameters of a `Prescribed` as DTensors; those without the dimension are kept whole."""
    for index, weight in enumerate(model.weights):  # type: ignore[arg-type]
        fits = all(not isinstance(p, Shard) or p.dim < weight.ndim for p in placements)
        whole: list[Placement] = [Replicate()]
        model.weights[index] = nn.Parameter(  # type: ignore[index, operator]
            distribute_tensor(weight.detach(), mesh, placements if fits else whole))
    return model


def _assert_close(expected: Tensor, actual: Tensor, exact: bool, what: str) -> None:
    expected, actual = expected.detach(), _full(actual.detach())
    assert expected.dtype == actual.dtype, what
    assert expected.shape == actual.shape, what
    if exact:
        assert torch.equal(expected, actual), f"{what}: shards and one process differ"
        return
    tolerance = 2**-7 if expected.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
