"""LOMO: SGD whose step happens inside the backward pass (Lv et al., arXiv 2306.09782)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["Lomo"]


class Lomo(torch.optim.Optimizer):
    """θ ← θ(1 − ηλ) − ηg as soon as g is there; then g is freed, so that few gradients ever live at once.

    `backward()` does the update; `step()` only closes it. The learning rate and the decay are read from
    `param_groups` at every update, so schedulers work as usual. Per step one backward pass: gradients
    cannot be accumulated, and a second one before `step()` raises.

    Args:
        params: parameters or parameter groups.
        lr: learning rate η.
        weight_decay: λ.
        reduce: called with each gradient before its update, e.g. to average it over the replicas.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0,
                 reduce: Callable[[Tensor], None] | None = None):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._reduce = reduce
        self._updated: set[int] = set()
        self._norms: list[Tensor] = []
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._hook(index))

    def _hook(self, group_index: int) -> Callable[[Tensor], None]:
        def update(parameter: Tensor) -> None:
            if id(parameter) in self._updated:
                raise RuntimeError("LOMO: a parameter got a second gradient before `step()`: gradients cannot be "
                                   "accumulated, and reentrant checkpointing is not supported")
            self._updated.add(id(parameter))
            # By index: `load_state_dict` replaces the groups' dictionaries.
            self._update(parameter, self.param_groups[group_index])

        return update

    @torch.no_grad()
    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if self._reduce is not None:
            self._reduce(gradient)
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        self._norms.append(torch.linalg.vector_norm(local, dtype=torch.promote_types(local.dtype, torch.float32)))
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(gradient, alpha=-group["lr"])
        parameter.grad = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Close the step whose updates the backward pass has made."""
        self._updated.clear()

    def pop_norms(self) -> list[Tensor]:
        """The norm of this rank's piece of every gradient, as it was used, since the last call."""
        norms, self._norms = self._norms, []
        return norms
