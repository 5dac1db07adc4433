"""The sequences of an experiment as transformers' Trainer takes them: padded rows, in our order."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from collie_lab.cells import Experiment
from collie_lab.data import Documents, Order, room_for_documents, sequence_length

__all__ = ["Rows", "collator"]

Row = dict[str, Tensor]


class Rows(Dataset[Row]):
    """A row for every sequence of every step, made when it is asked for.

    Attributes:
        tokens, attended: of each step, over all ranks: tokens of documents; their squared lengths, summed.
        targets: tokens of each step that the loss counts.
    """

    def __init__(self, experiment: Experiment, documents: Documents, context: int | None):
        training, data = experiment.training, experiment.data
        order = Order(documents, batch_size=training.batch_size, micro_batch_size=1, seed=training.seed,
                      shuffle=data.shuffle, group_by_length=data.group_by_length,
                      packing=sequence_length(data, room_for_documents(experiment, context)) if data.packing else None)
        steps = list(itertools.islice(order.steps(), training.steps))
        self._documents = documents
        self._sequences = [sequence for step in steps for sequence in step.micro_batches]
        self.tokens = [step.tokens for step in steps]
        self.targets = [step.targets for step in steps]
        self.attended = [sum(int((documents.lengths[sequence] ** 2).sum()) for sequence in step.micro_batches)
                         for step in steps]

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> Row:
        """The documents of a sequence one after another; labels are -100 where the loss does not count.

        Positions begin anew with every document: from this transformers makes the mask that keeps them apart.
        """
        documents = self._documents
        spans = [slice(documents.offsets[i], documents.offsets[i + 1]) for i in self._sequences[index]]
        ids = _joined(documents.tokens, spans).long()
        return {"input_ids": ids, "labels": torch.where(_joined(documents.learned, spans), ids, -100),
                "position_ids": torch.cat([torch.arange(span.stop - span.start) for span in spans])}


def _joined(array: NDArray[np.generic], spans: list[slice]) -> Tensor:
    return torch.from_numpy(np.concatenate([array[span] for span in spans]))


def collator(*, packed: bool, width: int | None = None) -> Callable[[list[Row]], Row]:
    """What puts the rows of a micro-batch together, padded to the longest, or to `width`.

    Packed: the padding is a document of its own. Else there is a mask in the place of positions.
    """
    def collate(rows: list[Row]) -> Row:
        names = ("input_ids", "labels", "position_ids") if packed else ("input_ids", "labels")
        batch = {name: _padded([row[name] for row in rows], -100 if name == "labels" else 0, width) for name in names}
        if not packed:
            batch["attention_mask"] = _padded([torch.ones_like(row["input_ids"]) for row in rows], 0, width)
        return batch

    return collate


def _padded(rows: list[Tensor], value: int, width: int | None) -> Tensor:
    padded = pad_sequence(rows, batch_first=True, padding_value=value)
    return padded if width is None else torch.nn.functional.pad(padded, (0, width - padded.shape[1]), value=value)
