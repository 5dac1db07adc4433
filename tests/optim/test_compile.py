"""The compiled engine against the eager one; every compilation costs seconds, so a few that differ most."""

from __future__ import annotations

import pytest
import torch

from collie_lab.testing.optimizers import check_engine
from tests.optim.rules import RULES


@pytest.mark.parametrize(("name", "kinds"), [
    ("adamw", [(torch.float32, None)]),
    ("lion", [(torch.bfloat16, "stochastic")]),
    ("adalomo", [(torch.bfloat16, "kahan")]),
    ("sophia", [(torch.bfloat16, "master")]),
])
def test_compiled_equals_eager(name: str, kinds: list[tuple[torch.dtype, str | None]]) -> None:
    check_engine(*RULES[name], "compile", kinds)
