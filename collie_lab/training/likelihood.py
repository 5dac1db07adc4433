"""How likely a model finds texts, on every layout in the way in which it trains."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from collie_lab.cells import VirtualTokens
from collie_lab.data import Documents
from collie_lab.parallel import Strategy
from collie_lab.training.batch import collate_scored

__all__ = ["score"]


def score(model: PreTrainedModel, documents: Documents, chosen: NDArray[np.int64], strategy: Strategy, *,
          batch_size: int, flat: bool, virtual: VirtualTokens | None, tick: Callable[[], None]
          ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The log-likelihood (nats) of the learned tokens of each of the `chosen` documents, this rank's, and whether each
    of these tokens is the likeliest.

    All ranks call it together, with documents of their own. Documents that differ in their last token alone (a prompt
    with A, B, C and D) are read once; a batch has `batch_size` different ones, of like length.
    """
    families = _families(documents, chosen)
    batches = [families[begin : begin + batch_size] for begin in range(0, len(families), batch_size)]
    found = np.zeros((2, len(documents)))
    for step in range(strategy.most(len(batches))):
        tick()
        # A sharded model is gathered by all ranks together: who has no batch left repeats a document unheard.
        counts = step < len(batches)
        batch = batches[step] if counts else [_first_scored(documents)]
        inputs, owners = collate_scored(documents, batch, strategy.device, flat=flat, multiple=strategy.multiple,
                                         virtual=virtual)
        likelihoods, greedy = model(**inputs).double().cpu().numpy()
        if counts:
            np.add.at(found[0], owners, likelihoods)
            np.add.at(found[1], owners, 1 - greedy)
    return found[0, chosen], found[1, chosen] == 0


def _families(documents: Documents, chosen: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The chosen documents by what a model reads of them, all tokens but the last; the longest first."""
    found: dict[bytes, list[int]] = {}
    for document in chosen.tolist():
        read = documents.tokens[documents.offsets[document] : documents.offsets[document + 1] - 1]
        found.setdefault(read.tobytes(), []).append(document)
    families = [np.array(family, dtype=np.int64) for family in found.values()]
    return sorted(families, key=lambda family: -documents.lengths[family[0]])


def _first_scored(documents: Documents) -> NDArray[np.int64]:
    return np.flatnonzero(documents.targets > 0)[:1]
