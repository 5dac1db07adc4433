"""A small harness for pipelines: a model whole and in stages, and the same micro-batches for both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from collie_lab.data import Documents
from collie_lab.parallel.pipeline import Pipeline
from collie_lab.training.batch import collate
from collie_lab.training.loss import attach_loss
from collie_lab.training.packed import ATTENTION

__all__ = ["SCALE", "Inputs", "assert_gradients", "family", "llama", "micro_batches", "reference", "stages"]

Inputs = dict[str, Any]
CPU = torch.device("cpu")
SCALE = 0.01  # of the losses: that it arrives is tested, too
_TINY = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
         "num_attention_heads": 4, "max_position_embeddings": 128,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EXTRA: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16, "num_key_value_heads": 2}, "glm4": {"head_dim": 16, "num_key_value_heads": 2},
    "gpt_neox": {"tie_word_embeddings": False}, "phi3": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen3": {"head_dim": 16, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3_next": {"head_dim": 16, "num_key_value_heads": 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                   "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                   "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
}


def family(name: str, **fields: Any) -> PreTrainedModel:
    """A tiny model of a family, the same on every rank, as `build_model` prepares it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**_TINY, **_EXTRA.get(name, {}), **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # norms and biases that are not 1 and 0
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.set_attn_implementation(ATTENTION)
    attach_loss(model)
    return model


def llama(layers: int = 4, tied: bool = True) -> PreTrainedModel:
    """The shape `llama-tiny`, with more layers."""
    return family("llama", intermediate_size=172, num_hidden_layers=layers, tie_word_embeddings=tied)


def micro_batches(count: int, *, flat: bool = True, share: int = 0) -> list[Inputs]:
    """Micro-batches of three documents of different lengths; `share` numbers those of data-parallel ranks."""
    random = np.random.default_rng(share)
    lengths = random.integers(3, 25, 3 * count)
    tokens = random.integers(1, 320, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    learned = random.random(len(tokens)) < 0.8
    learned[offsets[:-1]] = False
    documents = Documents(tokens, learned, offsets, np.zeros(0, dtype=np.int64))
    return [collate(documents, np.arange(3 * i, 3 * i + 3), CPU, flat=flat).inputs for i in range(count)]


def reference(model: nn.Module, batches: list[Inputs],
              compute: Callable[[], Any] = contextlib.nullcontext) -> tuple[float, dict[str, Tensor]]:
    """Summed loss and gradients of one process, by name; of the micro-batches as they are, without padding."""
    total = 0.0
    for batch in batches:
        with compute():
            loss = model(**batch)
        (loss * SCALE).backward()
        total += float(loss.detach())
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()
                 if parameter.grad is not None}
    model.zero_grad()
    return total, gradients


def stages(model: PreTrainedModel, schedule: str, group: dist.ProcessGroup | None = None,
           **options: Any) -> Pipeline:
    """The pipeline of the model's stages over `group`."""
    return Pipeline(model, group or dist.group.WORLD, schedule, CPU, **options)


def assert_gradients(root: nn.Module, expected: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Every gradient is on some rank of the pipeline, and is the reference's wherever it is.

    A copy of a tied weight goes by the name of the original.
    """
    found: list[str] = []
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if parameter.grad is None or (name not in expected and "lm_head" in name):
            continue
        gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        scale = expected[name].abs().max()
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=float(1e-5 * scale),
                                   msg=lambda text, name=name: f"{name}: {text}")
        found.append(name)
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, found, group=group)
    assert {name for names in everywhere for name in names} == set(expected)
