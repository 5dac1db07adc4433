"""The layouts, micro-batches and recomputation that could run a method, and why the others cannot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

from collie_lab.cells import CellError, Experiment, Parallel
from collie_lab.check import check_cells
from collie_lab.gpus import GPU
from collie_lab.planning._client import PlanError
from collie_lab.planning._rough import GAPS, Shape, rough_bytes, rough_seconds
from collie_lab.planning._texts import batches_text, layout_text
from collie_lab.planning.closed_form import estimate
from collie_lab.planning.plan import CONTEXT, Plan, plan
from collie_lab.planning.rates import Rates
from collie_lab.view.units import bytes_text

__all__ = ["Goal", "Option", "Refusal", "Search"]

Goal = Literal["throughput", "memory"]

#: A rough figure is trusted to be within so much: what needs more than this share of the memory is not tried.
_WORTH_TRYING: Final = 1.15
#: What is so much too large by the rough figure is not weighed by the closed form, which takes milliseconds.
_HOPELESS: Final = 2.0


@dataclass
class Option:
    """One way to train: an experiment that is ready to launch, and what it needs.

    Attributes:
        method: its name among the methods.
        experiment: with the layout, the micro-batch and the recomputation.
        gpu: on which.
        length: tokens of a sequence.
        rough_bytes: of a rank's process, by arithmetic.
        rough_seconds: of a step, likewise.
    """

    method: str
    experiment: Experiment
    gpu: GPU
    length: int
    rough_bytes: float
    rough_seconds: float

    @cached_property
    def plan(self) -> Plan:
        """Its plan; made when it is asked for. Raises PlanError."""
        return plan(self.experiment, self.gpu)

    @property
    def confirmed(self) -> bool:
        """Whether the plan has been made: the figures are its own."""
        return "plan" in vars(self)

    @property
    def process_bytes(self) -> float:
        """Of a rank's process, as the driver shows it."""
        exact = self.plan.process_bytes if self.confirmed else None
        return self.rough_bytes if exact is None else exact

    @property
    def fits(self) -> bool:
        """Whether a process fits, by the figures that are known."""
        return self.process_bytes <= self.gpu.memory

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.experiment.training.batch_size * self.length / self.seconds

    @property
    def seconds(self) -> float:
        """Of an optimizer step."""
        speed = self.plan.speed if self.confirmed else None
        return self.rough_seconds if speed is None else speed.seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization; None before there is a plan, and on a GPU without a known peak."""
        return self.plan.mfu if self.confirmed else None

    @property
    def micro(self) -> int:
        """Sequences of a forward pass."""
        training = self.experiment.training
        return self.experiment.parallel.micro_batch_size(training.batch_size, training.micro_batch_size)

    def score(self, goal: Goal) -> float:
        """The less the better."""
        return -self.tokens_per_second if goal == "throughput" else self.process_bytes

    @property
    def settings(self) -> str:
        """The layout, the micro-batch and the recomputation in words."""
        return ", ".join((layout_text(self.experiment.parallel), *batches_text(self.experiment)))

    def __repr__(self) -> str:
        from collie_lab.view.units import count_text

        about = "" if self.confirmed else "about "
        return (f"{self.method}, {self.settings}: {about}{bytes_text(self.process_bytes)} a GPU, "
                f"{about}{count_text(self.tokens_per_second)} tokens/s")


@dataclass(frozen=True)
class Refusal:
    """A layout that does not do for a method, and why."""

    method: str
    layout: str
    reason: str


@dataclass(frozen=True)
class Search:
    """What is looked for, and on what."""

    shape: Shape
    gpu: GPU
    gpus: int
    length: int
    rates: Rates
    goal: Goal

    def options(self, method: str, base: Experiment) -> tuple[list[Option], list[Refusal]]:
        """For each layout the best that may fit with recomputation and without; and the layouts of which none may."""
        options, refused = [], []
        for layout in _layouts(self.gpus, self.gpu.per_machine):
            cells = base.replace(parallel=layout)
            found, reasons = [], []
            for recompute in ("none", "full"):
                option, reason = self._best(method, cells.with_("training.recompute", recompute))
                found += [option] if option else []
                reasons += [reason] if reason else []
            options += found
            if not found:
                refused.append(Refusal(method, layout_text(layout), reasons[-1]))
        return options, refused

    def smaller(self, option: Option) -> Option | None:
        """The same with the next smaller micro-batch; None where there is none."""
        return self._best(option.method, option.experiment, below=option.micro)[0]

    def _best(self, method: str, cells: Experiment, below: int | None = None) -> tuple[Option | None, str]:
        """The largest micro-batch that fits (for `memory` the smallest), or one that may; or why there is none."""
        share, reason, least = max(1, cells.training.batch_size // cells.parallel.dp), "", math.inf
        perhaps: Option | None = None
        sizes = [size for size in range(1, share + 1) if share % size == 0 and (below is None or size < below)]
        for size in sizes if self.goal == "memory" else reversed(sizes):
            experiment = cells.with_("training.micro_batch_size", size)
            if errors := check_cells(experiment).errors:
                reason = reason or f"{errors[0].message[0].lower()}{errors[0].message[1:]}"
                continue
            needed, trust = self._process_bytes(experiment)
            if needed <= trust * self.gpu.memory:
                seconds = rough_seconds(experiment, self.shape, self.rates, self.length)
                perhaps = Option(method, experiment, self.gpu, self.length, needed, seconds)
                if perhaps.fits:
                    return perhaps, ""
            least = min(least, needed)
        if perhaps is not None:
            return perhaps, ""
        if math.isfinite(least):
            reason = f"out of memory by about {bytes_text(least - self.gpu.memory)}"
        return None, reason or "no smaller micro-batch"

    def _process_bytes(self, experiment: Experiment) -> tuple[float, float]:
        """By arithmetic, and how much more than the memory it may say of what fits."""
        rough = rough_bytes(experiment, self.shape, self.gpu, self.length) + CONTEXT
        if rough > _HOPELESS * self.gpu.memory:
            return rough, 1.0
        try:
            return GAPS * estimate(experiment, self.gpu).peak_bytes + CONTEXT, 1.0
        except CellError:  # no formula
            return rough, _WORTH_TRYING

    def try_out(self, option: Option) -> str:
        """Make the dry run; why the option does not do after all, if so."""
        try:
            option.plan  # noqa: B018 (made here)
        except (PlanError, CellError) as error:
            return str(error)
        return "" if option.fits else f"out of memory by {bytes_text(option.process_bytes - self.gpu.memory)}"


def _layouts(gpus: int, per_machine: int) -> Iterator[Parallel]:
    """Every product of axes. Matrices are shared inside a machine alone: their messages cannot wait for a network."""
    for tp in _divisors(gpus):
        if tp > per_machine:
            continue
        for pp in _divisors(gpus // tp):
            dp = gpus // tp // pp
            for zero in (0,) if dp == 1 else (0, 2) if pp > 1 else (0, 2, 3):
                yield Parallel(dp=dp, tp=tp, pp=pp, zero=zero)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
