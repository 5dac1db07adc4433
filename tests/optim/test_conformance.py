"""Every rule passes the conformance suite, in one process and on ranks."""

from __future__ import annotations

import pytest

from collie_lab.testing import optimizers, shards
from tests.optim.rules import RULES
from tests.ranks import run_ranks


@pytest.mark.parametrize("name", RULES)
def test_one_process(name: str) -> None:
    optimizers.check_rule(*RULES[name])


@pytest.mark.ranks
def test_two_ranks() -> None:
    run_ranks(_on_two_ranks, 2)


@pytest.mark.ranks
def test_two_by_two_ranks() -> None:
    run_ranks(_on_four_ranks, 4)


def _on_two_ranks() -> None:
    for rule, hyper in RULES.values():
        shards.check_fsdp(rule, hyper)
    for name in ("adamw", "adalomo"):
        shards.check_tensor_parallel(*RULES[name])


def _on_four_ranks() -> None:
    shards.check_mesh(*RULES["adalomo"])
