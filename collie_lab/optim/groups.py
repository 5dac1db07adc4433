"""Which parameters decay: matrices do; norms, biases and embeddings do not."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["parameter_groups"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters in two groups, with and without weight decay; empty groups are left out.

    An embedding that is tied to the output head counts as an embedding.
    """
    embeddings = {id(parameter) for module in model.modules() if isinstance(module, nn.Embedding)
                  for parameter in module.parameters(recurse=False)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    chosen = {id(parameter) for parameter in decayed}
    spared = [p for p in trained if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
