"""How long a step takes: the work of a dry run by the rates of hardware, messages, and a pipeline's bubble.

A device needs for every operation what its arithmetic or its memory takes, whichever is longer (a roofline: Williams et
al., 2009), the host what it takes to start it. On a GPU the two work side by side, on a CPU one after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from collie_lab.cells import Experiment, Optimizer, RuleCell, Sophia
from collie_lab.planning.rates import Rates

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Speed", "bubble", "forecast_speed", "wire_bytes"]

#: What the time of a step is spent on, in the order of the table.
_NAMES: Final = ("matrix products", "attention", "element-wise", "optimizer", "launches", "communication", "bubble")
_ARITHMETIC: Final = {"matmul": "matrix products", "attention": "attention", "attention_backward": "attention"}


@dataclass(frozen=True)
class Speed:
    """Seconds of an optimizer step.

    Attributes:
        seconds: expected.
        low, high: the range in which they should lie: full overlap of messages or none, and the rates' own margin.
        parts: seconds by what they are spent on, `seconds` together.
        source: where the rates come from.
    """

    seconds: float
    low: float
    high: float
    parts: dict[str, float]
    source: str

    @property
    def components(self) -> pd.DataFrame:
        """Seconds and shares of the step by what they are spent on."""
        import pandas as pd

        frame = pd.DataFrame({"seconds": self.parts}).rename_axis("component")
        frame["share"] = frame["seconds"] / self.seconds
        return frame

    def figure(self) -> Figure:
        """Where the time of a step goes."""
        from collie_lab.planning._figure import draw_time

        return draw_time(self)

    def __repr__(self) -> str:
        from collie_lab.view.units import number_text, percent_text

        parts = ", ".join(f"{name} {percent_text(value / self.seconds)}" for name, value in self.parts.items() if value)
        return (f"{number_text(self.seconds, 3)} s a step ({number_text(self.low, 3)} to {number_text(self.high, 3)}): "
                f"{parts}; by {self.source}")


def forecast_speed(experiment: Experiment, summaries: Sequence[dict[str, Any]], rates: Rates, per_machine: int
                   ) -> Speed | None:
    """The time of a step; None where the rates say nothing of an operation of it.

    Args:
        summaries: of a rank of each pipeline stage.
        per_machine: ranks that share a machine.
    """
    found = [_stage(experiment, summary["work"], rates, per_machine) for summary in summaries]
    stages = [stage for stage in found if stage is not None]
    if len(stages) < len(found):
        return None
    slowest = max(stages, key=lambda stage: sum(stage.parts.values()))
    parts = dict(slowest.parts)
    if len(stages) > 1:
        share = bubble(experiment.parallel.schedule, len(stages), _micro_batches(experiment))
        busy = sum(sum(stage.parts.values()) - stage.parts["optimizer"] for stage in stages) / len(stages)
        parts["bubble"] = busy * share / (1 - share)
    seconds = sum(parts.values())
    low, high = seconds - parts["communication"] + slowest.exposed, seconds + slowest.hidden
    return Speed(seconds, low * (1 - rates.margin), high * (1 + rates.margin), parts, rates.source)


def bubble(schedule: str, ranks: int, micro_batches: int) -> float:
    """The share of a pipeline's step in which a rank waits, where all stages take the same time.

    GPipe and 1F1B: (p−1)/(m+p−1) (Narayanan et al., arXiv 2104.04473, section 2.2). Interleaved, with v=2 stages a
    rank: (p−1)/(v·m+p−1). Zero bubble (torch's ZB-V, after Qi et al., arXiv 2401.10241), where forward and both halves
    of backward take the same time: w/(6m+w) with w = max(p−1, 4p−2−2m), which is what its order of actions comes to.
    """
    p, m = ranks, micro_batches
    if schedule == "zero_bubble":
        waits = max(p - 1, 4 * p - 2 - 2 * m)
        return waits / (6 * m + waits)
    stages = 2 if schedule == "interleaved" else 1
    return (p - 1) / (stages * m + p - 1)


def wire_bytes(kind: str, size: float, ranks: int) -> float:
    """Bytes that leave a rank in a ring, of a collective whose whole tensor has `size`."""
    if kind in ("send", "broadcast"):
        return size
    return (2 if kind == "all_reduce" else 1) * size * (ranks - 1) / ranks


def _micro_batches(experiment: Experiment) -> int:
    training, parallel = experiment.training, experiment.parallel
    share = max(1, training.batch_size // parallel.dp)
    return -(-share // parallel.micro_batch_size(training.batch_size, training.micro_batch_size))


class _Stage(NamedTuple):
    """Seconds of one rank, by what they are spent on; of its messages those that nothing can hide, and those that are
    taken to be hidden."""

    parts: dict[str, float]
    exposed: float
    hidden: float


def _stage(experiment: Experiment, work: Iterable[list[Any]], rates: Rates, per_machine: int) -> _Stage | None:
    parts = dict.fromkeys(_NAMES, 0.0)
    device, host, messages = Counter[str](), Counter[str](), [0.0, 0.0]
    for phase, kind, dtype, flops, moved, ranks, calls in _weighted(experiment.optimizer, work):
        if ranks is not None:
            seconds = _message(kind, moved, ranks, rates, per_machine)
        else:
            seconds = _on_device(kind, dtype, flops, moved, rates)
        if seconds is None:
            return None
        if ranks is not None:
            messages[_is_overlapped(experiment, phase, kind, ranks)] += calls * seconds
            continue
        parts["optimizer" if phase == "optimizer" else _ARITHMETIC.get(kind, "element-wise")] += calls * seconds
        device[phase] += calls * seconds  # type: ignore[assignment]
        if kind != "view":
            when = "update" if kind == "update" else "backward" if phase in ("backward", "recompute") else "forward"
            host[phase] += calls * rates.host[when]
    parts["launches"] = _launches(device, host, rates)
    exposed, overlapped = messages
    beside = max(0.0, overlapped - sum(parts.values()))  # more than there is computation to hide it
    shown = max(overlapped * (1 - rates.overlap), beside)
    parts["communication"] = exposed + shown
    return _Stage(parts, exposed + beside, overlapped - shown)


def _weighted(optimizer: Optimizer, work: Iterable[list[Any]]) -> Iterator[list[Any]]:
    """Sophia's Hessian is of every so many steps."""
    every = optimizer.hessian_every if isinstance(optimizer, Sophia) else 1
    for row in work:
        yield [*row[:6], row[6] / every if row[0] == "hessian" else row[6]]


def _on_device(kind: str, dtype: str, flops: int, moved: int, rates: Rates) -> float | None:
    if kind == "view":
        return 0.0
    by_memory = rates.seconds(kind if kind not in _ARITHMETIC else "pointwise", dtype, moved)
    by_memory = rates.seconds("memory", dtype, moved) if by_memory is None else by_memory
    if kind not in _ARITHMETIC or by_memory is None:
        return by_memory
    by_flops = rates.seconds(kind, dtype, flops)
    return None if by_flops is None else max(by_flops, by_memory)


def _launches(device: Counter[str], host: Counter[str], rates: Rates) -> float:
    """What the host adds. Ahead of a device it adds where it falls behind: between what it does over a whole step,
    which a deep queue would allow, and what it does phase by phase."""
    if not rates.asynchronous:
        return float(host.total())
    whole = max(0.0, host.total() - device.total())
    by_phase = sum(max(0.0, host[phase] - device[phase]) for phase in host)
    return (whole + by_phase) / 2


def _message(kind: str, size: float, ranks: tuple[int, int, int], rates: Rates, per_machine: int) -> float | None:
    """Seconds of a collective, by the slowest link of its ring."""
    first, stride, count = ranks
    if count < 2:
        return 0.0
    machines = {(first + index * stride) // per_machine for index in range(count)}
    wire = wire_bytes(kind, size, count)
    if len(machines) == 1:
        link = rates.links.get(kind) or rates.links.get("")
        return None if link is None else link(wire)
    # Each rank of a machine has its own part of the network, and so a ring of its own.
    return None if rates.network is None else rates.network(wire / max(1, count // len(machines)))


def _is_overlapped(experiment: Experiment, phase: str, kind: str, ranks: tuple[int, int, int]) -> bool:
    """Whether a message can travel beside computation: those of shards and of replicas' buckets. Tensor-parallel ranks
    wait for theirs, and so does an update in backward."""
    parallel, optimizer = experiment.parallel, experiment.optimizer
    if kind in ("send", "broadcast") or (parallel.tp > 1 and tuple(ranks[1:]) == (1, parallel.tp)):
        return False
    if parallel.zero:
        return kind in ("all_gather", "reduce_scatter") or phase == "backward"
    in_backward = isinstance(optimizer, RuleCell) and optimizer.in_backward
    return phase == "backward" and not in_backward
