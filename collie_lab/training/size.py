"""The size of a model and of its training state, without any weights; what `collie_lab.size` asks a process for."""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor, nn

from collie_lab.cells import Experiment, QLoRA, RuleCell, Training
from collie_lab.data import expected_extension
from collie_lab.optim import build_rule
from collie_lab.optim.library import block_matrices
from collie_lab.size import Size, as_json
from collie_lab.training.adapters import adapt
from collie_lab.training.quantize import quantize_linears, quantized_bytes
from collie_lab.training.weights import blueprint

__all__ = ["measure_size", "size_of"]


def measure_size(experiment: Experiment) -> Size:
    """What a run of the experiment would hold, on one process.

    Raises:
        ValueError: a target or pattern that names nothing in the model.
        CellError: the model has no tokenizer that could be extended.
    """
    model, adapter = blueprint(experiment.model, expected_extension(experiment.model)), experiment.adapter
    if isinstance(adapter, QLoRA):
        quantize_linears(model, adapter, torch.float32)
    return size_of(model if adapter is None else adapt(model, adapter, experiment.training.steps), experiment)


def size_of(root: nn.Module, experiment: Experiment) -> Size:
    """The size of a whole model, adapted, whose weights are on meta still."""
    everything, matrices = list(root.parameters()), block_matrices(root)
    trained = [parameter for parameter in everything if parameter.requires_grad]
    types = {parameter: _type(parameter, experiment.training) for parameter in everything}
    return Size(
        parameters=sum(parameter.numel() for parameter in everything),
        trainable=sum(parameter.numel() for parameter in trained),
        weight_bytes=sum(quantized_bytes(parameter) if hasattr(parameter, "quant_type")
                         else parameter.numel() * types[parameter].itemsize for parameter in everything),
        gradient_bytes=0 if experiment.optimizer.in_backward
        else sum(parameter.numel() * types[parameter].itemsize for parameter in trained),
        state_bytes=_states(experiment.optimizer, [(parameter, types[parameter]) for parameter in trained])
        if isinstance(experiment.optimizer, RuleCell) else None,
        matrices=sum(parameter.numel() for parameter in trained if parameter in matrices),
    )


def _type(parameter: Tensor, training: Training) -> torch.dtype:
    """How a run keeps it: weights take the run's type; what an adapter adds is there already, in its own."""
    if parameter.device.type == "meta" and not hasattr(parameter, "quant_type") and training.weights == "bf16":
        return torch.bfloat16
    return parameter.dtype


def _states(cell: RuleCell, trained: list[tuple[Tensor, torch.dtype]]) -> int:
    """Of a rule's states and, for bf16 weights, what keeps small updates."""
    rule, _ = build_rule(cell)
    beside = {"master": 4, "kahan": 2, "stochastic": 0}[cell.rounding or rule.rounding]
    total = 0
    for parameter, dtype in trained:
        states = rule.init(torch.empty_like(parameter, dtype=torch.float32, device="meta"))
        total += sum(state.nbytes for state in states.values())
        total += beside * parameter.numel() if dtype == torch.bfloat16 else 0
    return total


def main() -> None:
    """Read an experiment from standard input, write its size, or why there is none, as the last line of the output."""
    try:
        print("\n" + as_json(measure_size(Experiment.from_yaml(sys.stdin.read()))), end="")
    except (ValueError, OSError) as error:
        print("\n" + json.dumps({"error": str(error)}), end="")


if __name__ == "__main__":
    main()
