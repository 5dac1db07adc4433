"""Weight gradients later: the backward pass of linear layers in two halves, for zero-bubble pipelines.

The gradient of a layer's input is what the stage before waits for; that of its weight can wait until there is nothing
else to do (Qi et al., arXiv 2401.10241). torch's own split runs parts of the graph twice, which neither recomputed
blocks nor a loss that writes into its saved tensors can bear; here every node runs once.

Shapes: N tokens, I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

__all__ = ["DeferredLinears"]

_Task = tuple[nn.Linear, Tensor, Tensor]
"""A layer, its input [..., I] and the gradient of its output [..., O]."""


class DeferredLinears:
    """Linear layers whose backward pass leaves the gradients of weight and bias out.

    `take()` gives them as a function, to be called once; it covers the backward passes since the last `take`.
    """

    def __init__(self) -> None:
        self._tasks: list[_Task] = []

    def attach(self, module: nn.Module) -> None:
        """All of a module's `nn.Linear` from now on, but those that something else has given a `forward`."""
        for linear in module.modules():
            if type(linear) is nn.Linear and "forward" not in vars(linear):
                linear.forward = functools.partial(self._forward, linear)  # type: ignore[method-assign]

    def _forward(self, linear: nn.Linear, input: Tensor) -> Tensor:
        # Where no gradient of the input is wanted, nobody waits for this layer.
        if not (torch.is_grad_enabled() and linear.weight.requires_grad and input.requires_grad):
            return F.linear(input, linear.weight, linear.bias)
        out: Tensor = _Linear.apply(input, linear, self._tasks)
        return out

    def take(self) -> Callable[[], None]:
        """The gradients that are due, as a function that adds them to `.grad`."""
        tasks, self._tasks[:] = list(self._tasks), []

        def add() -> None:
            while tasks:
                _add_gradients(*tasks.pop())

        return add


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, linear: nn.Linear, tasks: list[_Task]) -> Tensor:
        # The parameters are no inputs: the engine would call their hooks, though there is no gradient yet.
        ctx.save_for_backward(input)
        ctx.linear, ctx.tasks = linear, tasks
        return F.linear(input, linear.weight, linear.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (input,), d_out = ctx.saved_tensors, gradients[0]
        with torch.autocast(d_out.device.type, enabled=False):
            d_input = d_out @ ctx.linear.weight.to(d_out.dtype)
        ctx.tasks.append((ctx.linear, input, d_out))
        return d_input.to(input.dtype), None, None


def _add_gradients(linear: nn.Linear, input: Tensor, d_out: Tensor) -> None:
    """By the engine, so that hooks on the parameters fire as they do elsewhere."""
    d_out_NO, input_NI = d_out.flatten(0, -2), input.detach().flatten(0, -2).to(d_out.dtype)
    torch.autograd.backward(linear.weight, (d_out_NO.T @ input_NI).to(linear.weight.dtype))
    if linear.bias is not None and linear.bias.requires_grad:
        torch.autograd.backward(linear.bias, d_out_NO.sum(0).to(linear.bias.dtype))
