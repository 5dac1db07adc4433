"""From documents to the tensors of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from collie_lab.cells import VirtualTokens
from collie_lab.data import Documents
from collie_lab.training.packed import PackedLayout, to_device

__all__ = ["Batch", "collate"]


@dataclass(frozen=True)
class Batch:
    """A micro-batch as keyword arguments of the model, and what a meter wants to know of it.

    Flat: one row of all tokens [1, T]. Padded: one row a document [B, L], for models that mix tokens by
    other means than transformers' attention interface.
    """

    inputs: dict[str, Any]
    tokens: int
    attended: int
    """Sum over documents of the squared length, virtual tokens included: the work of attention."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return tuple(self.inputs["input_ids"].shape)


def collate(documents: Documents, indices: NDArray[np.int64], device: torch.device, *, flat: bool,
            draw: tuple[int, ...] | None = None, multiple: int = 1, virtual: VirtualTokens | None = None) -> Batch:
    """The documents of the given indices as one micro-batch on `device`.

    Positions restart in every document; a target is the next token of the same document. With `draw`, a seed, the
    labels are to be drawn by the model: in their place are numbers in [0, 1), the same however documents are dealt.
    A flat row is filled up to a `multiple` of tokens, with a document of which nothing is learned. Before every
    document there is room for `virtual` tokens, at the places `inputs["virtual"]`; for those of a cache, positions
    begin behind them.
    """
    tokens_before, cached = (virtual.tokens, virtual.cached) if virtual is not None else (0, False)
    embedded = 0 if cached else tokens_before
    # Longest first: attention wants documents of like length side by side.
    indices = indices[np.argsort(-documents.lengths[indices], kind="stable")]
    lengths = documents.lengths[indices]
    places = np.concatenate([np.arange(documents.offsets[i], documents.offsets[i + 1]) for i in indices])
    whole = lengths + embedded
    positions = np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)
    real = np.flatnonzero(positions >= embedded)
    tokens = np.zeros(len(positions), dtype=np.int64)
    tokens[real] = documents.tokens[places]
    predicted = real[documents.learned[places]]
    labels: NDArray[Any] = tokens[predicted]
    if draw is not None:
        chances = [np.random.default_rng((*draw, index)).random(length, dtype=np.float32)
                   for index, length in zip(indices.tolist(), lengths.tolist(), strict=True)]
        labels = np.concatenate(chances)[documents.learned[places]]
    room = np.flatnonzero(positions < embedded)
    if flat:
        inputs = _flat(tokens, positions + (tokens_before if cached else 0), whole, -len(tokens) % multiple, device)
        inputs["targets"] = (to_device(predicted - 1, device), to_device(labels, device))
    else:
        width = int(whole.max())
        place = np.repeat(np.arange(len(whole)), whole) * width + positions
        inputs = _padded(tokens, place, (len(whole), width), device)
        inputs["targets"] = (to_device(place[predicted] - 1, device), to_device(labels, device))
        room = place[room]
    if embedded:
        inputs["virtual"] = to_device(room, device)
    if draw is not None:
        inputs["objective"] = "drawn"
    attended = int(((lengths.astype(np.int64) + tokens_before) ** 2).sum())
    return Batch({**inputs, "use_cache": False}, int(lengths.sum()), attended)


def _flat(tokens: NDArray[np.int64], positions: NDArray[np.int64], lengths: NDArray[np.int64], filling: int,
          device: torch.device) -> dict[str, Any]:
    if filling:
        tokens = np.concatenate([tokens, np.zeros(filling, dtype=tokens.dtype)])
        positions = np.concatenate([positions, np.arange(filling)])
        lengths = np.append(lengths, filling)
    return {"input_ids": to_device(tokens[None], device), "position_ids": to_device(positions[None], device),
            "packed": PackedLayout.build(lengths, device)}


def _padded(tokens: NDArray[np.int64], place: NDArray[np.int64], shape: tuple[int, int], device: torch.device
            ) -> dict[str, Any]:
    """Rows of the given shape, with each token at its flat place."""
    ids, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    ids.flat[place], mask.flat[place] = tokens, 1
    return {"input_ids": to_device(ids, device), "attention_mask": to_device(mask, device)}
