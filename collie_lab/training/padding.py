"""Micro-batches of one shape: what a pipeline's buffers want."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from collie_lab.training.packed import PackedLayout

__all__ = ["level"]

Inputs = dict[str, Any]


def level(batches: list[Inputs]) -> list[Inputs]:
    """The micro-batches' inputs, as `collate` makes them, padded to the largest of them.

    A flat batch [1, T] gets documents of one token, which nobody sees and which predict nothing; padded rows [B, L]
    get longer, and more. Losses and gradients stay what they were.
    """
    if "packed" in batches[0]:
        longest = max(batch["input_ids"].shape[1] for batch in batches)
        return [_longer(batch, longest - batch["input_ids"].shape[1]) for batch in batches]
    rows, width = np.max([batch["input_ids"].shape for batch in batches], axis=0).tolist()
    return [_larger(batch, rows, width) for batch in batches]


def _longer(batch: Inputs, more: int) -> Inputs:
    if not more:
        return batch
    ids: Tensor = batch["input_ids"]
    layout, dummies = batch["packed"], PackedLayout.build(np.ones(more, dtype=np.int64), ids.device)
    return {**batch, "input_ids": F.pad(ids, (0, more)), "position_ids": F.pad(batch["position_ids"], (0, more)),
            "packed": PackedLayout(layout.groups + dummies.groups, layout.sizes + dummies.sizes)}


def _larger(batch: Inputs, rows: int, width: int) -> Inputs:
    ids: Tensor = batch["input_ids"]
    more = (0, width - ids.shape[1], 0, rows - ids.shape[0])
    mask = F.pad(batch["attention_mask"], more)
    mask[ids.shape[0] :, :1] = 1  # a row that sees nothing would have no attention
    index, labels = batch["targets"]
    index = torch.div(index, ids.shape[1], rounding_mode="floor") * width + index % ids.shape[1]
    return {**batch, "input_ids": F.pad(ids, more), "attention_mask": mask, "targets": (index, labels)}
