"""Autograd in sizes alone: what a step makes, keeps and frees, without tensors and without torch.

A `Value` stands for a tensor: how many numbers of how many bytes, and a storage that counts as long as somebody holds
it. Operations make values, and nodes that say what the backward pass will make of a gradient and what it keeps until
then, as torch's do. Python's own reference counts free a storage at the moment at which torch would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from collie_lab.planning._moments import Peak
from collie_lab.planning._roles import ROLES, Role, Roles

__all__ = ["Memory", "Parameter", "Storage", "Tape", "Value"]

class Memory(Roles):
    """Live bytes by what they are for, and the most there were in every moment of a step.

    Attributes:
        moment: the name under which the most is kept now.
        peaks: of each moment, the most bytes, and what they were made of.
        muted: what appears now takes nothing.
    """

    def __init__(self, granule: int = 1):
        """Storages take multiples of `granule` bytes."""
        self.live: dict[Role, int] = dict.fromkeys(ROLES, 0)
        self.total = 0
        self.moment = ""
        self.peaks: dict[str, Peak] = {}
        self.muted = False
        self._granule = granule

    def new(self, size: int, role: Role | None = None) -> Storage:
        """A storage of so many bytes."""
        return Storage(self, 0 if self.muted else -(-size // self._granule) * self._granule, role or self.role)

    def of_host(self, size: int) -> Storage:
        """What lies in the host's memory, which on a GPU does not count."""
        return self.new(size if self._granule == 1 else 0)

    def beside(self, *others: int, size: int) -> Storage:
        """A storage of `size` bytes, for which others are needed that are gone when it is there."""
        held = [self.new(each) for each in others]
        made = self.new(size)
        held.clear()
        return made

    def change(self, role: Role, size: int) -> None:
        """So many bytes more."""
        self.live[role] += size
        self.total += size
        if size > 0 and self.total > self.peaks.get(self.moment, (0,))[0]:
            self.peaks[self.moment] = self.total, dict(self.live)


class Storage:
    """Bytes that count until nobody holds them."""

    __slots__ = ("_memory", "_role", "size")

    def __init__(self, memory: Memory, size: int, role: Role):
        self._memory, self.size, self._role = memory, size, role
        memory.change(role, size)

    def mark(self, role: Role) -> None:
        """Say what it is for after all."""
        self._memory.live[self._role] -= self.size
        self._memory.live[role] += self.size
        self._role = role

    def __del__(self) -> None:
        self._memory.change(self._role, -self.size)


@dataclass(eq=False, slots=True)
class Parameter:
    """A leaf of the graph.

    Attributes:
        shape: its sizes.
        width: bytes a number, in the computation.
        kept: bytes a number, as it is kept.
        trained: it gets a gradient.
        gradient: what a step has added up, outside of an optimizer in backward.
        uses: gradients that are still to come in this pass.
    """

    shape: tuple[int, ...]
    width: int
    kept: int
    trained: bool = True
    gradient: Storage | None = None
    uses: int = 0
    _pending: Storage | None = None

    @property
    def count(self) -> int:
        """Its numbers."""
        return math.prod(self.shape)

    @property
    def value(self) -> Value:
        """As an operand. Its bytes are counted where all weights are."""
        return Value(self.count, self.width, None, self)


@dataclass(eq=False, slots=True)
class Node:
    """What the backward pass does with the gradient of an operation's result."""

    run: Callable[[Storage], Sequence[Storage | None]] | None
    targets: tuple[Node | Parameter | None, ...]
    moment: str


@dataclass(eq=False, slots=True)
class Value:
    """A tensor: `count` numbers of `width` bytes each. `origin` is where its gradient goes; None: it wants none."""

    count: int
    width: int
    storage: Storage | None
    origin: Node | Parameter | None = None

    @property
    def needs(self) -> bool:
        """Whether a gradient is wanted."""
        return self.origin is not None and (isinstance(self.origin, Node) or self.origin.trained)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * self.width


@dataclass(eq=False)
class Tape:
    """The graph of one forward pass, and the operations that write it.

    `take` is given every parameter whose gradient is complete, and the gradient.
    """

    memory: Memory
    take: Callable[[Parameter, Storage], None]
    recording: bool = True
    nodes: list[Node] = field(default_factory=list)
    _pending: dict[Node, Storage] = field(default_factory=dict)

    # --- the engine ---------------------------------------------------------------------------------

    def new(self, count: int, width: int, role: Role | None = None) -> Storage:
        """A storage for so many numbers."""
        return self.memory.new(count * width, role)

    def record(self, out: Value, inputs: Sequence[Value], run: Callable[[Storage], Sequence[Storage | None]],
               inside: bool = False) -> Value:
        """Note that `out` was made of `inputs`; `run` makes their gradients, each of its input's size.

        `inside`: it is to be run even where no input wants a gradient.
        """
        if self.recording and (inside or any(each.needs for each in inputs)):
            targets = tuple(each.origin if each.needs else None for each in inputs)
            out.origin = Node(run, targets, self.memory.moment)
            self.nodes.append(out.origin)
            for target in targets:
                if isinstance(target, Parameter):
                    target.uses += 1
        return out

    def backward(self, of: Value, gradient: Storage) -> None:
        """Run the graph, its latest node first; what it kept is freed under way."""
        assert isinstance(of.origin, Node)
        self._pending[of.origin] = gradient
        del gradient
        memory = self.memory
        while self.nodes:
            node = self.nodes.pop()
            if (incoming := self._pending.pop(node, None)) is None or node.run is None:
                continue
            memory.moment = f"backward of {node.moment}"
            made = list(node.run(incoming))
            node.run = None  # what it kept goes
            del incoming
            for target in node.targets:
                self._give(target, made)

    def _give(self, target: Node | Parameter | None, made: list[Storage | None]) -> None:
        """Add the first of the gradients to what has come already: in its place where nobody else holds it, else in a
        new tensor. It is taken from the list, so that it can be freed."""
        gradient = made.pop(0)
        if target is None or gradient is None:
            return
        if isinstance(target, Parameter):
            target.uses -= 1
            before, target._pending = target._pending, None
        else:
            before = self._pending.pop(target, None)
        if before is not None:
            del before
            gradient = self.memory.new(gradient.size)
        if isinstance(target, Node):
            self._pending[target] = gradient
        elif target.uses:
            target._pending = gradient
        else:
            self.take(target, gradient)

    # --- operations ---------------------------------------------------------------------------------

    def cast(self, x: Value, width: int) -> Value:
        """Another type."""
        if x.width == width:
            return x
        back = x.size
        return self.record(Value(x.count, width, self.new(x.count, width)), [x], lambda _: [self.memory.new(back)])

    def view(self, x: Value) -> Value:
        """The same numbers; so are the gradients."""
        return self.record(Value(x.count, x.width, x.storage), [x], lambda gradient: [gradient])

    def piece(self, x: Value) -> Value:
        """A view whose gradient torch writes into a new tensor: parts, selections."""
        back = x.size
        return self.record(Value(x.count, x.width, x.storage), [x], lambda _: [self.memory.new(back)])

    def copy(self, x: Value) -> Value:
        """A copy whose gradient is a view."""
        return self.record(Value(x.count, x.width, self.memory.new(x.size)), [x], lambda gradient: [gradient])

    def add(self, a: Value, b: Value) -> Value:
        """A sum of equally large values: both get the gradient as it is."""
        width = max(a.width, b.width)
        out = Value(a.count, width, self.new(a.count, width))
        narrow = [None if each.width == width else each.size for each in (a, b)]
        return self.record(out, [a, b], lambda gradient: [
            gradient if size is None else self.memory.new(size) for size in narrow])

    def mul(self, a: Value, b: Value) -> Value:
        """A product; the smaller factor is repeated. Keeps what the other's gradient wants."""
        count, width = max(a.count, b.count), max(a.width, b.width)
        kept = (b.storage if a.needs else None, a.storage if b.needs else None)
        wanted = [(each.count, each.width) if each.needs else None for each in (a, b)]

        def run(gradient: Storage, kept: object = kept) -> list[Storage | None]:
            made: list[Storage | None] = [None if each is None else self.new(count, width) for each in wanted]
            for place, each in enumerate(wanted):
                if each is not None and each[0] < count:  # summed over the repetitions
                    made[place] = self.new(each[0], width)
                if each is not None and each[1] < width:
                    made[place] = self.new(*each)
            return made

        return self.record(Value(count, width, self.new(count, width)), [a, b], run)

    def scale(self, x: Value) -> Value:
        """A product with a number."""
        size = x.size
        return self.record(Value(x.count, x.width, self.memory.new(size)), [x], lambda _: [self.memory.new(size)])

    def square(self, x: Value) -> Value:
        """x²: its gradient is made in three steps."""
        def run(gradient: Storage, kept: object = x.storage, size: int = x.size) -> list[Storage]:
            return [self.memory.beside(size, size, size=size)]

        return self.record(Value(x.count, x.width, self.memory.new(x.size)), [x], run)

    def mean(self, x: Value, rows: int) -> Value:
        """Of every row."""
        back = x.size
        return self.record(Value(rows, x.width, self.new(rows, x.width)), [x], lambda _: [self.memory.new(back)])

    def inverse_root(self, x: Value) -> Value:
        """1 / √(x + ε); keeps its result."""
        out = self.memory.new(x.size)

        def run(gradient: Storage, kept: object = out, size: int = x.size) -> list[Storage]:
            return [self.memory.beside(size, size, size=size)]

        return self.record(Value(x.count, x.width, out), [x], run)

    def matmul(self, x: Value, weight: Value, rows: int) -> Value:
        """`rows` rows of x times a matrix: keeps x for the weight's gradient, and the weight for that of x."""
        count = weight.count * rows // x.count * rows
        kept = (x.storage if weight.needs else None, weight.storage if x.needs else None)
        sizes = [x.size if x.needs else None, weight.size if weight.needs else None]

        def run(gradient: Storage, kept: object = kept) -> list[Storage | None]:
            of_weight = None if sizes[1] is None else self.memory.new(sizes[1])
            return [None if sizes[0] is None else self.memory.new(sizes[0]), of_weight]

        return self.record(Value(count, x.width, self.new(count, x.width)), [x, weight], run)
