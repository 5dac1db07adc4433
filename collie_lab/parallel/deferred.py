"""Weight gradients later: the backward pass of linear layers in two halves, for zero-bubble pipelines.

The gradient of a layer's input is what the stage before waits for; that of its weight can wait until there is nothing
else to do (Qi et al., arXiv 2401.10241). torch's own split runs parts of the graph twice, which neither recomputed
blocks nor a loss that writes into its saved tensors can bear; here every node runs once.

Shapes: I inputs and O outputs of a linear layer; leading dimensions are tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

__all__ = ["DeferredLinears"]

_Task = tuple[Tensor, Tensor | None, Tensor, Tensor]


class DeferredLinears(TorchFunctionMode):
    """The context in which backward passes through `linear` leave the gradients of weights and biases out.

    `take()` gives them as a function, to be called once; it covers the backward passes since the last `take`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tasks: list[_Task] = []

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and torch.is_grad_enabled():
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        # What is no parameter itself (a sum, a cast, a gathered weight) needs its gradient at once.
        if not (weight.is_leaf and weight.requires_grad and type(weight.data) is Tensor):
            return F.linear(input, weight, bias)
        out: Tensor = _Linear.apply(input, weight, bias, self._tasks)
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
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, tasks: list[_Task]) -> Tensor:
        ctx.save_for_backward(input, weight, bias)
        ctx.tasks = tasks
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias = ctx.saved_tensors
        d_out = gradients[0]
        with torch.autocast(d_out.device.type, enabled=False):
            d_input = (d_out @ weight.to(d_out.dtype)).to(input.dtype) if ctx.needs_input_grad[0] else None
        ctx.tasks.append((weight, bias if ctx.needs_input_grad[2] else None, input, d_out))
        return d_input, None, None, None


def _add_gradients(weight_OI: Tensor, bias_O: Tensor | None, input: Tensor, d_out: Tensor) -> None:
    """By the engine, so that hooks on the parameters fire as they do elsewhere."""
    d_out_NO, input_NI = d_out.flatten(0, -2), input.detach().flatten(0, -2).to(d_out.dtype)
    torch.autograd.backward(weight_OI, (d_out_NO.T @ input_NI).to(weight_OI.dtype))
    if bias_O is not None:
        torch.autograd.backward(bias_O, d_out_NO.sum(0).to(bias_O.dtype))
