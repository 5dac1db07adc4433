"""What a plan keeps of a trace: the peak and what it is made of, and the course of a step for a picture.

Layers that are alike are counted once: from three small depths a deep model follows; see `_moments`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Final, NamedTuple

from collie_lab.cells import Experiment, Freeze
from collie_lab.planning._apart import apart
from collie_lab.planning._moments import Peak, at_the_ends, deepened
from collie_lab.planning._patches import probe_once
from collie_lab.planning._roles import ROLES, Role
from collie_lab.planning._work import extended
from collie_lab.planning.allocator import reserved_bytes
from collie_lab.planning.dry_run import Trace, dry_run, full_documents
from collie_lab.training.weights import configuration

__all__ = ["HELD", "Summary", "forecast"]

#: What stays from step to step, and can be measured on a rank; the rest of a peak comes and goes.
HELD: Final[tuple[Role, ...]] = ("weights", "gradients", "optimizer")
_DEPTHS: Final = (3, 4, 5)
_POINTS: Final = 400  # of the picture's course


@dataclass
class Summary:
    """One rank's memory, in bytes.

    Attributes:
        rank: whose.
        first: the peak of the first step, which makes the optimizer's states.
        peak: that of every later step.
        reserved: what a GPU's allocator then has from the driver.
        components: what the peak is made of.
        moment: when it is.
        held: what is there when a later step's update begins: weights, gradients and states, whole.
        course: over a later step, by role, so many points; empty where layers were not all run.
        update: where in the course the optimizer steps, as a share of it.
        layers_run: how many layers were traced, of how many.
        work: the operations of a step, a row each: the fields of `Operation`, and how many.
        flops: of the whole model, as MFU counts them: those of a token, and of a pair of tokens in attention.
        padded: whether documents may differ in length, so that some rows are filled up.
    """

    rank: int
    first: int
    peak: int
    reserved: int
    components: dict[Role, int]
    moment: str
    held: dict[Role, int] = field(default_factory=dict)
    course: dict[Role, list[int]] = field(default_factory=dict)
    update: float = 1.0
    layers_run: tuple[int, int] = (0, 0)
    work: list[list[Any]] = field(default_factory=list)
    flops: tuple[int, ...] = (0, 0)
    padded: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class _Case(NamedTuple):
    """What of a step is not in its cells."""

    length: int
    rank: int
    on_gpu: bool
    padded: bool

    def trace(self, experiment: Experiment) -> Trace:
        documents = full_documents(experiment.training.batch_size, self.length)
        return dry_run(experiment, documents, rank=self.rank, on_gpu=self.on_gpu, padded=self.padded)

    def follow(self, experiment: Experiment) -> _Course:
        return _Course(self.trace(experiment))


def forecast(experiment: Experiment, length: int, *, rank: int = 0, on_gpu: bool = False, padded: bool = False,
             course: bool = False) -> Summary:
    """The memory of a rank, for batches of full documents of `length` tokens.

    With `padded`, other rows are shorter: what transformers masks of them takes memory, where documents are rows.

    With `course`, all layers and all stages' micro-batches are run, and the course of a step is kept.
    """
    found = _summary(experiment, _Case(length, rank, on_gpu, padded), course)
    return replace(found, padded=padded)


def _summary(experiment: Experiment, case: _Case, course: bool) -> Summary:
    layers, at_depth = _depths(experiment)
    if not course and (stage := _by_fewer_micro_batches(experiment, case, layers)) is not None:
        return stage
    if not course and at_depth is not None and layers > max(_DEPTHS) and not (case.on_gpu and _many_wait(experiment)):
        small = {depth: experiment.replace(model=experiment.model.replace(config=at_depth(depth))) for depth in _DEPTHS}
        probe_once(small[_DEPTHS[0]])  # for all of them
        some = apart([functools.partial(case.follow, small[depth]) for depth in _DEPTHS[::-1]])
        if (extended := _extended(some[::-1], case.rank, layers)) is not None:
            return extended
    return _summarise(case.trace(experiment), case.rank, layers, course)


def _many_wait(experiment: Experiment) -> bool:
    """Whether gradients of more layers than are tried may wait for a launch (`optim.waves`): they are no more than the
    largest, that of the embedding, or 4 MB, and memory is a straight line over the depth up to that only."""
    if not getattr(experiment.optimizer, "in_backward", False) or experiment.parallel.zero == 3:
        return False
    text = configuration(experiment.model).get_text_config()
    width, vocabulary = getattr(text, "hidden_size", 0), getattr(text, "vocab_size", 0)
    few = min(_DEPTHS) * 8 * width**2  # parameters; a small layer has 8 width²
    return experiment.adapter is not None or few < max(vocabulary * width, 2**21)


def _by_fewer_micro_batches(experiment: Experiment, case: _Case, layers: int) -> Summary | None:
    """A stage's summary from steps of few micro-batches: from where 1F1B has as many of them under way as there are
    stages, each adds the same bytes (torch keeps what stages send and receive) and the same work. None where there are
    few, where three do not lie on a line, or where the schedule is another."""
    training, parallel = experiment.training, experiment.parallel
    micro = parallel.micro_batch_size(training.batch_size, training.micro_batch_size)
    numbers = range(parallel.pp + 1, parallel.pp + 4)
    more = training.batch_size // parallel.dp // micro - numbers[-1]
    if parallel.pp == 1 or parallel.schedule != "1f1b" or more < 1:
        return None
    some = []
    for number in numbers:
        fewer = training.replace(batch_size=number * micro * parallel.dp, micro_batch_size=micro)
        some.append(_summarise(case.trace(experiment.replace(training=fewer)), case.rank, layers, course=False))
    sizes = _on_a_line([{"first": each.first, "peak": each.peak} for each in some], more)
    components = _on_a_line([each.components for each in some], more)
    held = _on_a_line([each.held for each in some], more)
    if sizes is None or components is None or held is None:
        return None
    last = some[-1]
    reserved, work = last.reserved + sizes["peak"] - last.peak, extended([each.work for each in some], more)
    return replace(last, first=sizes["first"], peak=sizes["peak"], reserved=reserved, components=components, held=held,
                   work=work)


def _on_a_line(some: list[dict[Any, int]], more: int) -> dict[Any, int] | None:
    """What follows `more` steps after the last of three; None where they do not lie on a line."""
    changes = [{name: value - before[name] for name, value in after.items()} for before, after in pairwise(some)]
    if changes[0] != changes[1]:
        return None
    return {name: value + more * changes[1][name] for name, value in some[-1].items()}


def _depths(experiment: Experiment) -> tuple[int, Callable[[int], dict[str, Any]] | None]:
    """How many layers there are, and the configuration of so many; None where depth is not all that they differ in."""
    config = configuration(experiment.model)
    text = config.get_text_config()
    layers = int(text.num_hidden_layers)
    lists = {name: value for name, value in vars(text).items() if isinstance(value, list) and len(value) == layers}
    kinds = any(value != value[:1] * layers for value in lists.values())
    if kinds or text is not config or experiment.parallel.pp > 1 or isinstance(experiment.adapter, Freeze):
        return layers, None
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")

    def at_depth(depth: int) -> dict[str, Any]:
        fewer = {field: value[:depth] for field, value in lists.items()}
        return {**experiment.model.config, name: depth, **fewer}

    return layers, at_depth


def _extended(some: list[_Course], rank: int, layers: int) -> Summary | None:
    """The summary of a deep model; None where three shallow ones do not lie on a line."""
    more = layers - _DEPTHS[-1]
    steps = [deepened([at_the_ends(each.peaks[step], depth) for each, depth in zip(some, _DEPTHS, strict=True)], more)
             for step in range(2)]
    if steps[0] is None or steps[1] is None or "last layer" not in steps[1]:  # of a family whose layers nobody names
        return None
    moment, (peak, made_of) = _largest(steps[1])
    # Gaps between blocks follow no line: their trend.
    gaps = [each.reserved - _largest(each.peaks[1])[1][0] for each in some]
    reserved = peak + gaps[-1] + more * max(0, gaps[-1] - gaps[0]) // (len(gaps) - 1)
    held = {role: some[-1].held[role] + more * (some[-1].held[role] - some[-2].held[role]) for role in HELD}
    return Summary(rank, _largest(steps[0])[1][0], peak, reserved, made_of, moment, held,
                   layers_run=(_DEPTHS[-1], layers), work=extended([each.work for each in some], more),
                   flops=tuple(b + more * (b - a) for a, b in zip(some[-2].flops, some[-1].flops, strict=True)))


def _summarise(trace: Trace, rank: int, layers: int, course: bool) -> Summary:
    found = _Course(trace, _POINTS if course else 0)
    moment, (peak, made_of) = _largest(found.peaks[1])
    begin = trace.steps[1]
    update = (trace.updates[1] - begin) / max(1, len(trace.events) - begin)
    return Summary(rank, _largest(found.peaks[0])[1][0], peak, found.reserved, made_of, moment, found.held,
                   found.points, update, (layers, layers), found.work, found.flops)


def _largest(peaks: dict[str, Peak]) -> tuple[str, Peak]:
    return max(peaks.items(), key=lambda item: item[1][0])


class _Course:
    """What was alive over the steps of a trace.

    Attributes:
        peaks: of the first step, and of the second: every moment's.
        held: when the second step's update begins.
        reserved: what a GPU's allocator has in the end.
        points: bytes by role over the second step.
        work, flops: as a `Summary` has them.
    """

    def __init__(self, trace: Trace, points: int = 0):
        live: dict[Role, int] = dict.fromkeys(ROLES, 0)
        sizes: dict[int, int] = {}
        total, moment, moments = 0, "", iter([*trace.moments, (len(trace.events), "")])
        at, name = next(moments)
        begin = trace.steps[1]
        every = max(1, (len(trace.events) - begin) // max(1, points))
        self.peaks: tuple[dict[str, Peak], dict[str, Peak]] = ({}, {})
        self.points: dict[Role, list[int]] = {role: [] for role in ROLES} if points else {}
        self.held: dict[Role, int] = {}
        self.reserved = reserved_bytes(trace.events)
        self.work, self.flops = trace.work.to_json(), trace.flops
        for index, (storage, size) in enumerate(trace.events):
            while index >= at:
                moment = name
                at, name = next(moments)
            if index == trace.updates[1]:
                self.held = {role: live[role] for role in HELD}
            change = size - sizes.get(storage, 0)
            sizes[storage] = size
            total += change
            live[trace.roles[storage]] += change
            if index < trace.steps[0]:
                continue
            peaks = self.peaks[index >= begin]
            if moment not in peaks or total > peaks[moment][0]:
                peaks[moment] = total, dict(live)
            if points and index >= begin and not (index - begin) % every:
                for role in ROLES:
                    self.points[role].append(live[role])
        self.held = self.held or {role: live[role] for role in HELD}  # an update that makes nothing ends the trace
