"""The forecast of an experiment that has not run."""

from __future__ import annotations

import functools
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from collie_lab.cells import (
    AdaLoRA,
    CellError,
    Experiment,
    ExtendTokenizer,
    Model,
    NewTokenizer,
    Problem,
    QLoRA,
    RandomTokens,
    Sophia,
)
from collie_lab.check import check_cells
from collie_lab.data.hub import context_length, model_config
from collie_lab.data.prepare import room_for_documents, sequence_length
from collie_lab.gpus import GPU, find_gpu
from collie_lab.planning._client import ask
from collie_lab.planning._texts import uncompiled_text
from collie_lab.planning.calibration import find_rates
from collie_lab.planning.speed import Speed, forecast_speed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from collie_lab.planning.comparison import PlanComparison

__all__ = ["CONTEXT", "GRANULE", "Plan", "check_plan", "in_words", "longest_document", "plan"]

#: CUDA's context in bytes: 804 MB on an H200 (driver 580, torch 2.11), the same for nine methods.
CONTEXT: Final = 804_061_184
#: torch's allocator on a GPU hands out multiples of so many bytes.
GRANULE: Final = 512


@dataclass(frozen=True)
class Plan:
    """What an experiment will need, before it runs; for steps whose sequences are all of full length, uncompiled.

    Attributes:
        experiment: what was asked about.
        gpu: of which GPU; None: of a CPU.
        length: tokens of every sequence.
        summaries: a rank of each pipeline stage, as the dry run saw it.
    """

    experiment: Experiment
    gpu: GPU | None
    length: int
    summaries: tuple[dict[str, Any], ...]

    @property
    def worst(self) -> dict[str, Any]:
        """The summary of the rank that needs most."""
        return max(self.summaries, key=_peak)

    @property
    def peak_bytes(self) -> int:
        """The most that tensors take of a rank's memory in any step, on the worst rank: `peak_bytes` of the run."""
        return (self.gpu.workspace if self.gpu else 0) + _peak(self.worst)

    @property
    def reserved_bytes(self) -> int | None:
        """What torch's caching allocator has from the driver for the peak; None on a CPU, which has no such thing."""
        return None if self.gpu is None else self.gpu.workspace + max(each["reserved"] for each in self.summaries)

    @property
    def process_bytes(self) -> int | None:
        """What the driver shows of the process: with CUDA's context, without buffers of NCCL."""
        return None if self.reserved_bytes is None else self.reserved_bytes + CONTEXT

    @property
    def fits(self) -> bool | None:
        """Whether a process fits on the GPU; None without one."""
        if self.gpu is None or self.process_bytes is None:
            return None
        return self.process_bytes <= self.gpu.memory

    @property
    def components(self) -> pd.DataFrame:
        """Bytes of the peak by what they are for: a row a pipeline stage, by its first rank."""
        import pandas as pd

        rows = {summary["rank"]: summary["components"] for summary in self.summaries}
        frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("rank")
        if self.gpu:
            frame["workspace"] = self.gpu.workspace
        frame["total"] = frame.sum(axis=1)
        return frame

    @functools.cached_property
    def speed(self) -> Speed | None:
        """Where the time of a step goes. None on a CPU that is not calibrated, and on a GPU without the arithmetic."""
        rates = find_rates(self.gpu, self.experiment.parallel.world_size)
        if rates is None or self._missing is not None:
            return None
        per_machine = self.experiment.parallel.world_size if self.gpu is None else self.gpu.per_machine
        return forecast_speed(self.experiment, self.summaries, rates, per_machine)

    @property
    def seconds_per_step(self) -> float | None:
        """Of an optimizer step, evaluations and checkpoints left out; None where nothing is known of the hardware."""
        return None if self.speed is None else self.speed.seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Useful tokens of all ranks together, as in `run.metrics`."""
        return None if self.speed is None else self._tokens / self.speed.seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization as in `run.metrics`: 6·N FLOPs a token for trained matrices (4·N for frozen ones) and
        6·L·d·s for causal attention, over the GPUs' dense 16-bit peak; recomputation does not count."""
        if self.speed is None or self.gpu is None:
            return None
        per_token, per_attended = self.summaries[0]["flops"]
        virtual = self.experiment.virtual.tokens if self.experiment.virtual is not None else 0
        attended = self.experiment.training.batch_size * (self.length + virtual) ** 2
        flops = per_token * self._tokens + per_attended * attended
        return float(flops / self.speed.seconds / (self.gpu.flops * self.experiment.parallel.world_size))

    @property
    def gpu_hours(self) -> float | None:
        """Of all steps on all GPUs; None on a CPU."""
        if self.speed is None or self.gpu is None:
            return None
        return self.experiment.training.steps * self.speed.seconds * self.experiment.parallel.world_size / 3600

    def cost(self, price_per_gpu_hour: float) -> float | None:
        """Of all steps, in the currency of the price of one GPU for an hour.

        Raises:
            CellError: a price below 0.
        """
        if not price_per_gpu_hour >= 0:
            raise CellError([Problem("plan", "price_per_gpu_hour", f"{price_per_gpu_hour!r} is no price", "0 or more")])
        return None if self.gpu_hours is None else self.gpu_hours * price_per_gpu_hour

    @property
    def _missing(self) -> str | None:
        """A type that the experiment computes in and the GPU does not."""
        training, gpu = self.experiment.training, self.gpu
        types = {training.precision, training.weights}
        return None if gpu is None else next((each for each in sorted(types) if gpu.peak(each) is None), None)

    @property
    def _tokens(self) -> int:
        """Of a step."""
        return self.experiment.training.batch_size * self.length

    def compare(self, *others: Plan, labels: Sequence[str] | None = None) -> PlanComparison:
        """This plan and others side by side: a table by component, speed and verdict, and bars against the GPU's
        memory. `labels`: by default what differs between them."""
        from collie_lab.planning.comparison import compare_plans

        return compare_plans((self, *others), labels)

    def figure(self) -> Figure:
        """Memory over a step, by what it is for, on the worst rank. Runs all layers, which a plan need not."""
        from collie_lab.planning._figure import draw

        worst = self.worst
        if not worst["course"]:
            request = {"length": self.length, "rank": worst["rank"], "on_gpu": self.gpu is not None,
                       "padded": worst.get("padded", False)}
            bare = _bare(self.experiment.replace(evaluate=(), callbacks=()), self.length)
            worst, = ask(bare, [{**request, "course": True}])
        return draw(worst, self.gpu)

    def __repr__(self) -> str:
        return in_words(self.peak_bytes, self.gpu, self.fits, self.worst["components"]) + self._pace \
            + uncompiled_text(self.experiment)

    @property
    def _pace(self) -> str:
        from collie_lab.view.units import count_text, percent_text

        if self.gpu is not None and self._missing is not None:
            return f"; no speed: {self.gpu.name} has no {self._missing}, or none that is known"
        if self.speed is None:
            return f"; no speed before lab.calibrate({self.experiment.parallel.world_size})" if self.gpu is None else ""
        low, high = (count_text(self._tokens / seconds) for seconds in (self.speed.high, self.speed.low))
        utilization = "" if self.mfu is None else f", MFU {percent_text(self.mfu)}"
        return f"; {count_text(self.tokens_per_second)} tokens/s ({low} to {high}){utilization}"

    def _repr_html_(self) -> str:
        from collie_lab.planning._figure import bar

        return f"<div>{bar(self)}<div>{html.escape(repr(self))}</div></div>"


def plan(experiment: Experiment, gpu: GPU | str | None = None, *, course: bool = False, quiet: bool = False) -> Plan:
    """Run a step on tensors without values, count its memory byte by byte, and its work: no GPU, no data, no weights.

    The same code runs that a rank runs: model, adapter, layout, optimizer. Sequences have the longest length of the
    data cell. A few seconds; the first time also those of importing torch, in a process of its own.

    Args:
        gpu: a name of `GPUS`, or one of your own. Default: memory as it is measured on a CPU.
        course: also keep memory's course over the step, for `Plan.figure`: all layers are run then.
        quiet: in a process of the lowest priority, as nobody waits for it.

    Raises:
        CellError: the cells do not go together, or cannot be planned (DeepSpeed, QLoRA, AdaLoRA, new tokens that the
            data decide on); an unknown GPU; a model without a configuration.
        PlanError: the step failed.
    """
    chosen = None if gpu is None else find_gpu(gpu)
    cells = check_plan(experiment)
    length = longest_document(experiment)
    bare, parallel = _bare(cells, length), experiment.parallel
    ranks = [stage * parallel.dp * parallel.tp for stage in range(parallel.pp)]
    requests = [{"length": length, "rank": rank, "on_gpu": chosen is not None, "course": course,
                 "padded": not isinstance(experiment.data, RandomTokens)} for rank in ranks]
    return Plan(experiment, chosen, length, tuple(ask(bare, requests, quiet)))


def _peak(summary: dict[str, Any]) -> int:
    return max(int(summary["first"]), int(summary["peak"]))


def in_words(peak: int, gpu: GPU | None, fits: bool | None, components: Mapping[str, int], when: str = "") -> str:
    """A line that says how much, whether it fits, and what it is made of."""
    from collie_lab.view.units import bytes_text

    parts = ", ".join(f"{role} {bytes_text(size)}" for role, size in components.items() if size)
    verdict = "" if gpu is None else f", {'fits' if fits else 'does not fit'} on {gpu.name} ({bytes_text(gpu.memory)})"
    return f"peak {bytes_text(peak)} a rank{verdict}{when}: {parts}"


def check_plan(experiment: Experiment) -> Experiment:
    """The cells that a plan is made of: without weights, evaluations and callbacks.

    Raises:
        CellError: they do not go together, or take memory that nothing here knows of.
    """
    cells = experiment.replace(model=_without_weights(experiment.model), evaluate=(), callbacks=())
    check_cells(cells).raise_for_errors()
    if refused := list(_refused(experiment)):
        raise CellError(refused)
    return cells


def longest_document(experiment: Experiment) -> int:
    """Its tokens; of packed ones those of a row.

    Raises:
        CellError: it does not fit into the model's context.
    """
    room = room_for_documents(experiment, context_length(model_config(experiment.model)))
    longest = sequence_length(experiment.data, room)
    if not isinstance(experiment.data, RandomTokens):
        return longest
    if experiment.data.length > longest:
        raise CellError([Problem("RandomTokens", "length", f"{experiment.data.length} tokens do not fit into sequences "
                                 f"of {longest}", "lower it, or raise `max_length` up to the model's context")])
    length = experiment.data.length
    return longest // length * length if experiment.data.packing else length


def _without_weights(model: Model) -> Model:
    """The configuration is enough. An extended tokenizer wants trained weights, and is refused with a better reason."""
    if isinstance(model.tokenizer, ExtendTokenizer):
        return model
    return model.replace(init="random")


def _bare(experiment: Experiment, length: int) -> Experiment:
    """The same step without data, a tokenizer or a compiler. Sophia's second step refreshes its Hessian: it takes most.
    """
    model, optimizer = _without_weights(experiment.model), experiment.optimizer
    if isinstance(model.tokenizer, NewTokenizer):
        model = model.replace(tokenizer=None, config=dict(model.overrides))
    if isinstance(optimizer, Sophia) and optimizer.hessian_every <= experiment.training.steps:
        optimizer = optimizer.replace(hessian_every=min(2, optimizer.hessian_every))
    return experiment.replace(model=model, optimizer=optimizer, training=experiment.training.replace(compile=False),
                              data=RandomTokens(length=length, packing=experiment.data.packing))


def _refused(experiment: Experiment) -> Iterator[Problem]:
    """What takes memory that no dry run sees."""
    if experiment.parallel.engine == "deepspeed":
        yield Problem("Parallel", "engine", "DeepSpeed's buffers are its own: no dry run knows them",
                      'engine="torch" for a plan')
    if isinstance(experiment.adapter, QLoRA | AdaLoRA):
        what = "four-bit weights cannot be run without values" if isinstance(experiment.adapter, QLoRA) else \
            "AdaLoRA chooses its ranks by values"
        yield Problem("Experiment", "adapter", what, "LoRA, for a plan near it")
    if isinstance(experiment.model.tokenizer, ExtendTokenizer):
        yield Problem("Model", "tokenizer", "how many new tokens there are is known when the data are read",
                      "leave it out for a plan: a token adds a row of the embedding and of the head")
