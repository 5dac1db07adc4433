"""Pipelines against one process: losses, gradients, logits and tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import collie_lab as lab
from collie_lab.cells.parallel import check_micro_batches
from collie_lab.parallel import build_strategy
from collie_lab.parallel.pipeline import Pipeline
from collie_lab.parallel.stages import balance
from collie_lab.training.model import build_model
from collie_lab.training.padding import level
from tests.parallel.pipelines import (
    SCALE,
    assert_gradients,
    family,
    llama,
    micro_batches,
    reference,
    stages,
)
from tests.ranks import run_ranks


@pytest.mark.parametrize(("costs", "first", "last", "runs", "sizes"), [
    ([1] * 8, 0, 0, 4, [2, 2, 2, 2]),
    ([1] * 10, 0, 0, 4, [2, 2, 3, 3]),
    ([10] * 8, 10, 20, 2, [4, 4]),  # 50 and 60
    ([10] * 6, 40, 20, 2, [2, 4]),  # a large embedding has fewer layers beside it
    ([1] * 4, 100, 100, 4, [1, 1, 1, 1]),
    ([5, 1, 1, 1, 5], 0, 0, 3, [1, 3, 1]),
])
def test_runs_are_balanced(costs, first, last, runs, sizes):
    cut = balance(costs, first, last, runs)
    assert [len(run) for run in cut] == sizes
    assert [place for run in cut for place in run] == list(range(len(costs)))


def test_a_layer_for_each_run():
    with pytest.raises(ValueError, match="3 layers cannot be cut into 4"):
        balance([1] * 3, 0, 0, 4)


@pytest.mark.parametrize(("schedule", "ranks", "count", "remedy"), [
    ("1f1b", 4, 3, "schedule='gpipe'"), ("interleaved", 2, 5, "a multiple of 2"), ("interleaved", 4, 9, "multiple"),
])
def test_micro_batches_that_do_not_fit_a_schedule(schedule, ranks, count, remedy):
    with pytest.raises(ValueError, match=remedy):
        check_micro_batches(schedule, ranks, count)
    check_micro_batches("gpipe", ranks, count)
    check_micro_batches("zero_bubble", ranks, count)


def test_level_keeps_loss_and_gradients():
    """Flat batches and padded rows, of other lengths and numbers of rows."""
    model = llama(2)
    for flat in (True, False):
        if not flat:
            model.set_attn_implementation("sdpa")
        batches = micro_batches(3, flat=flat)
        batches[1] = micro_batches(1, flat=flat, share=1)[0]
        loss, expected = reference(model, batches)
        same_shape = level(batches)
        assert len({batch["input_ids"].shape for batch in same_shape}) == 1
        padded_loss, gradients = reference(model, same_shape)
        assert padded_loss == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.ranks
def test_two_stages():
    run_ranks(_two_stages, 2)


def _two_stages() -> None:
    for schedule, count in (("gpipe", 5), ("1f1b", 5), ("interleaved", 4), ("zero_bubble", 5)):
        _compare(llama(), schedule, count)
    _compare(llama(tied=False), "1f1b", 2)
    _compare(llama(tied=False), "zero_bubble", 1)
    _lora("1f1b")
    _lora("zero_bubble")
    _autocast("1f1b")
    _autocast("zero_bubble")
    _cut_on_meta("1f1b")
    _cut_on_meta("interleaved")
    _bf16_weights()
    _frozen_stage()
    _recompute()
    _refusals()


@pytest.mark.ranks
def test_families():
    run_ranks(_families, 2)


def _families() -> None:
    for name, schedule in (("gpt_neox", "zero_bubble"), ("gemma", "1f1b"), ("qwen3", "1f1b"), ("phi3", "1f1b"),
                           ("glm4", "1f1b"), ("mixtral", "interleaved")):
        model = family(name)
        with torch.no_grad():
            model.eval()
            ids = micro_batches(1)[0]["input_ids"]
            expected = model(input_ids=ids).logits
            tokens = _generate(model)
            losses = [float(model(**batch, objective="likelihood")) for batch in micro_batches(2)]
        pipeline = _compare(model, schedule, 2)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, expected, msg=lambda m, n=name: f"{n}: {m}")
            assert torch.equal(_generate(model), tokens), name
            found = [float(model(**batch, objective="likelihood")) for batch in micro_batches(2)]
        assert found == (pytest.approx(losses, rel=1e-6) if pipeline.is_last else [0.0, 0.0]), name
    _relay("interleaved")
    _relay("zero_bubble")
    _linear_attention()


@pytest.mark.ranks
def test_four_stages():
    run_ranks(_four_stages, 4)


def _four_stages() -> None:
    _compare(llama(), "1f1b", 5)
    _compare(llama(8), "zero_bubble", 4)
    _relay("1f1b")
    _sharded("gpipe", 2, reshard=True)
    _sharded("1f1b", 3)
    _sharded("interleaved", 4, reshard=True)
    _sharded("1f1b", 2, adapted=True)
    _sharded_bf16()


def _compare(model: PreTrainedModel, schedule: str, count: int, root: nn.Module | None = None,
             compute: Callable[[], Any] = contextlib.nullcontext, flat: bool = True) -> Pipeline:
    """A step by the schedule, twice, gives loss and gradients of one process; micro-batches differ in length."""
    batches = micro_batches(count, flat=flat)
    loss, expected = reference(root or model, batches, compute)
    pipeline = stages(model, schedule)
    for _ in range(2):  # the second on the same schedule object
        found = pipeline.train(root or model, level(batches), SCALE, compute)
        pipeline.sync_tied()
        assert_gradients(root or model, expected)
        assert float(found) == (pytest.approx(loss, rel=1e-5) if pipeline.is_last else 0.0)
        model.zero_grad()
    return pipeline


def _lora(schedule: str) -> None:
    model = llama()
    _compare(model, schedule, 2, root=_adapt(model))


def _adapt(model: PreTrainedModel) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def _autocast(schedule: str) -> None:
    """Hidden states travel in fp32, as they are between two blocks of one process: nothing is lost."""
    _compare(llama(), schedule, 2, compute=lambda: torch.autocast("cpu", torch.bfloat16))


def _cut_on_meta(schedule: str) -> None:
    """A model without memory is cut alike, and its stages together have every parameter under its name, once."""
    whole, real = dict(llama().named_parameters()), llama()
    with torch.device("meta"):
        blueprint = llama()
    pipeline, same = stages(blueprint, schedule), stages(real, schedule)
    assert pipeline.runs == same.runs
    mine = dict(blueprint.named_parameters())
    assert {name: parameter.shape for name, parameter in mine.items()} == {
        name: parameter.shape for name, parameter in real.named_parameters()}
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, [name for name, parameter in mine.items() if parameter not in pipeline.copies])
    assert sorted(everywhere[0] + everywhere[1]) == sorted(whole)


def _bf16_weights() -> None:
    """They compute in bf16 on every stage, as in one process: the logits are the same."""
    experiment = lab.Experiment(model=lab.Model("llama-tiny", init="random"),
                                training=lab.Training(weights="bf16", precision="bf16"))
    ids, cpu = torch.arange(1, 15)[None], torch.device("cpu")
    strategy = build_strategy(lab.Parallel(pp=2), cpu, "bf16")
    whole, cut = (build_model(experiment, cpu, each).root for each in (None, strategy))
    with torch.no_grad(), strategy.compute():
        expected, found = (model(input_ids=ids).logits for model in (whole, cut))
    assert torch.equal(found, expected)


def _frozen_stage() -> None:
    """No gradient is wanted of anything on the first rank."""
    model = llama(tied=False)
    for layer in model.model.layers[:2]:
        layer.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    _compare(model, "1f1b", 2)


def _recompute() -> None:
    for schedule in ("1f1b", "zero_bubble"):
        model = llama()
        for block in model.model.layers:
            block.forward = _checkpointed(block.forward)
        _compare(model, schedule, 2)


def _checkpointed(forward: Any) -> Any:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _refusals() -> None:
    model = llama()
    pipeline = stages(model, "gpipe")
    with pytest.raises(ValueError, match="one shape"):
        pipeline.train(model, micro_batches(2), SCALE)
    with pytest.raises(RuntimeError, match="no_grad"):
        model(**micro_batches(1)[0])
    with pytest.raises(ValueError, match="no pipeline plan for the family 'gpt2'"):
        stages(family("gpt2", n_layer=2), "gpipe")
    with pytest.raises(ValueError, match="1 layers cannot be cut"):
        stages(llama(1), "gpipe")


def _linear_attention() -> None:
    """A hybrid: layers with a state instead of keys and values, in padded rows."""
    model = family("qwen3_next").eval()
    with torch.no_grad():
        tokens = _generate(model)
    model.set_attn_implementation("sdpa")
    _compare(model, "1f1b", 2, flat=False)
    with torch.no_grad():
        assert torch.equal(_generate(model), tokens)


def _relay(schedule: str) -> None:
    model = llama(8 if schedule != "1f1b" else 4).eval()
    with torch.no_grad():
        greedy, beams = _generate(model), _generate(model, num_beams=2)
        stages(model, schedule)
        assert torch.equal(_generate(model), greedy)
        assert torch.equal(_generate(model, num_beams=2), beams)


def _generate(model: PreTrainedModel, **options: Any) -> Tensor:
    """Greedy continuations of two prompts, the shorter one padded on its left."""
    model.set_attn_implementation("sdpa")
    ids = torch.arange(1, 15).reshape(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    tokens: Tensor = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False,
                                    use_cache=True, pad_token_id=0, eos_token_id=None, **options)
    model.set_attn_implementation("collie_packed")
    return tokens


def _sharded(schedule: str, count: int, *, reshard: bool = False, adapted: bool = False) -> None:
    """FSDP2 over two ranks in each of two stages: the gradients are the mean over the data-parallel ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    model = llama()
    root = _adapt(model) if adapted else model
    shares = [micro_batches(count, share=share) for share in range(2)]
    _, expected = reference(root, [batch for share in shares for batch in share])
    expected = {name: gradient / 2 for name, gradient in expected.items()}
    mine = shares[mesh.get_local_rank("dp")]
    loss, _ = reference(root, mine)
    pipeline = stages(model, schedule, mesh.get_group("pp"))
    _shard(model, root, mesh["dp"], reshard_after_forward=reshard)
    for _ in range(2):
        found = pipeline.train(root, level(mine), SCALE)
        pipeline.sync_tied()
        assert_gradients(root, expected, mesh.get_group("pp"))
        assert float(found) == (pytest.approx(loss, rel=1e-5) if pipeline.is_last else 0.0)
        root.zero_grad()


def _sharded_bf16() -> None:
    """FSDP2 computes in bf16, so hidden states travel in bf16; and zero bubble is refused."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    model, batches = llama(), micro_batches(2)
    loss, _ = reference(model, batches)
    pipeline = stages(model, "1f1b", mesh.get_group("pp"), hidden_dtype=torch.bfloat16)
    _shard(model, model, mesh["dp"], mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    found = pipeline.train(model, level(batches), SCALE)
    assert float(found) == (pytest.approx(loss, rel=1e-2) if pipeline.is_last else 0.0)
    assert all(parameter.grad is not None for parameter in model.parameters())
    model = llama()
    pipeline = stages(model, "zero_bubble", mesh.get_group("pp"))
    _shard(model, model, mesh["dp"])
    with pytest.raises(ValueError, match="schedule='interleaved', or zero=0"):
        pipeline.train(model, level(batches), SCALE)


def _shard(model: PreTrainedModel, root: nn.Module, mesh: DeviceMesh, **options: Any) -> None:
    for module in [*model.model.layers, root]:
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh, **options)
