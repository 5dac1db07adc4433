"""Matrices cut over two ranks: every family's loss and gradients are those of the whole model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from collie_lab.cells import SHAPES, Experiment, Parallel
from collie_lab.parallel import Strategy, build_strategy
from collie_lab.training.batch import collate
from collie_lab.training.model import build_model
from tests.parallel.families import FAMILIES, documents, experiment
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _set_adapter(root: nn.Module) -> None:
    """LoRA's second matrix starts at zero, and would hide the gradient of the first."""
    for name, parameter in root.named_parameters():
        if "lora_B" in name:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.data.fill_(0.05)


def _loss_and_gradients(exp: Experiment, cell: Parallel, token_loss: Any = None) -> dict[str, Tensor]:
    strategy = build_strategy(cell, CPU, "fp32") if cell.world_size > 1 else None
    exp = exp.replace(training=exp.training.replace(loss=token_loss))
    _, root, *_ = build_model(exp, CPU, strategy)
    _set_adapter(root)
    inputs = collate(documents(), np.arange(3), CPU, flat=True, multiple=strategy.multiple if strategy else 1).inputs
    loss = root(**inputs)
    loss.backward()
    found = {name: _whole(parameter.grad) for name, parameter in root.named_parameters()
             if parameter.grad is not None}
    return {"loss": loss.detach(), **found}


def _smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)


def _compare(exp: Experiment, cell: Parallel, what: str, token_loss: Any = None) -> None:
    expected, found = (_loss_and_gradients(exp, layout, token_loss) for layout in (Parallel(), cell))
    assert expected.keys() == found.keys(), what
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5,
                                   msg=lambda text, name=name: f"{what}, {name}: {text}")


def _families() -> None:
    torch.use_deterministic_algorithms(True)
    for family in FAMILIES:
        _compare(experiment(family), Parallel(tp=2), family)
        if family != "mixtral":
            _compare(experiment(family), Parallel(tp=2, sequence_parallel=True), f"{family}, sequence")
    for family in ("llama3", "phi3", "gpt_neox"):
        for sequence in (False, True):
            _compare(experiment(family, lora=True), Parallel(tp=2, sequence_parallel=sequence), f"{family}, LoRA")
    _compare(experiment("llama3"), Parallel(tp=2), "a loss of one's own", _smoothed)


@pytest.mark.ranks
def test_families_equal_the_whole_model() -> None:
    run_ranks(_families, 2)


def test_spread_tokens_of_padded_rows_are_refused() -> None:
    """Gemma 2 caps its attention, which packed documents cannot: its masks are of whole rows."""
    exp = experiment("gemma")
    SHAPES["family-test"]["model_type"] = "gemma2"
    strategy = Strategy(Parallel(tp=2, sequence_parallel=True), CPU, "fp32")
    with pytest.raises(ValueError, match=r"gemma2: sequence_parallel .* leave it out"):
        build_model(exp, CPU, strategy)


def _generated(exp: Experiment, cell: Parallel) -> Tensor:
    strategy = build_strategy(cell, CPU, "fp32") if cell.world_size > 1 else Strategy(cell, CPU, "fp32")
    model, *_ = build_model(exp, CPU, strategy)
    model.set_attn_implementation("sdpa")
    prompt = torch.from_numpy(documents().tokens[None, :11].astype(np.int64))
    with torch.no_grad(), strategy.whole(model):
        tokens: Tensor = model.eval().generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return tokens


def _with_dropout(cell: Parallel, recompute: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of LoRA under dropout, on attention and before LoRA's first matrix."""
    exp = experiment("llama3", lora=True)
    assert exp.adapter is not None
    exp = exp.replace(adapter=exp.adapter.replace(dropout=0.3), training=exp.training.replace(recompute=recompute),
                      model=exp.model.replace(config={"attention_dropout": 0.2}))
    strategy = build_strategy(cell, CPU, "fp32")
    _, root, *_ = build_model(exp, CPU, strategy)
    _set_adapter(root)
    torch.manual_seed(7)
    loss = root.train()(**collate(documents(), np.arange(3), CPU, flat=True, multiple=strategy.multiple).inputs)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in root.named_parameters() if p.grad is not None}


def _generation_and_dropout() -> None:
    torch.use_deterministic_algorithms(True)
    for family in ("llama3", "phi3", "mixtral", "odd vocabulary"):
        expected = _generated(experiment(family), Parallel())
        assert torch.equal(_generated(experiment(family), Parallel(tp=2)), expected), family
    spread = Parallel(tp=2, sequence_parallel=True)
    assert torch.equal(_generated(experiment("llama3"), spread), _generated(experiment("llama3"), Parallel()))
    for cell in (Parallel(tp=2), spread):
        loss, gradients = _with_dropout(cell, "none")
        again, recomputed = _with_dropout(cell, "full")
        assert loss == again  # a block that runs again drops the same
        for name, gradient in gradients.items():
            torch.testing.assert_close(_whole(recomputed[name]), _whole(gradient), rtol=0, atol=1e-6)
        everyone = [torch.empty_like(loss) for _ in range(2)]
        dist.all_gather(everyone, loss)
        assert everyone[0] == everyone[1]  # what all ranks hold, they drop alike
        whole = [g.redistribute(placements=[Replicate()]).to_local() for name, g in sorted(gradients.items())
                 if isinstance(g, DTensor) and not any(p.is_shard() for p in g.placements)]
        assert whole
        for gradient in whole:
            pieces = [torch.empty_like(gradient) for _ in range(2)]
            dist.all_gather(pieces, gradient)
            torch.testing.assert_close(pieces[0], pieces[1], rtol=0, atol=1e-7)


@pytest.mark.ranks
def test_generation_and_dropout() -> None:
    run_ranks(_generation_and_dropout, 2)
