"""From passes over the data to optimizer steps."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from collie_lab.cells import Experiment
from collie_lab.data.documents import Documents
from collie_lab.data.hub import context_length, model_config
from collie_lab.data.order import Order
from collie_lab.data.prepare import prepare, room_for_documents, sequence_length
from collie_lab.folder import RunFolder

__all__ = ["steps_for"]


def steps_for(experiment: Experiment, epochs: float) -> int:
    """Optimizer steps of so many passes over the training documents, which it prepares; rounded up.

    Packing draws anew in every epoch, and may fill a sequence more or less; the first counts.

    Raises:
        ValueError: no positive number of epochs.
        CellError: as from `prepare`.
    """
    if not epochs > 0:
        raise ValueError(f"epochs={epochs}: a positive number of passes")
    data, training = experiment.data, experiment.training
    with tempfile.TemporaryDirectory() as folder:
        prepare(experiment.replace(evaluate=()), RunFolder(folder))
        room = room_for_documents(experiment, context_length(model_config(experiment.model)))
        order = Order(Documents.load(Path(folder) / "data" / "train"), batch_size=training.batch_size,
                      micro_batch_size=training.batch_size, seed=training.seed, shuffle=data.shuffle,
                      packing=sequence_length(data, room) if data.packing else None)
        return math.ceil(round(epochs * order.sequences() / training.batch_size, 9))
