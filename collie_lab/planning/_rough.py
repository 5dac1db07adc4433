"""What a layout needs, within a quarter or so, in microseconds: to choose what is worth a dry run among thousands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from collie_lab.cells import Adafactor, AdaLomo, Adan, Experiment, Freeze, Lion, Lomo, Model, Optimizer, Parallel
from collie_lab.data.hub import text_fields
from collie_lab.gpus import GPU
from collie_lab.planning.rates import Rates
from collie_lab.planning.speed import bubble, wire_bytes
from collie_lab.size import find_size

__all__ = ["GAPS", "Shape", "rough_bytes", "rough_seconds"]

#: Families with gated feed-forward layers and nothing beside them: their size follows from the configuration.
_PLAIN: Final = ("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo2")
#: fp32 numbers that an optimizer keeps of each parameter; two for all others.
_STATES: Final[Mapping[type, int]] = {Lomo: 0, AdaLomo: 0, Adafactor: 0, Lion: 1, Adan: 4}
#: Adapters of LoRA's kind keep inputs of their own.
_ADAPTED: Final = 1.05
#: The share of activations that tensor-parallel ranks all keep whole: inputs of layers and norms (Korthikanti et al.,
#: arXiv 2205.05198, section 4.2).
_WHOLE: Final = 0.3
#: What the allocator holds beyond what tensors take: 2% to 8%, of AdamW with all activations 16%.
GAPS: Final = 1.05


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. `hidden`, `inner` (of the feed-forward layer) and `vocabulary` are widths."""

    parameters: int
    layers: int
    hidden: int
    inner: int
    vocabulary: int

    @classmethod
    def of(cls, model: Model, config: Mapping[str, Any]) -> Shape:
        """From the configuration; of families that it does not tell the size of, by building the model on meta."""
        config = text_fields(config)

        def number(*names: str, default: int = 0) -> int:
            return next((int(config[name]) for name in names if config.get(name)), default)

        hidden = number("hidden_size", "n_embd", "d_model")
        layers = number("num_hidden_layers", "n_layer", "num_layers", default=1)
        inner = number("intermediate_size", "n_inner", "ffn_dim", "d_ff", default=4 * hidden)
        vocabulary, heads = number("vocab_size"), number("num_attention_heads", "n_head", default=1)
        if config.get("model_type") in _PLAIN:
            head = number("head_dim", default=hidden // heads)
            attention = 2 * hidden * head * (heads + number("num_key_value_heads", default=heads))
            ends = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
            parameters = ends + layers * (attention + 3 * hidden * inner)
        else:
            parameters = find_size(Experiment(model=model.replace(init="random"))).parameters
        return cls(parameters, layers, hidden, inner, vocabulary)

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return (self.parameters - 2 * self.vocabulary * self.hidden) // self.layers


def rough_bytes(experiment: Experiment, shape: Shape, gpu: GPU, length: int) -> float:
    """What the driver will show of the worst rank's process, less CUDA's context."""
    cell, training, optimizer = experiment.parallel, experiment.training, experiment.optimizer
    own, layer = shape.parameters / (cell.tp * cell.pp), shape.layer / cell.tp
    trained = own if _trains_all(experiment) else 0.01 * own
    width = 2 if training.weights == "bf16" else 4
    shards = cell.dp if cell.zero else 1
    micro = cell.micro_batch_size(training.batch_size, training.micro_batch_size)
    piles_up = micro * cell.dp < training.batch_size
    held = own * width / (cell.dp if cell.zero == 3 else 1)
    held += trained * (_beside(optimizer, width) + 4 * _STATES.get(type(optimizer), 2)) / shards
    gradients = trained * width / shards
    if cell.zero and piles_up:
        gradients += trained * 4  # whole until the last micro-batch
    if optimizer.in_backward and getattr(optimizer, "accumulate", None) is None:
        gradients = 0.0
    if cell.zero == 3 and cell.pp == 1:
        held += 3 * layer * 2  # gathered
    elif cell.zero or (width == 4 and training.precision == "bf16" and training.recompute == "none"):
        held += own * 2  # gathered, or autocast's copies
    activations = _activations(experiment, shape, length)
    # The first backward pass begins without gradients, and ends without activations.
    most = activations + gradients if piles_up or cell.pp > 1 else max(activations, gradients + 4 * layer)
    return GAPS * (held + most) + gpu.workspace


def _beside(optimizer: Optimizer, width: int) -> int:
    """Bytes beside a bf16 weight that keep its small updates."""
    if width == 4 or isinstance(optimizer, AdaLomo):
        return 0
    return {"stochastic": 0, "kahan": 2}.get(getattr(optimizer, "rounding", None) or "master", 4)


def _activations(experiment: Experiment, shape: Shape, length: int) -> float:
    cell, training = experiment.parallel, experiment.training
    micro = cell.micro_batch_size(training.batch_size, training.micro_batch_size)
    tokens, layers = micro * length, shape.layers / cell.pp
    width = 2 if training.precision == "bf16" or training.weights == "bf16" else 4
    autocast = training.precision == "bf16" and training.weights == "fp32" and not cell.zero
    layer = tokens * width * ((17 if autocast else 12) * shape.hidden + 4 * shape.inner) * _cut(cell)
    layer *= 1.0 if _trains_all(experiment) else _ADAPTED
    flying = min(cell.pp, max(1, training.batch_size // cell.dp // micro))
    loss = 1.5 * tokens * shape.vocabulary * 4 / cell.tp
    if training.recompute == "none":
        return flying * layers * layer + loss
    kept = tokens * width * shape.hidden * (1 / cell.tp if cell.sequence_parallel else 1)
    return flying * layers * kept + max(layer, loss)


def _cut(cell: Parallel) -> float:
    """A tensor-parallel rank's share of the activations."""
    return 1 / cell.tp if cell.sequence_parallel else _WHOLE + (1 - _WHOLE) / cell.tp


def rough_seconds(experiment: Experiment, shape: Shape, rates: Rates, length: int) -> float:
    """Of an optimizer step, on one machine: large operations, weights and states once over, messages, the bubble."""
    cell, training = experiment.parallel, experiment.training
    micro = cell.micro_batch_size(training.batch_size, training.micro_batch_size)
    share, tokens = max(1, training.batch_size // cell.dp), micro * length
    count = -(-share // micro)
    own, layers = shape.parameters / (cell.tp * cell.pp), shape.layers / cell.pp
    passes = (3 if _trains_all(experiment) else 2) + (training.recompute == "full")
    product = 2.0 * tokens * shape.hidden * shape.inner / cell.tp  # FLOPs of one matrix product
    flops = 2.0 * passes * tokens * own + passes * 2.0 * tokens * length * shape.hidden * layers / cell.tp
    one = rates.seconds("matmul", training.precision, product)
    if one is None:
        return float("inf")
    busy = count * flops / product * one
    # What is element-wise moves the activations about three times (forward, backward and its temporaries).
    moved = 3 * count * layers * tokens * 2 * (12 * shape.hidden + 4 * shape.inner) * _cut(cell)
    states = own * 24 / (cell.dp if cell.zero else 1) if _trains_all(experiment) else 0
    busy += sum(rates.seconds("memory", training.precision, size) or 0.0 for size in (moved, states))
    if cell.pp > 1:
        waits = bubble(cell.schedule, cell.pp, count)
        busy /= 1 - waits
    return busy + _messages(experiment, shape, rates, tokens, count)


def _messages(experiment: Experiment, shape: Shape, rates: Rates, tokens: int, count: int) -> float:
    """Seconds of collectives that computation does not hide."""
    cell, training = experiment.parallel, experiment.training

    def seconds(kind: str, size: float, ranks: int) -> float:
        link = rates.links.get(kind) or rates.links.get("")
        return 0.0 if link is None or ranks == 1 else link(wire_bytes(kind, size, ranks))

    own, trained = shape.parameters / (cell.tp * cell.pp), _trains_all(experiment)
    gathered = own * 2 * (2 * count if cell.zero == 3 and cell.pp == 1 else 1)
    data = seconds("all_reduce", own * 4, cell.dp) if not cell.zero and trained else 0.0
    if cell.zero:
        data = seconds("all_gather", gathered, cell.dp)
        data += count * seconds("reduce_scatter", own * 4, cell.dp) if trained else 0.0
    hidden = tokens * shape.hidden * 2
    tensor = count * shape.layers / cell.pp * (6 if training.recompute == "full" else 4) \
        * seconds("all_reduce", hidden, cell.tp)
    stages = 2 * count * seconds("send", hidden, 2) if cell.pp > 1 else 0.0
    return (1 - rates.overlap) * data + tensor + stages


def _trains_all(experiment: Experiment) -> bool:
    return experiment.adapter is None or isinstance(experiment.adapter, Freeze)
