"""A plan in an instant: the memory of a step by arithmetic alone, for models of the Llama kind.

Neither torch nor a process is needed. What a rank keeps follows from the shapes of its parameters; what a step makes
and frees, from the sizes of its operations, one after the other (`_llama.py`). Layers are alike, so two small depths
give every moment of a step at any depth, and the peak is the largest of these moments.
"""

from __future__ import annotations

from collections.abc import Iterator
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
)
from collie_lab.data.hub import model_config
from collie_lab.planning._fsdp import Sharded
from collie_lab.planning._llama import Forward, Model, Shape
from collie_lab.planning._roles import ROLES, Role
from collie_lab.planning._sizes import Memory, Parameter, Peak, Storage, Tape
from collie_lab.planning.gpus import GPU, find_gpu
from collie_lab.planning.plan import CONTEXT, GRANULE, check_plan, longest_document

__all__ = ["FAMILIES", "Estimate", "estimate"]

#: The families whose layers are written down in `_llama.py`.
FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")

#: Depths that are run: in the larger one there is a layer that is neither near the first nor near the last.
_DEPTHS: Final = (4, 5)

#: fp32 numbers that a rule keeps of each parameter; `optim.rules`.
_STATES: Final[dict[type[RuleCell], int]] = {AdamW: 2, Lion: 1, Adan: 4, Lomo: 0, AdaLomo: 0}
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
        from collie_lab.view.units import bytes_text

        parts = ", ".join(f"{role} {bytes_text(size)}" for role, size in self.components.items() if size)
        verdict = "" if self.gpu is None else f", {'fits' if self.fits else 'does not fit'} on {self.gpu.name} " \
            f"({bytes_text(self.gpu.memory)})"
        return f"peak {bytes_text(self.peak_bytes)} a rank{verdict}, in the {self.moment}: {parts}"


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
    total, components, moment = _deepened(cells, _shape(config), length, GRANULE if chosen else 1)
    named = {str(role): size for role, size in components.items()}
    if chosen:
        named["workspace"] = chosen.workspace
    return Estimate(experiment, chosen, length, total + named.get("workspace", 0), named, moment)


def _deepened(cells: Experiment, shape: Shape, length: int, granule: int) -> tuple[int, dict[Role, int], str]:
    """The peak of a model as deep as it is, from models of two small depths."""
    if shape.layers <= _DEPTHS[1]:
        peaks = _moments(cells, shape, length, granule)
    else:
        less, more = (_moments(cells, replace(shape, layers=depth), length, granule) for depth in _DEPTHS)
        peaks = {moment: _extended(less[moment], more[moment], shape.layers - _DEPTHS[0])
                 for moment in less.keys() & more.keys()}
    moment = max(peaks, key=lambda name: peaks[name][0])
    return *peaks[moment], moment


def _extended(less: Peak, more: Peak, times: int) -> Peak:
    def extend(before: int, after: int) -> int:
        return before + times * (after - before)

    return extend(less[0], more[0]), {role: extend(less[1][role], more[1][role]) for role in ROLES}


def _moments(cells: Experiment, shape: Shape, length: int, granule: int) -> dict[str, Peak]:
    """The most bytes of every moment of a step. Layers are named by their distance from the nearer end."""
    step = _Step(cells, shape, length, granule)
    step.run()
    return {_from_the_ends(moment, shape.layers): peak for moment, peak in step.memory.peaks.items() if moment}


def _from_the_ends(moment: str, layers: int) -> str:
    """`layer 79` of 80 as `last layer`."""
    before, layer, number = moment.rpartition("layer ")
    if not layer:
        return moment
    index = int(number)
    names = {0: "first", 1: "second", layers - 2: "last but one", layers - 1: "last"}
    return f"{before}{names.get(index, f'{index + 1}th')} layer"


class _Step:
    """What a rank holds, and one step of it."""

    def __init__(self, cells: Experiment, shape: Shape, length: int, granule: int):
        training, self._parallel, self._optimizer = cells.training, cells.parallel, cells.optimizer
        self.memory = Memory(granule)
        self._length, self._recompute = length, training.recompute == "full"
        kept = 2 if training.weights == "bf16" else 4
        sharded = self._parallel.zero > 0 and self._parallel.dp > 1
        compute = 2 if training.precision == "bf16" else kept
        adapter = cells.adapter if isinstance(cells.adapter, LoRA) else None
        names = set(adapter.targets or shape.linears()) if adapter else set()
        self.model = Model(
            shape, kept, compute, autocast=training.precision == "bf16" and not sharded, gathered=sharded,
            trained=adapter is None, rank=adapter.r if adapter else 0, targets=names.__contains__)
        share = max(1, training.batch_size // self._parallel.dp)
        micro = self._parallel.micro_batch_size(training.batch_size, training.micro_batch_size)
        self._batches = [micro] * (share // micro) + ([share % micro] if share % micro else [])
        self._holds = self._optimizer.in_backward and getattr(self._optimizer, "accumulate", None) == "hold"
        self._updates = self._optimizer.in_backward
        ranks = (self._parallel.shard or self._parallel.dp) if sharded else 1
        self._kept = [self.memory.new(each.count * each.kept // ranks) for each in self.model.parameters()]
        trained = [each for each in self.model.parameters() if each.trained]
        self._states = [self.memory.new(_state_bytes(self._optimizer, each) // ranks, "optimizer")
                        for each in trained]
        self._replicated = self._parallel.dp > 1 and not sharded and not self._optimizer.in_backward
        self._buckets = [self.memory.new(each.count * each.width, "gradients") for each in trained] \
            if self._replicated else []
        self._sharded = Sharded(
            self.memory, self.model.outer(), [block.parameters() for block in self.model.blocks], ranks=ranks,
            kept=kept, width=compute, reduced=4 if training.precision == "bf16" else kept,
            reshard=self._parallel.zero == 3, in_backward=self._optimizer.in_backward) if sharded else None

    def run(self) -> None:
        """Forward and backward of the micro-batches. An update makes nothing that counts."""
        for number, documents in enumerate(self._batches[:1] + self._batches[-1:] if len(self._batches) > 1
                                           else self._batches):
            self._updates = self._optimizer.in_backward and (not self._holds or number > 0 or len(self._batches) == 1)
            tape = Tape(self.memory, self._take)
            with self.memory.as_role("activations"):
                loss = Forward(self.model, tape, documents, self._length, recompute=self._recompute,
                               sharded=self._sharded).run()
            with self.memory.as_role("temporaries"):
                tape.backward(loss, self.memory.new(loss.size))
                if self._sharded is not None:
                    self._sharded.finish()

    def _take(self, parameter: Parameter, gradient: Storage) -> None:
        """A gradient is complete."""
        if self._sharded is not None:
            parameter.gradient = gradient
            return
        if self._replicated:  # copied into its bucket
            return
        gradient.mark("gradients")
        if self._updates:
            parameter.gradient = None
        elif parameter.gradient is None:
            parameter.gradient = gradient


def _state_bytes(cell: Any, parameter: Parameter) -> int:
    """What the optimizer keeps of a parameter, with what keeps small updates of a bf16 weight."""
    rounding = cell.rounding or ("stochastic" if isinstance(cell, AdaLomo) else "master")
    beside = _BESIDE[rounding] * parameter.count if parameter.kept == 2 else 0
    if isinstance(cell, SGD):
        return beside + 4 * parameter.count * bool(cell.momentum)
    if isinstance(cell, AdaLomo):
        return beside + 4 * sum(parameter.shape)  # of a matrix a row and a column, of a vector all of it
    return beside + 4 * _STATES[type(cell)] * parameter.count


def _shape(config: dict[str, Any]) -> Shape:
    """The numbers of a configuration.

    Raises:
        CellError: one is missing.
    """
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
    if missing := [name for name in needed if not isinstance(config.get(name), int)]:
        raise CellError([Problem("Model", "config", f"the configuration does not say {', '.join(missing)}",
                                 "give them with Model(..., config={...}); exp.plan() knows a family's defaults")])
    hidden, intermediate, layers, vocabulary, heads = (config[name] for name in needed)
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
    if not isinstance(cells.optimizer, (*_STATES, SGD)):
        yield Problem("Experiment", "optimizer", f"no formula for {type(cells.optimizer).__name__}", plan)
    if cells.training.loss is not None:
        yield Problem("Training", "loss", "what a loss of one's own takes is not known", plan)
    if isinstance(window := config.get("sliding_window"), int) and window < length \
            and config.get("use_sliding_window", True):
        yield Problem("Model", "config", f"attention in a window of {window} of {length} tokens makes masks", plan)
    if config.get("attention_dropout"):
        yield Problem("Model", "config", "attention dropout draws masks", plan)
    sharded = parallel.zero > 0 and parallel.dp > 1
    if parallel.tp * parallel.pp > 1:
        yield Problem("Parallel", "tp" if parallel.tp > 1 else "pp", "no formula for it yet", plan)
    if parallel.shard is not None:
        yield Problem("Parallel", "shard", "no formula for replicas of shards", plan)
    if sharded and cells.training.micro_batch_size is not None \
            and cells.training.micro_batch_size * parallel.dp < cells.training.batch_size:
        yield Problem("Training", "micro_batch_size", "no formula for gradients that pile up under FSDP2", plan)
