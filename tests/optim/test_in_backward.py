"""Updates inside the backward pass: memory, clipping, accumulation, and what has to be refused."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from collie_lab import cells
from collie_lab.optim import SGD, AdamW, Lion, Rule, RuleOptimizer, build
from collie_lab.optim.engine import Eager
from collie_lab.testing.optimizers import KINDS, Sample, check_step_equals_in_backward
from tests.optim.rules import RULES
from tests.ranks import run_ranks

PLAIN: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}


# --- memory -------------------------------------------------------------------------------------------


def test_one_gradient_lives_at_a_time() -> None:
    """In the largest moment, all gradients together are no larger than the largest parameter."""
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    sizes: dict[bool, int] = {}
    for in_backward in (True, False):
        parameters = list(layers.parameters())
        living: list[int] = []

        def look(_: Tensor, parameters: list[nn.Parameter] = parameters, living: list[int] = living) -> None:
            living.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))

        # Registered first, so that it sees each gradient before the optimizer frees it.
        handles = [parameter.register_post_accumulate_grad_hook(look) for parameter in parameters]
        optimizer = RuleOptimizer(parameters, SGD(), in_backward=in_backward, **PLAIN)
        layers(torch.randn(2, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert len(living) == len(parameters)
        sizes[in_backward] = max(living)
        for handle in handles:
            handle.remove()
        if in_backward:  # its own hooks go with the parameters' hook table
            for parameter in parameters:
                parameter._post_accumulate_grad_hooks.clear()  # type: ignore[attr-defined]
    assert sizes[True] == 64 * 64 * 4
    assert sizes[False] == 8 * (64 * 64 + 64) * 4


class _Together(Eager):
    """An engine that would rather have many at once, as a GPU's."""

    together: ClassVar[bool] = True
    sizes: ClassVar[list[int]] = []

    def elementwise_all(self, formula: Any, updates: Any, scalars: Any) -> None:
        self.sizes.append(len(updates))
        super().elementwise_all(formula, updates, scalars)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each update took, with an engine that takes many."""
    monkeypatch.setattr("collie_lab.optim.optimizer.choose_engine", lambda name, device: _Together(device))
    monkeypatch.setattr("collie_lab.optim.waves._SMALL", 0)
    _Together.sizes.clear()
    return _Together.sizes


def test_gradients_that_wait_take_no_more_than_the_largest(together: list[int]) -> None:
    """From the second step on, when the order is known; and the backward pass leaves none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(100, 16), *(nn.Linear(16, 16) for _ in range(9)), nn.Linear(16, 3))
    reference = copy.deepcopy(model)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def look(parameter: Tensor) -> None:
        nonlocal most
        assert parameter.grad is not None
        alive.append(weakref.ref(parameter.grad))
        most = max(most, sum(gradient.nbytes for each in alive if (gradient := each()) is not None))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    optimizers = [RuleOptimizer(each.parameters(), Lion(), in_backward=each is model, betas=(0.9, 0.99), **PLAIN)
                  for each in (model, reference)]
    for _ in range(3):
        most = 0
        together.clear()
        for each, optimizer in zip((model, reference), optimizers, strict=True):
            each(torch.arange(7)).square().sum().backward()
            if each is model:
                assert not any(gradient() is not None for gradient in alive)
                passes = list(together)
            optimizer.step()
            optimizer.zero_grad()
    assert most == 100 * 16 * 4
    assert sum(passes) == 21
    assert len(passes) <= 5
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("name", RULES)
def test_updates_together_are_those_one_by_one(name: str, together: list[int]) -> None:
    for dtype, rounding in KINDS:
        check_step_equals_in_backward(*RULES[name], dtype, rounding)


def test_a_backward_pass_that_fails_takes_its_updates_along(together: list[int]) -> None:
    """Its gradients were complete: they count, as they do when each is taken at once."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    optimizer = RuleOptimizer(model.parameters(), SGD(), in_backward=True, **PLAIN)
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    before = model[2].weight.detach().clone()
    first = model[0].weight.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(4)).sum().backward()
    first.remove()
    optimizer.step()
    assert not torch.equal(model[2].weight, before)


def test_what_waits_after_a_failure_does_not_reach_restored_weights(together: list[int]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    optimizer = RuleOptimizer(model.parameters(), SGD(), in_backward=True, **PLAIN)
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    first = model[0].weight.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(4)).sum().backward()
    first.remove()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    optimizer.step()
    assert all(torch.equal(weight, saved[0][name]) for name, weight in model.state_dict().items())


def test_a_dropped_optimizer_is_missed() -> None:
    model = nn.Linear(2, 2)
    RuleOptimizer(model.parameters(), SGD(), in_backward=True, **PLAIN)
    gc.collect()
    with pytest.warns(UserWarning, match="an optimizer in backward is gone"):
        model(torch.ones(2)).sum().backward()


def test_an_optimizer_goes_with_its_model() -> None:
    def train() -> list[weakref.ref[Any]]:
        model = nn.Linear(8, 8)
        optimizer = RuleOptimizer(model.parameters(), AdamW(), in_backward=True, betas=(0.9, 0.99), eps=1e-8, **PLAIN)
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        return [weakref.ref(each) for each in (model.weight, optimizer, optimizer.state[model.weight]["m"])]

    left = train()
    gc.collect()
    assert [each() for each in left] == [None, None, None]


def test_memory_of_a_backward_pass() -> None:
    """As the allocator sees it: the peak of backward is several gradients lower than with all of them kept."""
    size, count = 512, 8
    peaks = []
    for in_backward in (True, False):
        layers = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(count)))
        optimizer = RuleOptimizer(layers.parameters(), SGD(), in_backward=in_backward, engine="eager", **PLAIN)
        loss = layers(torch.randn(1, size)).sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            loss.backward()
        optimizer.step()
        total = peak = 0
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            total += event.nbytes()
            peak = max(peak, total)
        peaks.append(peak)
    gradient = size * size * 4
    assert peaks[1] >= count * gradient
    assert peaks[0] <= 3 * gradient  # one, and the temporaries of its update


# --- clipping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sgd", "adamw", "adalomo"])
def test_two_passes_clip_as_step_does(name: str, dtype: torch.dtype) -> None:
    rule, hyper = RULES[name]
    ends = []
    for in_backward in (False, True):
        model = Sample(dtype)
        optimizer = RuleOptimizer(model.parameters(), rule, in_backward=in_backward, max_norm=0.1, max_value=0.02,
                                  **hyper)
        norms = []
        for step in range(3):
            assert optimizer.needs_measure == in_backward
            if in_backward:
                with optimizer.measure():
                    model(step).backward()
            model(step).backward()
            optimizer.step()
            optimizer.zero_grad()
            norms.append(optimizer.norm)
        ends.append([*model.parameters(), *norms])
    for one, two in zip(*ends, strict=True):
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)


def test_clipping_is_that_of_torch() -> None:
    one, two = Sample(torch.float64), Sample(torch.float64)
    ours = RuleOptimizer(one.parameters(), AdamW(), max_norm=0.1, lr=0.01, betas=(0.9, 0.999), eps=1e-8,
                         weight_decay=0.1)
    trained = [parameter for parameter in two.parameters() if parameter.requires_grad]
    theirs = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    for step in range(5):
        one(step).backward()
        ours.step()
        ours.zero_grad()
        two(step).backward()
        norm = nn.utils.clip_grad_norm_(trained, 0.1)
        theirs.step()
        theirs.zero_grad()
        assert ours.norm is not None
        assert norm > 0.1
        torch.testing.assert_close(ours.norm, norm)
    for expected, actual in zip(two.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_previous_norm() -> None:
    """By the norm of the step before; the first by its own. θ ← θ − min(1, c/(‖g‖+1e-6))·g."""
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8]), torch.tensor([30.0, 40.0])]
    weight, expected = nn.Parameter(torch.zeros(2)), torch.zeros(2)
    hyper = {**PLAIN, "lr": 1.0, "weight_decay": 0.0}
    optimizer = RuleOptimizer([weight], SGD(), in_backward=True, max_norm=2.0, clip_by="previous_norm", **hyper)
    for step, gradient in enumerate(gradients):
        assert optimizer.needs_measure == (step == 0)
        if step == 0:
            with optimizer.measure():
                (weight * gradient).sum().backward()
        if step == 2:  # it survives a checkpoint
            saved = optimizer.state_dict()
            old, weight = weight, nn.Parameter(weight.detach().clone())
            optimizer = RuleOptimizer([weight], SGD(), in_backward=True, max_norm=2.0, clip_by="previous_norm", **hyper)
            optimizer.load_state_dict(saved)
            assert not optimizer.needs_measure
            assert old is not weight
        (weight * gradient).sum().backward()
        optimizer.step()
        known = gradients[max(0, step - 1)].norm()
        expected = expected - gradient * min(1.0, 2.0 / (known + 1e-6))
        torch.testing.assert_close(weight.detach(), expected)
        assert optimizer.norm is not None
        torch.testing.assert_close(optimizer.norm, gradient.norm())


def test_largest_value() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = RuleOptimizer([weight], SGD(), in_backward=True, max_value=0.5, **{**PLAIN, "lr": 1.0})
    (weight * torch.tensor([2.0, -3.0, 0.25])).sum().backward()
    optimizer.step()
    assert weight.tolist() == [-0.5, 0.5, -0.25]


def test_clipping_without_the_norm_raises() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = RuleOptimizer([weight], SGD(), in_backward=True, max_norm=1.0, **PLAIN)
    with pytest.raises(RuntimeError, match="measure"):
        weight.sum().backward()
    with optimizer.measure():
        weight.grad = None
        weight.sum().backward()
    weight.sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="measure"):  # the norm of one step does not serve the next
        weight.sum().backward()


def test_a_measuring_pass_that_failed_leaves_nothing() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = RuleOptimizer([first, second], SGD(), in_backward=True, max_norm=1.0, **PLAIN)
    with pytest.raises(KeyboardInterrupt), optimizer.measure():
        first.sum().backward()
        raise KeyboardInterrupt
    with optimizer.measure():
        (first.sum() + second.sum()).backward()
    assert optimizer.norm is not None
    assert optimizer.norm.item() == pytest.approx(2.0)


@pytest.mark.parametrize("options", [{"in_backward": True}, {"max_norm": 1.0}])
def test_measuring_what_needs_no_measure_raises(options: dict[str, Any]) -> None:
    optimizer = RuleOptimizer([nn.Parameter(torch.ones(2))], SGD(), **options, **PLAIN)
    with pytest.raises(ValueError, match="measure"), optimizer.measure():
        pass


# --- more than one gradient a step --------------------------------------------------------------------


def test_a_second_gradient_raises() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = RuleOptimizer([weight], SGD(), in_backward=True, **PLAIN)
    weight.sum().backward()
    with pytest.raises(RuntimeError, match="second gradient"):
        weight.sum().backward()
    weight.grad = None
    optimizer.step()
    weight.sum().backward()


@pytest.mark.parametrize("name", ["sgd", "lion", "adalomo"])
def test_held_gradients_are_accumulated_ones(name: str) -> None:
    rule, hyper = RULES[name]
    ends = []
    for in_backward in (False, True):
        model = Sample()
        optimizer = RuleOptimizer(model.parameters(), rule, in_backward=in_backward, accumulate="hold", **hyper)
        for step in range(3):
            for part in range(3):
                loss = model(10 * step + part) / 3
                if in_backward and part < 2:
                    with optimizer.hold():
                        loss.backward()
                else:
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(list(model.parameters()))
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


def test_what_is_held_to_the_end_is_not_lost() -> None:
    weight, whole = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = RuleOptimizer([weight], SGD(), in_backward=True, accumulate="hold", **PLAIN)
    reference = RuleOptimizer([whole], SGD(), **PLAIN)
    with optimizer.hold():
        weight.sum().backward()
    whole.sum().backward()
    optimizer.step()
    reference.step()
    assert torch.equal(weight, whole)
    assert weight.grad is None


def test_updates_with_each_part_are_the_update_with_the_sum() -> None:
    """For a loss that is linear in the weights, where later parts do not see that they have moved."""
    parts = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, whole = nn.Parameter(torch.ones(5, dtype=torch.float64)), nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = RuleOptimizer([weight], SGD(), in_backward=True, accumulate="each", **PLAIN)
    reference = RuleOptimizer([whole], SGD(), **PLAIN)
    for _ in range(2):
        for part in parts:
            (weight * part).sum().backward()
            (whole * part).sum().backward()
        optimizer.step()
        reference.step()
        reference.zero_grad()
    torch.testing.assert_close(weight, whole, rtol=0, atol=1e-15)
    assert optimizer.state[weight]["step"] == 2


def test_parts_are_rounded_independently() -> None:
    """Four parts with one noise would move few weights by four numbers each, instead of more by one."""
    weight = nn.Parameter(torch.ones(50_000, dtype=torch.bfloat16))
    optimizer = RuleOptimizer([weight], SGD(), in_backward=True, accumulate="each", rounding="stochastic",
                              **{**PLAIN, "lr": 1.0, "weight_decay": 0.0})
    for _ in range(4):
        (weight * (-0.1 * 2**-7)).sum().backward()
    optimizer.step()
    numbers = ((weight.detach().double() - 1) * 2**7).round()
    for moved in range(3):  # binomial, four draws of .1 (as bf16 has it)
        expected = [0.6561, 0.2916, 0.0486][moved]
        assert abs((numbers == moved).double().mean() - expected) < 0.01


@pytest.mark.parametrize("rule", [Lion(), AdamW(), SGD(momentum=True)])
def test_parts_are_refused_for_what_is_not_linear(rule: Rule) -> None:
    hyper = next(hyper for known, hyper in RULES.values() if known == rule)
    with pytest.raises(ValueError, match="not linear"):
        RuleOptimizer([nn.Parameter(torch.ones(2))], rule, in_backward=True, accumulate="each", **hyper)


@pytest.mark.parametrize("options", [
    {"accumulate": "each", "max_norm": 1.0}, {"accumulate": "hold", "max_norm": 1.0},
    {"accumulate": "each", "max_value": 1.0}, {"rounding": "nearest"},
])
def test_wrong_combinations_raise(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        RuleOptimizer([nn.Parameter(torch.ones(2))], SGD(), in_backward=True, **options, **PLAIN)


def test_a_parameter_unfrozen_later_raises() -> None:
    weight, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = RuleOptimizer([weight, late], SGD(), in_backward=True, **PLAIN)
    late.requires_grad_(True)
    (weight * late).sum().backward()
    with pytest.raises(RuntimeError, match="a gradient was left"):
        optimizer.step()


# --- checkpointing ------------------------------------------------------------------------------------


def _shared_weight(use_reentrant: bool, in_backward: bool) -> tuple[nn.Linear, Callable[[], None]]:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    optimizer = RuleOptimizer(layer.parameters(), SGD(), in_backward=in_backward, **PLAIN)

    def step() -> None:
        hidden = torch.ones(2, 4, requires_grad=True)
        for _ in range(2):
            hidden = checkpoint(layer, hidden, use_reentrant=use_reentrant)
        hidden.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return layer, step


def test_checkpointing_of_a_shared_weight() -> None:
    (one, first), (two, second) = _shared_weight(False, in_backward=True), _shared_weight(False, in_backward=False)
    first()
    second()
    assert torch.equal(one.weight, two.weight)


def test_reentrant_checkpointing_of_a_shared_weight_raises() -> None:
    _, step = _shared_weight(True, in_backward=True)
    with pytest.raises(RuntimeError, match="second gradient"):
        step()


# --- replicas -----------------------------------------------------------------------------------------


@pytest.mark.ranks
def test_replicas() -> None:
    run_ranks(_replicas, 2)


def _replicas() -> None:
    import torch.distributed as dist

    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="replicas drift apart"):
        RuleOptimizer([weight], SGD(), in_backward=True, **PLAIN)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        build(cells.Lomo(), DistributedDataParallel(nn.Linear(2, 2)), reduce=_mean)
    optimizer = RuleOptimizer([weight], SGD(), in_backward=True, reduce=_mean, record_norm=True, **PLAIN)
    (weight * float(dist.get_rank() + 1)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 1 - 0.1 * 0.1 - 0.1 * 1.5))
    assert optimizer.norm is not None
    torch.testing.assert_close(optimizer.norm, torch.full((3,), 1.5).norm())


def _mean(gradient: Tensor) -> None:
    import torch.distributed as dist

    dist.all_reduce(gradient)
    gradient /= dist.get_world_size()
