"""The conformance suite of update rules: call `check_rule` for a new one, those of `shards.py` on several ranks.

Every check takes a rule and all its hyper-parameters (`lr` and `weight_decay` among them), and raises
AssertionError where the rule, or the optimizer with it, breaks a promise. That the formula is the right one, no
suite can know: compare with the paper or another implementation.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from collie_lab.optim import Rule, RuleOptimizer
from collie_lab.optim.rounding import ROUNDINGS

__all__ = [
    "Sample", "check_engine", "check_hyper_parameters", "check_nan_shows", "check_parameters_without_gradient",
    "check_resume", "check_rule", "check_scheduler", "check_step_equals_in_backward", "check_zero_gradients",
]

Hyper = Mapping[str, Any]

KINDS: tuple[tuple[torch.dtype, str | None], ...] = (
    (torch.float32, None), (torch.float64, None), *[(torch.bfloat16, rounding) for rounding in ROUNDINGS])
"""All types of weights, and how those of bf16 are kept."""


class Sample(nn.Module):
    """A small network with all that optimizers trip over.

    A tied weight, a frozen one, one that gets no gradient, rows without gradient (unseen tokens), and trained
    parameters of 0 to 3 dimensions.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0):
        super().__init__()
        source = torch.Generator().manual_seed(seed)

        def parameter(*shape: int, trained: bool = True) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=source).to(dtype), requires_grad=trained)

        self.embedding = parameter(11, 6)  # input and output
        self.experts = parameter(3, 6, 5)
        self.bias = parameter(5)
        self.frozen = parameter(5, 6, trained=False)
        self.scale = parameter()
        self.unused = parameter(4, 2)

    @override
    def forward(self, step: int) -> Tensor:
        """The loss on the batch of a step; tokens 9 and 10 are in none."""
        ids = torch.randint(9, (2, 8), generator=torch.Generator().manual_seed(100 + step))
        hidden = torch.einsum("ni,eij->nj", self.embedding[ids[0]], self.experts) + self.bias
        hidden = torch.tanh(hidden) @ self.frozen * self.scale
        return nn.functional.cross_entropy((hidden @ self.embedding.T).float(), ids[1])


def check_rule(rule: Rule, hyper: Hyper) -> None:
    """All checks that need one process and no compiler."""
    check_hyper_parameters(rule, hyper)
    for dtype, rounding in KINDS:
        check_step_equals_in_backward(rule, hyper, dtype, rounding)
        check_resume(rule, hyper, dtype, rounding)
    check_zero_gradients(rule, hyper)
    check_nan_shows(rule, hyper)
    check_parameters_without_gradient(rule, hyper)
    check_scheduler(rule, hyper)


def check_hyper_parameters(rule: Rule, hyper: Hyper) -> None:
    """One that is unknown, or missing, raises TypeError; so does an unknown one in a group."""
    weight = nn.Parameter(torch.ones(2))
    RuleOptimizer([weight], rule, **hyper)
    _raises_type_error([weight], rule, {**hyper, "no_such_number": 1.0})
    _raises_type_error([{"params": [weight], "no_such_number": 1.0}], rule, hyper)
    for name in hyper:
        _raises_type_error([weight], rule, {key: value for key, value in hyper.items() if key != name})


def check_step_equals_in_backward(rule: Rule, hyper: Hyper, dtype: torch.dtype = torch.float32,
                                  rounding: str | None = None) -> None:
    """Updates inside the backward pass give, bit for bit, what `step` gives; what is frozen stays."""
    ends = []
    for in_backward in (False, True):
        model = Sample(dtype)
        optimizer = _optimizer(model, rule, hyper, rounding=rounding, in_backward=in_backward)
        _train(model, optimizer, range(4))
        assert torch.equal(model.frozen, Sample(dtype).frozen), "a frozen parameter moved"
        ends.append((model, optimizer))
    _assert_same(*ends[0], *ends[1], "step and in-backward")
    assert not torch.equal(ends[0][0].scale, Sample(dtype).scale) or dtype == torch.bfloat16, "nothing moved"


def check_resume(rule: Rule, hyper: Hyper, dtype: torch.dtype = torch.float32, rounding: str | None = None) -> None:
    """A new optimizer with the saved state goes on bit for bit; its states are fp32 or wider, its groups live."""
    model, other = Sample(dtype), Sample(dtype, seed=1)
    optimizer = _optimizer(model, rule, hyper, rounding=rounding)
    _train(model, optimizer, range(3))
    for state in optimizer.state.values():
        for name, value in state.items():
            if name not in ("step", "start", "compensation"):
                assert value.dtype == torch.promote_types(dtype, torch.float32), f"state {name} is {value.dtype}"
    other.load_state_dict(model.state_dict())
    resumed = _optimizer(other, rule, hyper, rounding=rounding, in_backward=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _assert_same(model, optimizer, other, resumed, "the saved and the loaded optimizer")
    _train(model, optimizer, range(3, 6))
    _train(other, resumed, range(3, 6))
    _assert_same(model, optimizer, other, resumed, "going on and resuming")
    resumed.param_groups[0].update(lr=0.0, weight_decay=0.0)
    before = [weight.detach().clone() for weight in other.parameters()]
    _train(other, resumed, range(6, 7))
    for old, new in zip(before, other.parameters(), strict=True):
        # With more digits than it shows, a weight halfway between two numbers may yet be rounded to the other.
        tolerance = 2**-7 if rounding == "kahan" else 0.0
        torch.testing.assert_close(new.detach(), old, rtol=tolerance, atol=0.0, msg=lambda text: (
            f"a learning rate of 0, set after load_state_dict, has no effect: {text}"))


def check_zero_gradients(rule: Rule, hyper: Hyper) -> None:
    """Gradients that are 0, in part or throughout, first or later, and weights of 0 leave all weights finite."""
    for shape, zero_weight, in_order in itertools.product(
            [(), (3,), (4, 3), (1, 5), (2, 4, 3)], (False, True), ((0, 1, 2, 0), (2, 1, 0, 2))):
        source = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.zeros(shape) if zero_weight else torch.randn(shape, generator=source))
        optimizer = RuleOptimizer([weight], rule, **hyper)
        for kind in in_order:  # all zero; the first row zero; not zero
            gradient = torch.randn(shape, generator=source) * (kind > 0)
            if kind == 1 and gradient.ndim:
                gradient.select(max(0, gradient.ndim - 2), 0).zero_()
            weight.grad = gradient
            optimizer.step()
            assert weight.isfinite().all(), f"weights of shape {shape} are no longer finite"


def check_nan_shows(rule: Rule, hyper: Hyper) -> None:
    """NaN in a gradient reaches the weight, where a loop sees it; `torch.sign` would hide it."""
    for engine in ("auto", "eager"):
        weight = nn.Parameter(torch.ones(3, 4))
        optimizer = RuleOptimizer([weight], rule, engine=engine, **hyper)
        weight.grad = torch.ones(3, 4)
        weight.grad[1, 2] = torch.nan
        optimizer.step()
        assert weight[1, 2].isnan(), f"{type(rule).__name__} hides NaN ({engine})"


def check_parameters_without_gradient(rule: Rule, hyper: Hyper) -> None:
    """What has no gradient is not touched, not even by weight decay, and its steps do not count."""
    for in_backward in (False, True):
        model = Sample()
        optimizer = _optimizer(model, rule, hyper, in_backward=in_backward)
        _train(model, optimizer, range(2))
        assert torch.equal(model.unused, Sample().unused), "a parameter without gradient moved"
        assert optimizer.state[model.unused]["step"] == 0
        assert optimizer.state[model.bias]["step"] == 2
        assert model.frozen not in optimizer.state, "a frozen parameter takes memory"


def check_scheduler(rule: Rule, hyper: Hyper) -> None:
    """torch's schedulers set the learning rate that updates use, group by group."""
    ends = []
    for scheduled in (True, False):
        model = Sample()
        groups = [{"params": [model.experts, model.bias]}, {"params": [model.scale], "lr": 3 * hyper["lr"]}]
        optimizer = RuleOptimizer(groups, rule, in_backward=scheduled, **hyper)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) if scheduled else None
        for step in range(3):
            if schedule is None:
                for group, peak in zip(optimizer.param_groups, (hyper["lr"], 3 * hyper["lr"]), strict=True):
                    group["lr"] = peak * (1 / (1 + step))
            model(step).backward()
            optimizer.step()
            optimizer.zero_grad()
            if schedule is not None:
                schedule.step()
        ends.append((model, optimizer))
    _assert_same(*ends[0], *ends[1], "a scheduler and the same learning rates set by hand")


def check_engine(rule: Rule, hyper: Hyper, engine: str, kinds: Iterable[tuple[torch.dtype, str | None]] = KINDS, *,
                 clipped: bool = True, steps: int = 3, device: str = "cpu", truncates: bool = False) -> None:
    """An engine agrees with the eager one; compile takes some 10 s for each kind, triton needs CUDA or its interpreter.

    Weights of fp32 agree to rounding (2e-6 for weights of size 1). In bf16 a difference in the last bit of the
    computation may now and then round to the neighbouring number, no further. `truncates`: the engine cuts fp32 to
    bf16 where hardware rounds (Triton's interpreter does): then more weights may be that neighbour.
    """
    # Above 4096 elements: the compiled engine leaves smaller ones to the eager engine.
    shapes = [(65, 67), (4099,), (2, 64, 65), (1, 5), (7, 1), (3,), ()]
    options: dict[str, Any] = {"max_norm": 20.0, "max_value": 0.3} if clipped else {}
    for dtype, rounding in kinds:
        sides = []
        for name in ("eager", engine):
            source = torch.Generator().manual_seed(0)
            weights = [nn.Parameter(torch.randn(shape, generator=source).to(device, dtype)) for shape in shapes]
            optimizer = RuleOptimizer(weights, rule, engine=name, rounding=rounding, **options, **hyper)
            for _ in range(steps):
                for weight in weights:
                    weight.grad = torch.randn(weight.shape, generator=source).to(device, dtype)
                optimizer.step()
            sides.append((weights, optimizer))
        (ones, first), (others, second) = sides
        for one, other in zip(ones, others, strict=True):
            _assert_near(one, other, f"eager and {engine}, {dtype} {rounding}, {tuple(one.shape)}",
                         everywhere=truncates and rounding in ("kahan", "master"))
            for name, state in first.state[one].items():
                where = f"state {name}: eager and {engine}, {dtype}"
                if name == "compensation":  # right together with the weight
                    precision = 2**-13 if truncates else 2**-15
                    kept = one.detach().float() + state.float()
                    also = other.detach().float() + second.state[other][name].float()
                    assert torch.allclose(kept, also, rtol=precision, atol=precision), where
                else:
                    _assert_near(state, second.state[other][name], where)


def _assert_near(one: Tensor, other: Tensor, what: str, *, everywhere: bool = False) -> None:
    assert one.dtype == other.dtype, what
    tolerance = {torch.bfloat16: 2**-7, torch.float64: 1e-12}.get(one.dtype, 2e-6)
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")
    if one.dtype == torch.bfloat16 and not everywhere:
        # Of a number, one difference; of thousands, one in a hundred.
        assert (one != other).sum() <= 1 + one.numel() // 100, f"{what}: too many weights differ"


def _optimizer(model: nn.Module, rule: Rule, hyper: Hyper, **options: Any) -> RuleOptimizer:
    return RuleOptimizer(model.parameters(), rule, **options, **hyper)


def _train(model: nn.Module, optimizer: RuleOptimizer, steps: Iterable[int]) -> None:
    for step in steps:
        model(step).backward()
        optimizer.step()
        optimizer.zero_grad()


def _assert_same(model: nn.Module, optimizer: RuleOptimizer, other: nn.Module, another: RuleOptimizer,
                 what: str) -> None:
    """Weights and states of two runs are the same bit for bit."""
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), f"{what} differ in {name}"
        one_state, two_state = optimizer.state.get(one, {}), another.state.get(two, {})
        assert one_state.keys() == two_state.keys(), f"{what}: states of {name}"
        for key, value in one_state.items():
            assert torch.equal(value, two_state[key]), f"{what} differ in state {key} of {name}"


def _raises_type_error(params: Any, rule: Rule, hyper: Hyper) -> None:
    try:
        RuleOptimizer(params, rule, **hyper)
    except TypeError:
        return
    raise AssertionError(f"{type(rule).__name__}: no TypeError for {sorted(hyper)}")
