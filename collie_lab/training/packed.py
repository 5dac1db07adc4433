"""Attention over packed documents: all tokens of a micro-batch in one row, no document sees another.

There is no padding and no mask: documents of similar length are gathered into dense groups, each group
is one causal `scaled_dot_product_attention`, and the results go back to their places. A group's padding is
at its end, where causal attention never looks, so the result is exact.

Shapes: B batch (1), H heads, T tokens of the micro-batch, D head dimension, N documents of a group,
L longest of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

__all__ = ["ATTENTION", "PackedLayout", "supports_packed_attention"]

#: The name under which transformers finds the attention function of this file.
ATTENTION = "collie_packed"

# Group limits grow by this factor: a group's documents differ by less, so little of it is padding.
_GROWTH = 1.25


@dataclass(frozen=True)
class _Group:
    index_NL: Tensor  # token of each place; a document's last token stands in for padding
    kept: Tensor | None  # flat places that hold a token, None: all


@dataclass(frozen=True)
class PackedLayout:
    """Where the documents of a micro-batch lie, as attention wants it. Built on the host, no synchronisation."""

    groups: tuple[_Group, ...]
    inverse_T: Tensor  # from the groups' order back to the tokens'

    @classmethod
    def build(cls, lengths: NDArray[np.int64]) -> PackedLayout:
        """The layout of documents that follow each other, from their lengths in tokens."""
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        level = np.ceil(np.log(np.maximum(lengths, 16)) / np.log(_GROWTH)).astype(np.int64)
        groups, places = [], []
        for one in np.unique(level):
            members = np.flatnonzero(level == one)
            longest = int(lengths[members].max())
            column = np.arange(longest)
            index = starts[members, None] + np.minimum(column, lengths[members, None] - 1)
            valid = column < lengths[members, None]
            kept = None if valid.all() else torch.from_numpy(np.flatnonzero(valid))
            groups.append(_Group(torch.from_numpy(index), kept))
            places.append(index[valid])
        inverse = np.empty(int(lengths.sum()), dtype=np.int64)
        inverse[np.concatenate(places)] = np.arange(len(inverse))
        return cls(tuple(groups), torch.from_numpy(inverse))

    def to(self, device: torch.device) -> PackedLayout:
        """The same layout on another device."""
        groups = tuple(_Group(group.index_NL.to(device, non_blocking=True),
                              None if group.kept is None else group.kept.to(device, non_blocking=True))
                       for group in self.groups)
        return PackedLayout(groups, self.inverse_T.to(device, non_blocking=True))


def supports_packed_attention(model: PreTrainedModel) -> bool:
    """Whether all of a model's mixing over tokens goes through transformers' attention interface.

    Not so for models with a state (Mamba and hybrids) or an attention of their own, nor for logit
    soft-capping, which `scaled_dot_product_attention` cannot do.
    """
    config = model.config.get_text_config()
    stateful = any(isinstance(module, nn.Conv1d) for module in model.modules())
    softcap = getattr(config, "attn_logit_softcapping", None)
    return bool(getattr(model, "_supports_attention_backend", False)) and not stateful and not softcap


def _packed_attention(module: nn.Module, query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor,
                      attention_mask: Tensor | None, *, scaling: float | None = None, dropout: float = 0.0,
                      packed: PackedLayout | None = None, sliding_window: int | None = None,
                      **_: Any) -> tuple[Tensor, None]:
    """transformers' attention function: [1, H, T, D] queries to [1, T, H, D] outputs.

    Without `packed` (generation, a model called by hand) it is plain SDPA with the mask it is given.
    """
    heads, dim = query_BHTD.shape[1], query_BHTD.shape[3]
    if packed is None:
        out = _sdpa(query_BHTD, key_BKTD, value_BKTD, attention_mask, scaling, dropout, sliding_window)
        return out.transpose(1, 2), None
    rows = [x.transpose(1, 2).flatten(2)[0] for x in (query_BHTD, key_BKTD, value_BKTD)]
    outputs = []
    for group in packed.groups:
        shape = (*group.index_NL.shape, -1, dim)
        q, k, v = (row.index_select(0, group.index_NL.flatten()).view(shape).transpose(1, 2) for row in rows)
        out = _sdpa(q, k, v, None, scaling, dropout, sliding_window).transpose(1, 2).flatten(0, 1).flatten(1)
        outputs.append(out if group.kept is None else out.index_select(0, group.kept))
    out_T = torch.cat(outputs).index_select(0, packed.inverse_T)
    return out_T.view(1, -1, heads, dim), None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, dropout: float,
          window: int | None) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    if mask is None and window is not None and keys > window:
        place = torch.arange(keys, device=q.device)
        age = place[keys - queries :, None] - place
        mask = (age >= 0) & (age < window)
    # One query against a cache sees all of it; `is_causal` would align it with the first key.
    causal = mask is None and queries > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling,
                                          enable_gqa=k.shape[1] != q.shape[1])


AttentionInterface.register(ATTENTION, _packed_attention)
