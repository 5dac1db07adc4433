"""What is done about the forward pass of every transformer block while it trains: compiled, recomputed, or both.

Wrapped is a block's `forward`, not the block: its names, and with them checkpoints and exports, stay what they are, and
what other libraries hang on a block (FSDP2's hooks above all, which gather its weights) stays outside of the graph.
Without gradients a block runs as it came: the caches of generation grow with every token, and each length would be a
graph of its own.

Recomputation is outside of compilation: the backward pass runs the compiled block again. The other way round, where
torch.compile sees the checkpoint and fuses recomputation and backward, works for whole graphs alone, which packed
documents of many lengths do not have; and it takes more memory (a LLaMA of four layers on a CPU: 52.6 MB; so: 43.5 MB).

Packed documents lie differently in every micro-batch. Compiled with the rest of the block, attention would be a new
graph for each layout, until torch has had enough of it and silently compiles no more. So it runs outside, between the
graphs, which hold for any number of tokens: two for each piece of a block, the first for a fixed number of tokens and
the next for any. Only where every micro-batch has as many documents, all of one length, does it depend on shapes alone:
then a block is one graph.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from collie_lab.machine import user_cache
from collie_lab.training.packed import PackedLayout, attention

__all__ = ["wrap_blocks"]

Forward = Callable[..., Any]

#: What makes kernels of graphs.
BACKEND: str | Callable[..., Any] = "inductor"


def wrap_blocks(model: nn.Module, *, recompute: bool, compiled: bool) -> None:
    """Have every block of a model of transformers recompute its activations, or be compiled when it first runs."""
    if not recompute and not compiled:
        return
    names = set(getattr(model, "_no_split_modules", None) or ())
    layouts = _prepared_compiler() if compiled else None
    for block in [module for module in model.modules() if type(module).__name__ in names]:
        plain = run = block.forward
        if compiled:
            run = _compiled(run, type(block).__name__)
        if recompute:
            run = _checkpointed(run)
        block.forward = _while_training(run, plain, layouts)


def _while_training(run: Forward, plain: Forward, layouts: _Layouts | None) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        if layouts is not None and (packed := kwargs.get("packed")) is not None:
            kwargs["packed"] = layouts.settled(packed)
        return run(*args, **kwargs)

    return forward


def _checkpointed(forward: Forward) -> Forward:
    """Keeps its input only, and runs again in the backward pass.

    Non-reentrant: the reentrant kind gives a weight that several blocks share two gradients, which an optimizer in
    backward would take for two steps.
    """
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


class _Layouts:
    """Whether attention may be part of the graph: as long as every micro-batch has had as many documents, all equal."""

    def __init__(self) -> None:
        self._documents: int | None = None
        self._vary = False
        self._apart = torch.compiler.disable(attention)

    def settled(self, packed: PackedLayout) -> PackedLayout:
        """The layout, which says where its attention runs. Recomputation gets the same, whatever came in between."""
        documents = packed.equal_documents
        self._documents = self._documents or documents
        self._vary = self._vary or documents is None or documents != self._documents
        return dataclasses.replace(packed, attend=self._apart) if self._vary else packed


def _prepared_compiler() -> _Layouts:
    # What was compiled once is found again, by the next run of the same model too. torch would keep it in /tmp, and
    # does where this process has compiled something else before.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache("inductor")))
    # A pool's ranks have other runs behind them, whose graphs count towards the limit of the same code.
    torch.compiler.reset()
    # Blocks are smaller than DDP's buckets, or as large: cutting them up to send the first gradients sooner costs more
    # than it gains.
    torch._dynamo.config.optimize_ddp = False
    # A hook that somebody hangs on a module inside a block, or takes away, counts from the next step on.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    return _Layouts()


def _compiled(forward: Forward, kind: str) -> Forward:
    compiled = torch.compile(forward, backend=BACKEND)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split("\n")[:2])[:300]
            raise RuntimeError(f"Training.compile: torch.compile cannot compile {kind} ({reason}); "
                               "Training(compile=False) trains without it") from error

    return run
