"""The size of a model and of its training state, without any weights; what `collie_lab.size` asks a process for."""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor

from collie_lab.cells import Experiment, QLoRA, RuleCell
from collie_lab.optim import build_rule
from collie_lab.size import Size, as_json
from collie_lab.training.adapters import adapt
from collie_lab.training.quantize import quantize_linears, quantized_bytes
from collie_lab.training.weights import blueprint

__all__ = ["measure_size"]


def measure_size(experiment: Experiment) -> Size:
    """What a run of the experiment would hold, on one process.

    Raises:
        ValueError: a target or pattern that names nothing in the model.
    """
    model, adapter, training = blueprint(experiment.model), experiment.adapter, experiment.training
    if isinstance(adapter, QLoRA):
        quantize_linears(model, adapter, torch.float32)
    root = model if adapter is None else adapt(model, adapter, training.steps)
    for parameter in root.parameters():  # weights take the run's type; what an adapter adds is there, in its own
        if parameter.device.type == "meta" and not hasattr(parameter, "quant_type") and training.weights == "bf16":
            parameter.data = parameter.data.to(torch.bfloat16)
    trained = [parameter for parameter in root.parameters() if parameter.requires_grad]
    everything = list(root.parameters())
    return Size(
        parameters=sum(parameter.numel() for parameter in everything),
        trainable=sum(parameter.numel() for parameter in trained),
        weight_bytes=sum(quantized_bytes(parameter) if hasattr(parameter, "quant_type") else parameter.nbytes
                         for parameter in everything),
        gradient_bytes=0 if experiment.optimizer.in_backward else sum(parameter.nbytes for parameter in trained),
        state_bytes=_states(experiment.optimizer, trained) if isinstance(experiment.optimizer, RuleCell) else None,
    )


def _states(cell: RuleCell, trained: list[Tensor]) -> int:
    """Of a rule's states and, for bf16 weights, what keeps small updates."""
    rule, _ = build_rule(cell)
    beside = {"master": 4, "kahan": 2, "stochastic": 0}[cell.rounding or rule.rounding]
    total = 0
    for parameter in trained:
        states = rule.init(torch.empty_like(parameter, dtype=torch.float32, device="meta"))
        total += sum(state.nbytes for state in states.values())
        total += beside * parameter.numel() if parameter.dtype == torch.bfloat16 else 0
    return total


def main() -> None:
    """Read an experiment from standard input, write its size, or why there is none, as the last line of the output."""
    try:
        print("\n" + as_json(measure_size(Experiment.from_yaml(sys.stdin.read()))), end="")
    except (ValueError, OSError) as error:
        print("\n" + json.dumps({"error": str(error)}), end="")


if __name__ == "__main__":
    main()
