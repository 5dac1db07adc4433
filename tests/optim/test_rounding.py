"""bf16 weights: small updates are not lost, rounding is right on average, and its noise is a function of the place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from collie_lab.optim import SGD, RuleOptimizer
from collie_lab.optim.rounding import ROUNDINGS, Weight, hash32, nearest, noise_keys, wrap32

SIZE, STEPS, LR = 20_000, 300, 1e-5


def _key(seed: int, step: int, parameter: int) -> int:
    return int(noise_keys(seed, np.array([step], dtype=np.uint64), np.array([parameter], dtype=np.uint64))[0])


def _weights() -> tuple[Tensor, Tensor]:
    """Weights, and a gradient of one sign by which 300 steps move each by .003 at most."""
    source = torch.Generator().manual_seed(0)
    return torch.randn(SIZE, generator=source).bfloat16(), torch.rand(SIZE, generator=source).bfloat16()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_small_updates_are_not_lost(rounding: str) -> None:
    start, gradient = _weights()
    weight = nn.Parameter(start.clone())
    optimizer = RuleOptimizer([weight], SGD(), lr=LR, weight_decay=0.0, rounding=rounding)
    for _ in range(STEPS):
        weight.grad = gradient
        optimizer.step()
    state = optimizer.state[weight]
    # With a master or a compensation, the weight is what both hold together.
    kept = state["master"] if rounding == "master" else weight.detach().float() + state.get("compensation", 0)
    moved = (start.double() - kept.double()).sum()
    assert abs(moved / (STEPS * LR * gradient.double().sum()) - 1) < 0.01
    if rounding == "master":
        assert torch.equal(weight, kept.bfloat16())


def test_rounding_to_nearest_loses_most() -> None:
    start, gradient = _weights()
    weight = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([weight], lr=LR)
    for _ in range(STEPS):
        weight.grad = gradient
        optimizer.step()
    moved = (start.double() - weight.detach().double()).sum()
    assert moved / (STEPS * LR * gradient.double().sum()) < 0.5


@pytest.mark.parametrize("sign", [1, -1])
def test_stochastic_rounding_is_unbiased(sign: int) -> None:
    count = 1_000_000
    for share in (0.01, 0.3, 0.9):  # of the way from 1 to the next number
        stored = torch.empty(count, dtype=torch.bfloat16)
        value = sign * (1 + share * 2**-7)
        Weight(stored, "stochastic", noise=_key(0, 1, 2)).write(torch.full((count,), value))
        assert set(stored.abs().tolist()) == {1.0, 1 + 2**-7}
        # Four standard deviations of a mean of independent draws.
        error = 4 * (share * (1 - share) / count) ** 0.5 * 2**-7
        assert abs(stored.double().mean().item() - value) < error


def test_neighbours_and_steps_have_unrelated_noise() -> None:
    def noise(step: int, parameter: int) -> Tensor:
        index = torch.arange(100_000, dtype=torch.int32) + wrap32(_key(0, step, parameter))
        return (hash32(index) & 0xFFFF).double()

    base = noise(1, 0)
    for other in (base.roll(1), base.roll(4096), noise(2, 0), noise(1, 1)):
        assert abs(torch.corrcoef(torch.stack([base, other]))[0, 1]) < 0.02
    counts = torch.bincount((base / 2**12).long(), minlength=16).double()
    assert ((counts - 6250).square() / 6250).sum() < 45  # chi², 15 degrees of freedom: p < 1e-4


def test_the_hash_is_lowbias32() -> None:
    """Against the published function on unsigned numbers."""
    def reference(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    numbers = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1]
    hashed = hash32(torch.tensor([wrap32(number) for number in numbers], dtype=torch.int32))
    assert [value % 2**32 for value in hashed.tolist()] == [reference(number) for number in numbers]


def test_keys_differ() -> None:
    steps, parameters = (np.array(numbers, dtype=np.uint64).flatten() for numbers in np.mgrid[:100, :100])
    keys = {key for seed in range(3) for key in noise_keys(seed, steps, parameters).tolist()}
    assert len(keys) > 29_900  # 30 000 draws from 2³² hardly ever meet
    assert all(0 <= key < 2**32 for key in keys)


def test_keys_are_those_of_splitmix64() -> None:
    def reference(*numbers: int) -> int:
        x = 0
        for number in numbers:
            x = (x + number + 0x9E3779B97F4A7C15) % 2**64
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
            x ^= x >> 31
        return x % 2**32

    for numbers in ((0, 1, 0), (5, 1000, 2**32 - 1), (2**40, 3, 77)):
        assert _key(*numbers) == reference(*numbers)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_is_not_finite_stays_so(rounding: str) -> None:
    value = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0])
    # NaN of all bits: noise added to it would overflow.
    value = torch.cat([value, torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)])
    for noise in range(50):
        weight = _weight(torch.empty(len(value), dtype=torch.bfloat16), rounding, noise * 1000)
        weight.write(value)
        torch.testing.assert_close(weight.tensor.float(), value, rtol=0, atol=0, equal_nan=True)
        assert weight.tensor[4].signbit()


def test_nearest_is_the_cast() -> None:
    bits = torch.arange(2**16, dtype=torch.int32)[:, None] << 16
    value = (bits + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)).view(torch.float32)
    torch.testing.assert_close(nearest(value), value.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    assert nearest(torch.tensor(-0.0)).signbit()


@pytest.mark.parametrize(("rounding", "digits"), [("stochastic", 7), ("kahan", 15), ("master", 24)])
def test_write_and_read(rounding: str, digits: int) -> None:
    value = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    weight = _weight(torch.empty(len(value), dtype=torch.bfloat16), rounding)
    weight.write(value)
    assert ((weight.read() - value).abs() <= 2.0**-digits * value.abs()).all()
    if rounding != "stochastic":
        assert torch.equal(weight.tensor, value.bfloat16())
    if rounding == "master":
        assert torch.equal(weight.read(), value)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_parts_are_rounded_as_the_whole(rounding: str) -> None:
    value = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    whole, parts, matrices, flat = (_weight(torch.zeros(3, 4, 5, dtype=torch.bfloat16), rounding, 77) for _ in range(4))
    whole.write(value)
    parts.part(0, 1).write(value[:1])
    parts.part(1, 3).write(value[1:])
    for index in range(3):
        matrices.at((index,)).part(0, 2).write(value[index, :2])
        matrices.at((index,)).part(2, 4).write(value[index, 2:])
    flat.flat().write(value.view(-1))
    for other in (parts, matrices, flat):
        assert torch.equal(whole.tensor, other.tensor)
        assert torch.equal(whole.read(), other.read())


def test_the_seed_decides() -> None:
    start, gradient = _weights()
    ends = []
    for seed in (1, 1, 2):
        weight = nn.Parameter(start.clone())
        optimizer = RuleOptimizer([weight], SGD(), lr=LR, weight_decay=0.0, rounding="stochastic",
                                  seed=seed)
        weight.grad = gradient
        optimizer.step()
        ends.append(weight.detach())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_freezing_one_parameter_leaves_the_noise_of_others() -> None:
    start, gradient = _weights()
    ends = []
    for trained in (True, False):
        first, second = nn.Parameter(torch.ones(3), requires_grad=trained), nn.Parameter(start.clone())
        optimizer = RuleOptimizer([first, second], SGD(), lr=LR, weight_decay=0.0, rounding="stochastic")
        second.grad = gradient
        optimizer.step()
        ends.append(second.detach())
    assert torch.equal(*ends)


def _weight(tensor: Tensor, rounding: str, noise: int = 0) -> Weight:
    extra = {"stochastic": None, "kahan": torch.zeros_like(tensor), "master": torch.zeros_like(tensor).float()}
    return Weight(tensor, rounding, extra[rounding], noise)
