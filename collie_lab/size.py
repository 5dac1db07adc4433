"""How large an experiment's model is and how much of it is trained, before it is launched.

A process of its own builds the model without weights: the notebook's kernel imports no torch for it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from collie_lab.cells import CellError, Experiment, Problem

__all__ = ["Size", "find_size"]


@dataclass(frozen=True)
class Size:
    """A model and what is trained of it, whole: a layout shares it out.

    Attributes:
        parameters: numbers in the model, an adapter's included.
        trainable: those that are trained.
        weight_bytes: of all parameters, as the run keeps them.
        gradient_bytes: of all gradients; 0 where each is freed when it is used, in the backward pass.
        state_bytes: what the optimizer remembers; None for an optimizer of another library.
        matrices: of the trained numbers those in 2-D weights of blocks, which Muon, GaLore and APOLLO are for.
    """

    parameters: int
    trainable: int
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int | None
    matrices: int

    @property
    def share(self) -> float:
        """The trained share of the parameters."""
        return self.trainable / self.parameters

    def __str__(self) -> str:
        states = "?" if self.state_bytes is None else f"{self.state_bytes / 1e6:,.1f}"
        return (f"{self.trainable:,} of {self.parameters:,} parameters are trained ({100 * self.share:.2f}%): weights "
                f"{self.weight_bytes / 1e6:,.1f} MB, gradients {self.gradient_bytes / 1e6:,.1f} MB, optimizer "
                f"{states} MB")

    __repr__ = __str__


def find_size(experiment: Experiment) -> Size:
    """The size of an experiment's model; of an `ExtendTokenizer` with a row for every token that it is to learn.

    Raises:
        CellError: a target or pattern that names nothing in the model, or a model that cannot be built.
    """
    training = experiment.training
    bare = Experiment(model=experiment.model, adapter=experiment.adapter, optimizer=experiment.optimizer,
                      training={"weights": training.weights, "steps": training.steps, "precision": training.precision})
    process = subprocess.run([sys.executable, "-m", "collie_lab.training.size"], input=bare.to_yaml(), text=True,
                             capture_output=True, check=False)
    answer = json.loads(process.stdout.rpartition("\n")[2] or "{}")
    if "error" in answer or process.returncode:
        cell = "Model" if experiment.adapter is None else type(experiment.adapter).__name__
        message, field = answer.get("error") or process.stderr.strip().rpartition("\n")[2], ""
        if message.startswith(f"{cell}."):  # it names the field
            field, _, message = message.removeprefix(f"{cell}.").partition(": ")
        raise CellError([Problem(cell, field, message)])
    return Size(**answer)


def as_json(size: Size) -> str:
    """One line, for the process that asked."""
    return json.dumps(asdict(size))
