"""From documents to the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from collie_lab.cells import VirtualTokens
from collie_lab.data import Documents
from collie_lab.training.packed import PackedLayout, to_device

__all__ = ["Batch", "collate", "collate_scored"]


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
    # Longest first: attention wants documents of like length side by side.
    indices = indices[np.argsort(-documents.lengths[indices], kind="stable")]
    lengths = documents.lengths[indices]
    places = np.concatenate([np.arange(documents.offsets[i], documents.offsets[i + 1]) for i in indices])
    tokens = documents.tokens[places].astype(np.int64)
    predicted = np.flatnonzero(documents.learned[places])
    labels: NDArray[Any] = tokens[predicted]
    if draw is not None:
        chances = [np.random.default_rng((*draw, index)).random(length, dtype=np.float32)
                   for index, length in zip(indices.tolist(), lengths.tolist(), strict=True)]
        labels = np.concatenate(chances)[predicted]
    inputs = _arguments(tokens, lengths, (predicted - 1, labels), device, flat, multiple, virtual)
    if draw is not None:
        inputs["objective"] = "drawn"
    attended = int(((lengths.astype(np.int64) + (virtual.tokens if virtual is not None else 0)) ** 2).sum())
    return Batch(inputs, len(tokens), attended)


def collate_scored(documents: Documents, families: Sequence[NDArray[np.int64]], device: torch.device, *, flat: bool,
                   multiple: int = 1, virtual: VirtualTokens | None = None
                   ) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """Arguments with which the model scores the learned tokens of documents, and the document of each score.

    The documents of a family differ in their last token at most: the model reads them once. Their last token it does
    not read at all, as nothing is predicted from it.
    """
    families = sorted(families, key=lambda family: -documents.lengths[family[0]])
    lengths = np.array([documents.lengths[family[0]] - 1 for family in families])
    begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    tokens = np.concatenate([documents.tokens[documents.offsets[family[0]] :][:length]
                             for family, length in zip(families, lengths, strict=True)]).astype(np.int64)
    index, labels, owners = [], [], []
    for family, begin in zip(families, begins, strict=True):
        for document in family:
            span = slice(documents.offsets[document], documents.offsets[document + 1])
            places = np.flatnonzero(documents.learned[span])
            index.append(begin + places - 1)
            labels.append(documents.tokens[span][places].astype(np.int64))
            owners.append(np.full(len(places), document))
    targets = np.concatenate(index), np.concatenate(labels)
    inputs = _arguments(tokens, lengths, targets, device, flat, multiple, virtual)
    return {**inputs, "objective": "scores"}, np.concatenate(owners)


def _arguments(tokens: NDArray[np.int64], lengths: NDArray[np.int64], targets: tuple[NDArray[Any], NDArray[Any]],
               device: torch.device, flat: bool, multiple: int, virtual: VirtualTokens | None) -> dict[str, Any]:
    """The model's arguments for documents that follow each other; of `targets` the places are those of `tokens`."""
    before, cached = (virtual.tokens, virtual.cached) if virtual is not None else (0, False)
    embedded = 0 if cached else before
    whole = lengths + embedded
    positions = np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)
    real, room = np.flatnonzero(positions >= embedded), np.flatnonzero(positions < embedded)
    filled = np.zeros(len(positions), dtype=np.int64)
    filled[real] = tokens
    if flat:
        place = np.arange(len(filled))
        inputs = _flat(filled, positions + (before if cached else 0), whole, -len(filled) % multiple, device)
    else:
        width = int(whole.max())
        place = np.repeat(np.arange(len(whole)), whole) * width + positions
        inputs = _padded(filled, place, (len(whole), width), device)
    inputs["targets"] = (to_device(place[real[targets[0]]], device), to_device(targets[1], device))
    if embedded:
        inputs["virtual"] = to_device(place[room], device)
    return {**inputs, "use_cache": False}


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
