"""Attention over packed documents: all tokens of a micro-batch in one row, no document sees another.

There is no padding and no mask: neighbours of similar length make a dense group, and each group is one causal
`scaled_dot_product_attention`. A group's padding is at the end of its rows, where causal attention never looks,
so the result is exact. A group of one document, or of equal ones, is a view of the tokens: nothing is copied.

A layout may have a prefix: keys and values that stand before those of every document, in each layer its own.

Shapes: B batch (1), H heads, T tokens of the micro-batch, D head dimension, N documents of a group,
L longest of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

__all__ = ["ATTENTION", "PackedLayout", "attention", "supports_packed_attention", "to_device"]

#: The name under which transformers finds the attention function of this file.
ATTENTION = "collie_packed"

# A group's longest document has at most so many times the tokens of its shortest: little of it is padding.
_GROWTH = 1.25
_SHORT = 16  # documents of fewer tokens count as having so many
# On a CPU a call costs little and arithmetic much: no document's square is padded by more than this many
# pairs of tokens: an estimate of the work that a call of its own would cost, not tuned.
_CPU_PADDING = 2048


@dataclass(frozen=True)
class _Group:
    """Documents that follow each other and share one call of attention."""

    count: int
    longest: int
    index_NL: Tensor | None  # the group's token at each place; a row is padded with its last. None: no padding
    kept: Tensor | None  # flat places that hold a token


@dataclass(frozen=True)
class PackedLayout:
    """Where the documents of a micro-batch lie, as attention wants it. Built on the host, no synchronisation."""

    groups: tuple[_Group, ...]
    sizes: tuple[int, ...]
    """Tokens of each group."""
    prefix: Tensor | None = None
    """[layers, 2, heads, virtual tokens, D]: keys and values before every document's own."""
    attend: Callable[..., Tensor] | None = None
    """What computes attention in place of this file's function: the same, kept out of compiled graphs (`blocks`)."""

    @property
    def equal_documents(self) -> int | None:
        """How many documents there are, where they are of one length and nothing stands before them: all that attention
        depends on, beside the shapes of its operands. Else None."""
        group = self.groups[0]
        return group.count if len(self.groups) == 1 and group.index_NL is None and self.prefix is None else None

    @classmethod
    def build(cls, lengths: NDArray[np.int64], device: torch.device) -> PackedLayout:
        """The layout of documents that follow each other, from their lengths in tokens.

        Only neighbours share a group: sorted by length, documents need the fewest calls.
        """
        bounds, shortest, longest = [0], int(lengths[0]), int(lengths[0])
        for place, length in enumerate(lengths.tolist()):
            shortest, longest = min(shortest, length), max(longest, length)
            if not _alike(shortest, longest, device):
                bounds.append(place)
                shortest = longest = length
        spans = [lengths[begin:end] for begin, end in itertools.pairwise([*bounds, len(lengths)])]
        return cls(tuple(_group(span, device) for span in spans), tuple(int(span.sum()) for span in spans))


def _alike(shortest: int, longest: int, device: torch.device) -> bool:
    """Whether documents of these lengths may share a group."""
    if device.type == "cpu":
        return longest**2 - shortest**2 <= _CPU_PADDING
    return longest <= _GROWTH * max(shortest, _SHORT)


def _group(lengths: NDArray[np.int64], device: torch.device) -> _Group:
    count, longest = len(lengths), int(lengths.max())
    if longest * count == lengths.sum():
        return _Group(count, longest, None, None)
    starts, column = np.cumsum(lengths) - lengths, np.arange(longest)
    index = starts[:, None] + np.minimum(column, lengths[:, None] - 1)
    kept = np.flatnonzero(column < lengths[:, None])
    return _Group(count, longest, to_device(index, device), to_device(kept, device))


def to_device(array: NDArray[np.int64], device: torch.device) -> Tensor:
    """The array as a tensor; from pinned memory, so that the copy runs beside the previous step's kernels."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


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
    attend = attention if packed is None or packed.attend is None else packed.attend
    return attend(module, query_BHTD, key_BKTD, value_BKTD, attention_mask, scaling, dropout, packed,
                  sliding_window), None


def attention(module: nn.Module, query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor,
              attention_mask: Tensor | None, scaling: float | None, dropout: float, packed: PackedLayout | None,
              sliding_window: int | None) -> Tensor:
    """The same, all of it given by its place.

    Where other ranks have other heads, dropout draws other numbers: `module.separate_random` is the context for it.
    """
    prefix = None if packed is None or packed.prefix is None else packed.prefix[cast(int, module.layer_idx)]
    if dropout and (separate := getattr(module, "separate_random", None)):
        with separate():
            return _attention(query_BHTD, key_BKTD, value_BKTD, attention_mask, scaling, dropout, packed,
                              sliding_window, prefix)
    return _attention(query_BHTD, key_BKTD, value_BKTD, attention_mask, scaling, dropout, packed, sliding_window,
                      prefix)


def _attention(query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, attention_mask: Tensor | None,
               scaling: float | None, dropout: float, packed: PackedLayout | None, sliding_window: int | None,
               prefix: Tensor | None) -> Tensor:
    if packed is None:
        out = _sdpa(query_BHTD, key_BKTD, value_BKTD, attention_mask, scaling, dropout, sliding_window)
        return out.transpose(1, 2)
    # A graph that has this code holds for any length only if the length is read from a tensor.
    sizes = packed.sizes if len(packed.groups) > 1 else (query_BHTD.shape[2],)
    parts = zip(*(x.split(sizes, dim=2) for x in (query_BHTD, key_BKTD, value_BKTD)), strict=True)
    outputs = []
    for group, part in zip(packed.groups, parts, strict=True):
        q, k, v = (_rows(x, group) for x in part)
        if prefix is not None:
            k, v = (torch.cat([before.to(x.dtype).expand(len(x), -1, -1, -1), x], dim=2)
                    for before, x in zip(prefix, (k, v), strict=True))
        out = _sdpa(q, k, v, None, scaling, dropout, sliding_window).transpose(1, 2).flatten(0, 1)
        outputs.append(out if group.kept is None else out.index_select(0, group.kept))
    return torch.cat(outputs)[None]


def _rows(x_BHTD: Tensor, group: _Group) -> Tensor:
    """The tokens of a group, a document a row: [1, H, T, D] to [N, H, L, D]."""
    if group.count == 1:
        return x_BHTD
    if group.index_NL is not None:
        x_BHTD = x_BHTD.index_select(2, group.index_NL.flatten())
    rows_NHLD: Tensor = x_BHTD.unflatten(2, (group.count, -1))[0].transpose(0, 1)
    return rows_NHLD


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, dropout: float,
          window: int | None) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    if mask is None and (1 < queries < keys or (window is not None and keys > window)):
        place = torch.arange(keys, device=q.device)
        age = place[keys - queries :, None] - place  # the last query goes with the last key
        mask = (age >= 0) & (age < (keys if window is None else window))
    causal = mask is None
    if queries == 1:  # it sees all of a cache; `is_causal` would align it with the first key
        causal = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling,
                                          enable_gqa=k.shape[1] != q.shape[1])


AttentionInterface.register(ATTENTION, _packed_attention)
