"""What a plan keeps of a trace: the peak and what it is made of, and the course of a step for a picture.

Layers that are alike are counted once: from three small depths a deep model follows, where the three lie on a line.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from collie_lab.cells import Experiment, Freeze
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
        held: what is there when a later step's update begins: weights, gradients and states, whole.
        course: over a later step, by role, so many points; empty where layers were not all run.
        update: where in the course the optimizer steps, as a share of it.
        layers_run: how many layers were traced, of how many.
        work: the operations of a step, a row each: the fields of `Operation`, and how many.
        flops: of the whole model, as MFU counts them: those of a token, and of a pair of tokens in attention.
    """

    rank: int
    first: int
    peak: int
    reserved: int
    components: dict[Role, int]
    held: dict[Role, int] = field(default_factory=dict)
    course: dict[Role, list[int]] = field(default_factory=dict)
    update: float = 1.0
    layers_run: tuple[int, int] = (0, 0)
    work: list[list[Any]] = field(default_factory=list)
    flops: tuple[int, ...] = (0, 0)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def forecast(experiment: Experiment, length: int, *, rank: int = 0, round_to: int = 1, course: bool = False) -> Summary:
    """The memory of a rank, for batches of full documents of `length` tokens.

    With `course`, all layers are run, and the course of a step is kept.
    """
    name, layers = _depth(experiment)
    if course or name is None or layers <= max(_DEPTHS):
        return _summarise(_trace(experiment, length, rank, round_to), rank, layers, course)
    some = []
    for depth in _DEPTHS:
        config = {**experiment.model.config, name: depth}
        small = experiment.replace(model=experiment.model.replace(config=config))
        some.append(_summarise(_trace(small, length, rank, round_to), rank, depth, False))
    if (extended := _extended(some, layers)) is not None:
        return extended
    return _summarise(_trace(experiment, length, rank, round_to), rank, layers, course)


def _trace(experiment: Experiment, length: int, rank: int, round_to: int) -> Trace:
    return dry_run(experiment, full_documents(experiment.training.batch_size, length), rank=rank, round_to=round_to)


def _depth(experiment: Experiment) -> tuple[str | None, int]:
    """The configuration's field for the number of layers, None where depth is not all that layers differ in."""
    config = configuration(experiment.model)
    text = config.get_text_config()
    layers = int(text.num_hidden_layers)
    lists = any(isinstance(value, list) and len(value) == layers for value in vars(text).values())
    if lists or text is not config or experiment.parallel.pp > 1 or isinstance(experiment.adapter, Freeze):
        return None, layers
    return config.attribute_map.get("num_hidden_layers", "num_hidden_layers"), layers


def _extended(some: list[Summary], layers: int) -> Summary | None:
    """The straight line through three depths; None where they do not lie on one."""
    last, more = some[-1], layers - _DEPTHS[-1]

    def extend(values: list[int]) -> int | None:
        steps = {after - before for before, after in itertools.pairwise(values)}
        return values[-1] + more * steps.pop() if len(steps) == 1 else None

    first = extend([each.first for each in some])
    peak = extend([each.peak for each in some])
    reserved = extend([each.reserved for each in some])
    components = {role: extend([each.components[role] for each in some]) for role in ROLES}
    held = {role: extend([each.held[role] for each in some]) for role in some[0].held}
    if first is None or peak is None or None in (*components.values(), *held.values()):
        return None
    if reserved is None:  # gaps between blocks follow no line: their trend
        gaps = [each.reserved - each.peak for each in some]
        reserved = peak + gaps[-1] + more * max(0, gaps[-1] - gaps[0]) // (len(gaps) - 1)
    return Summary(last.rank, first, peak, reserved, components, held,  # type: ignore[arg-type]
                   layers_run=(_DEPTHS[-1], layers), work=extended([each.work for each in some], more),
                   flops=tuple(b + more * (b - a) for a, b in zip(some[-2].flops, last.flops, strict=True)))


def _summarise(trace: Trace, rank: int, layers: int, course: bool) -> Summary:
    live: dict[Role, int] = dict.fromkeys(ROLES, 0)
    sizes: dict[int, int] = {}
    total, peaks, made_of, held = 0, [0, 0], dict(live), dict(live)
    begin, end = trace.steps[1], len(trace.events)
    every = max(1, (end - begin) // _POINTS)
    points: dict[Role, list[int]] = {role: [] for role in ROLES} if course else {}
    for index, (storage, size) in enumerate(trace.events):
        change = size - sizes.get(storage, 0)
        if index == trace.updates[1]:
            held = dict(live)
        sizes[storage] = size
        total += change
        live[trace.roles[storage]] += change
        step = int(index >= begin)
        if total > peaks[step] and index >= trace.steps[0]:
            peaks[step] = total
            if step:
                made_of = dict(live)
        if course and step and not (index - begin) % every:
            for role in ROLES:
                points[role].append(live[role])
    update = (trace.updates[1] - begin) / max(1, end - begin)
    return Summary(rank, peaks[0], peaks[1], reserved_bytes(trace.events), made_of,
                   {role: held[role] for role in HELD}, points, update, (layers, layers), trace.work.to_json(),
                   trace.flops)
