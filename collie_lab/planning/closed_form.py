"""A plan in an instant: the memory of a step by arithmetic alone, for models of the Llama kind.

Neither torch nor a process is needed. What a rank keeps follows from the shapes of its parameters; what a step makes
and frees, from the sizes of its operations, one after the other (`_forward.py`). Layers are alike, so two small depths
give every moment of a step at any depth, and the peak is the largest of these moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from collie_lab.cells import (
    SGD,
    AdaLomo,
    AdamW,
    Adan,
    CellError,
    Experiment,
    Lion,
    Lomo,
    LoRA,
    Problem,
    QLoRA,
    RuleCell,
    Sophia,
)
from collie_lab.data.hub import model_config
from collie_lab.gpus import GPU, find_gpu
from collie_lab.planning._forward import Forward
from collie_lab.planning._fsdp import Sharded, shard
from collie_lab.planning._llama import Model, Shape
from collie_lab.planning._moments import Peak, at_the_ends, deepened
from collie_lab.planning._roles import Role
from collie_lab.planning._sizes import Memory, Parameter, Storage, Tape
from collie_lab.planning._texts import uncompiled_text
from collie_lab.planning.plan import CONTEXT, GRANULE, check_plan, in_words, longest_document

__all__ = ["FAMILIES", "Estimate", "estimate"]

#: The families whose layers are written down in `_forward.py`.
FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")

#: Depths that are run: the least that have a layer between the first and the last.
_DEPTHS: Final = (3, 4)

#: fp32 numbers that a rule keeps of each parameter; `optim.rules`.
_STATES: Final[dict[type[RuleCell], int]] = {AdamW: 2, Lion: 1, Adan: 4, Sophia: 2, Lomo: 0, AdaLomo: 0}
#: Of a message of averaged gradients; `parallel.sharding`.
_BUCKET_BYTES: Final = 25 * 2**20
#: Bytes beside a bf16 weight.
_BESIDE: Final = {"master": 4, "kahan": 2, "stochastic": 0}


@dataclass(frozen=True)
class Estimate:
    """What an experiment will need, by arithmetic; for steps whose sequences are all of full length.

    Attributes:
        experiment: what was asked about.
        gpu: of which GPU; None: of a CPU.
        length: tokens of every sequence.
        peak_bytes: the most that tensors take of a rank's memory: `Plan.peak_bytes`.
        components: what the peak is made of.
        moment: when it is.
    """

    experiment: Experiment
    gpu: GPU | None
    length: int
    peak_bytes: int
    components: dict[str, int]
    moment: str

    @property
    def process_bytes(self) -> int | None:
        """The least that the driver will show of the process: with CUDA's context, without gaps between blocks."""
        return None if self.gpu is None else self.peak_bytes + CONTEXT

    @property
    def fits(self) -> bool | None:
        """Whether that is within the GPU's memory; None without one. A plan knows the gaps too."""
        return None if self.gpu is None or self.process_bytes is None else self.process_bytes <= self.gpu.memory

    def __repr__(self) -> str:
        return in_words(self.peak_bytes, self.gpu, self.fits, self.components, f", in the {self.moment}") \
            + uncompiled_text(self.experiment)


def estimate(experiment: Experiment, gpu: GPU | str | None = None) -> Estimate:
    """The memory of a step by arithmetic: milliseconds, for sweeps over many experiments.

    Args:
        gpu: a name of `GPUS`, or one of your own. Default: memory as it is measured on a CPU.

    Raises:
        CellError: as `plan`; and what no formula is known for: other families than `FAMILIES`, other adapters than
            LoRA, optimizers of other libraries, a loss of one's own, ... : `plan` runs them.
    """
    chosen = None if gpu is None else find_gpu(gpu)
    cells = check_plan(experiment)
    length = longest_document(experiment)
    config = model_config(cells.model)
    if refused := list(_refused(cells, config, length)):
        raise CellError(refused)
    total, components, moment = _peak(cells, _shape(config), length, chosen is not None)
    named = {str(role): size for role, size in components.items()}
    if chosen:
        named["workspace"] = chosen.workspace
    return Estimate(experiment, chosen, length, total + named.get("workspace", 0), named, moment)


def _peak(cells: Experiment, shape: Shape, length: int, on_gpu: bool) -> tuple[int, dict[Role, int], str]:
    """The peak of a model as deep as it is, from models of two small depths."""
    peaks: dict[str, Peak] | None = None
    if shape.layers > max(_DEPTHS):
        shallow = [_moments(cells, replace(shape, layers=depth), length, on_gpu) for depth in _DEPTHS]
        peaks = deepened(shallow, shape.layers - max(_DEPTHS))
    if peaks is None:
        peaks = _moments(cells, shape, length, on_gpu)
    moment = max(peaks, key=lambda name: peaks[name][0])
    return *peaks[moment], moment


def _moments(cells: Experiment, shape: Shape, length: int, on_gpu: bool) -> dict[str, Peak]:
    """The most bytes of every moment of a step."""
    step = _Step(cells, shape, length, on_gpu)
    step.run()
    return at_the_ends({moment: peak for moment, peak in step.memory.peaks.items() if moment}, shape.layers)


class _Step:
    """What a rank holds, and one step of it."""

    def __init__(self, cells: Experiment, shape: Shape, length: int, on_gpu: bool):
        training, self._parallel, self._optimizer = cells.training, cells.parallel, cells.optimizer
        self.memory = Memory(GRANULE if on_gpu else 1)
        self._length, self._steps, self._recompute = length, training.steps, training.recompute == "full"
        kept = 2 if training.weights == "bf16" else 4
        sharded = self._parallel.zero > 0 and self._parallel.dp > 1
        compute = 2 if training.precision == "bf16" else kept
        adapter = cells.adapter if isinstance(cells.adapter, LoRA) else None
        names = set(adapter.targets or shape.linears()) if adapter else set()
        tp, divides = self._parallel.tp, shape.vocabulary % self._parallel.tp == 0
        self.model = Model(
            shape.cut(tp, divides), kept, compute, autocast=training.precision == "bf16" and not sharded,
            gathered=sharded, cut=tp > 1, cut_vocabulary=tp > 1 and divides, trained=adapter is None,
            rank=adapter.r if adapter else 0, targets=names.__contains__)
        share = max(1, training.batch_size // self._parallel.dp)
        micro = self._parallel.micro_batch_size(training.batch_size, training.micro_batch_size)
        batches = [micro] * (share // micro) + ([share % micro] if share % micro else [])
        self._batches = batches if len(batches) < 3 else [*batches[:2], batches[-1]]  # the others are as the second
        self._holds = self._optimizer.in_backward and getattr(self._optimizer, "accumulate", None) == "hold"
        self._last = self._drawn = False  # whether a pass is that of the last micro-batch, of Sophia's Hessian
        ranks = self._parallel.dp if sharded else 1
        self._kept = [self.memory.new(shard(each, ranks) * each.kept) for each in self.model.parameters()]
        # The angles of positions: two buffers, of a number for every two of a head.
        self._kept += [self.memory.new(2 * shape.head_size, "weights") for _ in range(2)]
        trained = [each for each in self.model.parameters() if each.trained]
        self._states = [self.memory.new(_state_bytes(self._optimizer, each, shard(each, ranks)), "optimizer")
                        for each in trained]
        self._states.append(self.memory.new(4, "optimizer"))  # the gradient's norm
        replicated = self._parallel.dp > 1 and not sharded and not self._optimizer.in_backward
        self._by_hand = replicated and tp > 1  # else by torch's DistributedDataParallel, in buckets
        self._buckets = [self.memory.new(each.count * each.width, "gradients") for each in trained] \
            if replicated and tp == 1 else []
        self._sharded = Sharded(
            self.memory, self.model.outer(), [block.parameters() for block in self.model.blocks], ranks=ranks,
            kept=kept, width=compute, reduced=4 if training.precision == "bf16" else kept,
            reshard=self._parallel.zero == 3, in_backward=self._optimizer.in_backward,
            copied=not on_gpu) if sharded else None

    def run(self) -> None:
        """Forward and backward of all micro-batches that differ, and Sophia's. An update makes nothing that counts."""
        self._passes()
        if self._by_hand:
            self.memory.moment = "exchange"
            self.memory.new(_largest_bucket(self.model.parameters()), "communication")
        if isinstance(self._optimizer, Sophia) and self._optimizer.hessian_every <= self._steps:
            self._refresh()

    def _passes(self, drawn: bool = False) -> None:
        """The first micro-batch, and others on top of its gradients."""
        self._drawn = drawn
        for number, documents in enumerate(self._batches, 1):
            self._last = number == len(self._batches)
            self._pass(documents)

    def _pass(self, documents: int) -> None:
        tape = Tape(self.memory, self._take)
        with self.memory.as_role("activations"):
            loss = Forward(self.model, tape, documents, self._length, recompute=self._recompute,
                           sharded=self._sharded, drawn=self._drawn).run()
        with self.memory.as_role("temporaries"):
            tape.backward(loss, self.memory.new(loss.size))
            if self._sharded is not None:
                self._sharded.finish()

    def _refresh(self) -> None:
        """Sophia's Hessian: a pass of its own over all micro-batches, when the step's gradients are gone."""
        for parameter in self.model.parameters():
            parameter.gradient = None
        all_decay, embedding = self._optimizer.decay == "all", self.model.embedding
        trained = sorted((each for each in self.model.parameters() if each.trained), key=lambda each: (
            not all_decay and (each is embedding or len(each.shape) < 2)))  # as `optim.groups` has them
        before, self.memory.peaks = self.memory.peaks, {}
        self._passes(drawn=True)
        self.memory.moment = "update"
        with self.memory.as_role("temporaries"):
            for parameter in () if self._optimizer.in_backward else trained:
                self._square(parameter)
                parameter.gradient = None
            # The share that is not clipped: |m|, ρh and where the one is less.
            most = max(each.count for each in trained)
            self.memory.beside(4 * most, 4 * most, size=most)
        self.memory.peaks = before | {f"Hessian: {moment}": peak for moment, peak in self.memory.peaks.items()}

    def _square(self, parameter: Parameter) -> None:
        """A gradient goes into the Hessian: one that is not fp32 is made so, for either factor."""
        if parameter.width != 4:
            self.memory.beside(4 * parameter.count, size=4 * parameter.count)

    def _take(self, parameter: Parameter, gradient: Storage) -> None:
        """A gradient is complete: added to what is there, and in the end used or, of replicas, copied into a bucket."""
        if self._sharded is not None:
            parameter.gradient = gradient
            return
        gradient.mark("gradients")
        used = self._optimizer.in_backward and (self._last or not self._holds)
        if used and self._drawn:
            self._square(parameter)
        if used or (self._buckets and self._last):
            parameter.gradient = None
        elif parameter.gradient is None:
            parameter.gradient = gradient


def _state_bytes(cell: Any, parameter: Parameter, count: int) -> int:
    """What the optimizer keeps of `count` numbers of a parameter, with what keeps small updates of a bf16 weight."""
    rounding = cell.rounding or ("stochastic" if isinstance(cell, AdaLomo) else "master")
    beside = _BESIDE[rounding] * count if parameter.kept == 2 else 0
    if isinstance(cell, SGD):
        return beside + 4 * count * bool(cell.momentum)
    if isinstance(cell, AdaLomo):  # of a matrix a row and a column, of a vector all of it
        return beside + 4 * (count // math.prod(parameter.shape[1:]) + sum(parameter.shape[1:]))
    return beside + 4 * _STATES[type(cell)] * count


def _largest_bucket(parameters: Sequence[Parameter]) -> int:
    """Bytes of the largest message in which several gradients are averaged; see `parallel.sharding.average_all`."""
    largest = size = count = 0
    for each in (parameter.count * parameter.width for parameter in parameters if parameter.trained):
        if count and size + each > _BUCKET_BYTES:
            size = count = 0
        size, count = size + each, count + 1
        if count > 1:
            largest = max(largest, size)
    return largest


def _shape(config: dict[str, Any]) -> Shape:
    """The numbers of a configuration.

    Raises:
        CellError: one is missing.
    """
    needed = ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads"]
    if config["model_type"] != "llama":  # the others have defaults that are not the number of heads
        needed.append("num_key_value_heads")
    if missing := [name for name in needed if not isinstance(config.get(name), int)]:
        raise CellError([Problem("Model", "config", f"the configuration does not say {', '.join(missing)}",
                                 "give them with Model(..., config={...}); exp.plan() knows a family's defaults")])
    hidden, intermediate, layers, vocabulary, heads = (config[name] for name in needed[:5])
    family, bias = config["model_type"], bool(config.get("attention_bias"))
    biases = (True, True, True, False) if family == "qwen2" else (bias,) * 4
    return Shape(hidden, intermediate, layers, vocabulary, heads, config.get("num_key_value_heads") or heads,
                 config.get("head_dim") or (128 if family == "qwen3" else hidden // heads),
                 tied=bool(config.get("tie_word_embeddings")), attention_bias=biases,
                 mlp_bias=bool(config.get("mlp_bias")), head_norms=family == "qwen3")


def _refused(cells: Experiment, config: dict[str, Any], length: int) -> Iterator[Problem]:
    """What no formula is known for. Never a silent zero."""
    plan, family, parallel = "exp.plan() runs it", config.get("model_type"), cells.parallel
    if family not in FAMILIES:
        yield Problem("Model", "source", f"no formula for the family {family!r}; there is one for "
                      + ", ".join(FAMILIES), plan)
    if cells.adapter is not None and (not isinstance(cells.adapter, LoRA) or isinstance(cells.adapter, QLoRA)
                                      or cells.adapter.dora):
        yield Problem("Experiment", "adapter", f"no formula for {type(cells.adapter).__name__}, but for LoRA", plan)
    elif isinstance(cells.adapter, LoRA):
        if cells.adapter.dropout:
            yield Problem("LoRA", "dropout", "no formula for the masks of dropout", plan)
        if strange := set(cells.adapter.targets or ()) - set(Shape.LINEARS):
            yield Problem("LoRA", "targets", f"no formula for {sorted(strange)[0]!r} beside a Llama's matrices", plan)
    if not isinstance(cells.optimizer, (*_STATES, SGD)):
        yield Problem("Experiment", "optimizer", f"no formula for {type(cells.optimizer).__name__}", plan)
    if cells.training.loss is not None:
        yield Problem("Training", "loss", "what a loss of one's own takes is not known", plan)
    window = config.get("sliding_window", 4096 if family == "mistral" else None)
    if window is not None and window < length and config.get("use_sliding_window", True):
        yield Problem("Model", "config", f"attention in a window of {window} of {length} tokens makes masks", plan)
    if config.get("attention_dropout"):
        yield Problem("Model", "config", "attention dropout draws masks", plan)
    sharded = parallel.zero > 0 and parallel.dp > 1
    if sharded and isinstance(cells.optimizer, Sophia):
        yield Problem("Experiment", "optimizer", "no formula for Sophia's Hessian under FSDP2", plan)
    if parallel.pp > 1:
        yield Problem("Parallel", "pp", "no formula for pipelines", plan)
    if parallel.sequence_parallel:
        yield Problem("Parallel", "sequence_parallel", "no formula for pieces of the sequence", plan)
    if parallel.tp > 1 and (cells.adapter is not None or config.get("attention_bias") or config.get("mlp_bias")):
        yield Problem("Parallel", "tp", "no formula for adapters, or biases of the output's matrix, in pieces", plan)
    if parallel.shard is not None:
        yield Problem("Parallel", "shard", "no formula for replicas of shards", plan)
    if sharded and cells.training.micro_batch_size is not None \
            and cells.training.micro_batch_size * parallel.dp < cells.training.batch_size:
        yield Problem("Training", "micro_batch_size", "no formula for gradients that pile up under FSDP2", plan)
