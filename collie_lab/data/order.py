"""Which documents each step sees: packing and the deterministic, sharded order.

Everything follows from the lengths and the seed, so every rank computes the same order without a word
to the others, and a run resumes in mid-epoch from its step number alone.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from collie_lab.data.documents import Documents

__all__ = ["Order", "Step", "pack"]

Sequence = NDArray[np.int64]
"""Indices of the documents of one sequence; a single one without packing."""

# Packing looks at so many documents at a time: enough to fill sequences, few enough to keep the order random.
_WINDOW = 4096
# Documents of like length are looked for among those of so many steps (transformers' `LengthGroupedSampler` takes 50).
_STEPS = 50


@dataclass(frozen=True)
class Step:
    """One optimizer step: the documents of each of this rank's micro-batches, and counts over all ranks."""

    micro_batches: tuple[Sequence, ...]
    tokens: int
    targets: int


class Order:
    """The order of the training documents over steps, micro-batches and data-parallel ranks.

    A step's `batch_size` sequences are dealt out micro-batch by micro-batch, rank by rank. Epochs follow
    each other without a gap; each has its own order.
    """

    def __init__(self, documents: Documents, *, batch_size: int, micro_batch_size: int, dp_rank: int = 0,
                 dp_size: int = 1, seed: int = 0, shuffle: bool = True, packing: int | None = None,
                 group_by_length: bool = False):
        """`packing` is the length of packed sequences in tokens; None packs nothing. `group_by_length` fills a step
        with documents of like length; packed sequences need none of it."""
        self._lengths, self._targets = documents.lengths, documents.targets
        self._batch_size, self._micro, self._packing = batch_size, micro_batch_size, packing
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._seed, self._shuffle, self._group = seed, shuffle, group_by_length

    def sequences(self) -> int:
        """How many sequences the first pass over the documents makes."""
        return len(next(self._epochs()))

    def steps(self, start: int = 0) -> Iterator[Step]:
        """The steps from `start` (counted from 0) on, without end."""
        stream = itertools.chain.from_iterable(self._epochs())
        for _ in range(start * self._batch_size):
            next(stream)
        while True:
            yield self._step([next(stream) for _ in range(self._batch_size)])

    def _step(self, batch: list[Sequence]) -> Step:
        stride = self._micro * self._dp_size
        micro_batches = tuple(
            np.concatenate(batch[begin : begin + self._micro])
            for begin in range(self._dp_rank * self._micro, len(batch), stride)
        )
        everything = np.concatenate(batch)
        return Step(micro_batches, int(self._lengths[everything].sum()), int(self._targets[everything].sum()))

    def _epochs(self) -> Iterator[list[Sequence] | NDArray[np.int64]]:
        dealt = 0
        for epoch in itertools.count():
            rng = np.random.default_rng([self._seed, epoch])
            order = rng.permutation(len(self._lengths)) if self._shuffle else np.arange(len(self._lengths))
            if self._packing is None:
                if self._group:
                    order = self._grouped(order, -dealt % self._batch_size, rng)
                dealt += len(order)
                yield order[:, None]
            else:
                sequences = pack(self._lengths, order, self._packing)
                if self._shuffle:
                    sequences = [sequences[index] for index in rng.permutation(len(sequences))]
                yield sequences

    def _grouped(self, order: NDArray[np.int64], lead: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """The order with documents of like length in every step: those of many steps are sorted, longest first, and the
        steps shuffled. `lead` documents complete the step that the last epoch began; they, and those of the step that
        this one leaves open, are as they come."""
        size = self._batch_size
        full = max(0, len(order) - lead) // size * size
        steps: list[NDArray[np.int64]] = []
        for begin in range(lead, lead + full, _STEPS * size):
            window = order[begin : min(begin + _STEPS * size, lead + full)]
            steps += [*window[np.argsort(-self._lengths[window], kind="stable")].reshape(-1, size)]
        if self._shuffle:
            steps = [steps[index] for index in rng.permutation(len(steps))]
        return np.concatenate([order[:lead], *steps, order[lead + full :]])


def pack(lengths: NDArray[np.int64], order: NDArray[np.int64], capacity: int) -> list[Sequence]:
    """Best-fit bin packing over windows of `order`: sequences of at most `capacity` tokens.

    Each document goes to the sequence that it fills best (Johnson 1974). The long ones go first, longest
    first; the short ones follow in the given order, since packing them by length too would put the like
    together and make gradients noisier than a random draw's.
    """
    sequences: list[Sequence] = []
    for begin in range(0, len(order), _WINDOW):
        window = order[begin : begin + _WINDOW]
        sort_key = np.where(lengths[window] > capacity // 4, -lengths[window], 0)
        long_first = window[np.argsort(sort_key, kind="stable")]
        free: list[tuple[int, int]] = []  # (tokens left, bin), sorted
        bins: list[list[int]] = []
        for document in long_first.tolist():
            length = int(lengths[document])
            at = bisect.bisect_left(free, (length, -1))
            if at == len(free):
                bins.append([document])
                left, index = capacity - length, len(bins) - 1
            else:
                left, index = free.pop(at)
                bins[index].append(document)
                left -= length
            bisect.insort(free, (left, index))
        sequences += [np.array(bin_, dtype=np.int64) for bin_ in bins]
    return sequences
