"""FSDP2's memory in sizes: what it gathers before a layer runs, and what becomes of gradients after it.

A group is what is gathered at once: a layer, or what lies outside of all (the root). After
`torch.distributed.fsdp._fully_shard`: a buffer receives the pieces, the parameters are cut out of it, and the buffer is
let go when the next group's is there; in the backward pass the next group is gathered ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from collie_lab.planning._sizes import Memory, Parameter, Storage

__all__ = ["Group", "Sharded", "shard"]


class Group:
    """Parameters that are gathered together."""

    def __init__(self, parameters: Sequence[Parameter]):
        self.parameters = list(parameters)
        self.gathered: list[Storage] = []
        self.buffer: Storage | None = None
        self.gradients: Storage | None = None  # this rank's piece of them

    def piece(self, ranks: int, trained: bool = False) -> int:
        """Numbers of a rank's piece of all of them, or of those that get a gradient."""
        return sum(shard(each, ranks) for each in self.parameters if each.trained or not trained)


def shard(parameter: Parameter, ranks: int) -> int:
    """Numbers of the largest piece of a parameter, which is cut by its first dimension. All are padded to it."""
    return -(-parameter.shape[0] // ranks) * math.prod(parameter.shape[1:])


class Sharded:
    """The groups of a model over so many ranks.

    Attributes:
        root: what lies outside of the layers.
        layers: a group each.
    """

    def __init__(self, memory: Memory, root: Sequence[Parameter], layers: Sequence[Sequence[Parameter]], *, ranks: int,
                 kept: int, width: int, reduced: int, reshard: bool, in_backward: bool, copied: bool):
        """`kept`, `width`, `reduced`: bytes a number of the shards, in the computation, of gradients on their way.
        `copied`: messages go through a copy, as gloo's."""
        self._memory, self._ranks, self._reshard, self._in_backward = memory, ranks, reshard, in_backward
        self._kept, self._width, self._reduced, self._copied = kept, width, reduced, copied
        self.root, self.layers = Group(root), [Group(each) for each in layers]
        self._last: Group | None = None  # whose buffer is still there
        self._sent: Storage | None = None  # gradients that are being reduced

    def before(self, group: Group) -> None:
        """Gather, for a forward pass."""
        if group.gathered:
            return
        self._gather(group)
        self._cut(group)
        if self._last is not None:
            self._last.buffer = None
        self._last = group

    def after(self, group: Group) -> None:
        """After its forward pass."""
        if self._reshard:
            group.gathered = []
        if group is self.root and self._last is not None:
            self._last.buffer = None
            self._last = None

    def before_backward(self, group: Group, ahead: Group | None) -> None:
        """Have it whole, and gather the next one."""
        if not group.gathered:
            if group.buffer is None:
                self._gather(group)
            self._cut(group)
            group.buffer = None
        if ahead is not None and not ahead.gathered:
            self._gather(ahead)

    def after_backward(self, group: Group) -> None:
        """Send its gradients, and keep this rank's piece of the sum."""
        group.gathered = []
        self._sent = None
        memory, count = self._memory, group.piece(self._ranks, trained=True)
        if not count:
            return
        self._sent = memory.new(count * self._ranks * self._reduced, "communication")
        for parameter in group.parameters:
            parameter.gradient = None
        pieces: Storage | None = memory.new(count * self._reduced, "gradients")
        self._copy(count * self._ranks * self._reduced)
        if self._kept != self._reduced:
            pieces = memory.new(count * self._kept, "gradients")
        if not self._in_backward:
            group.gradients = pieces

    def finish(self) -> None:
        """The end of the backward pass."""
        for group in (*self.layers, self.root):
            if group.gathered:
                self.after_backward(group)
        self._sent = None

    def _gather(self, group: Group) -> None:
        with self._memory.as_role("communication"):
            count = group.piece(self._ranks) * self._width
            piece = None if self._kept == self._width else self._memory.new(count)
            group.buffer = self._memory.new(count * self._ranks)
            self._copy(count * self._ranks)
            del piece

    def _copy(self, size: int) -> None:
        if self._copied:
            self._memory.new(size, "temporaries")  # and it is gone

    def _cut(self, group: Group) -> None:
        group.gathered = [self._memory.new(each.count * self._width, "communication") for each in group.parameters]
