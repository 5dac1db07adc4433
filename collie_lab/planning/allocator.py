"""torch's caching allocator, replayed: what it takes from the driver for a course of allocations.

After c10/cuda/CUDACachingAllocator.cpp, with its default settings: blocks of one stream, best fit, segments of 2 and
20 MiB for small and middle-sized requests, splitting and merging. Nothing is ever given back.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from collie_lab.planning._ledger import Event
from collie_lab.planning.plan import GRANULE

__all__ = ["reserved_bytes"]

_MIB: Final = 2**20
_SMALL: Final = 1 * _MIB  # the largest request that shares small segments, and the smallest rest of a large one
_SMALL_SEGMENT: Final = 2 * _MIB
_MIDDLE_SEGMENT: Final = 20 * _MIB
_LARGE: Final = 10 * _MIB  # from here on requests have segments of their own


@dataclass(eq=False, slots=True)
class _Block:
    size: int
    small: bool
    free: bool = False
    before: _Block | None = None
    after: _Block | None = None


class _Pool:
    """Free blocks by size; of equal ones the oldest comes first."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, int]] = []
        self._blocks: dict[tuple[int, int], _Block] = {}
        self._key_of: dict[_Block, tuple[int, int]] = {}
        self._count = 0

    def add(self, block: _Block) -> None:
        self._count += 1
        key = block.size, self._count
        bisect.insort(self._keys, key)
        self._blocks[key] = block
        self._key_of[block] = key

    def take(self, size: int) -> _Block | None:
        """The smallest that is large enough."""
        at = bisect.bisect_left(self._keys, (size, 0))
        if at == len(self._keys):
            return None
        block = self._blocks[self._keys[at]]
        self.remove(block)
        return block

    def remove(self, block: _Block) -> None:
        key = self._key_of.pop(block)
        del self._blocks[key], self._keys[bisect.bisect_left(self._keys, key)]


def reserved_bytes(events: Iterable[Event]) -> int:
    """What is reserved after all events."""
    pools = {True: _Pool(), False: _Pool()}
    held: dict[int, _Block] = {}
    reserved = 0
    for storage, size in events:
        if (block := held.pop(storage, None)) is not None:
            _release(block, pools[block.small])
        if not size:
            continue
        wanted = -(-size // GRANULE) * GRANULE
        small = wanted <= _SMALL
        found = pools[small].take(wanted)
        if found is None:
            segment = _SMALL_SEGMENT if small else _MIDDLE_SEGMENT if wanted < _LARGE else \
                -(-wanted // _SMALL_SEGMENT) * _SMALL_SEGMENT
            reserved += segment
            found = _Block(segment, small)
        rest = found.size - wanted
        if rest >= GRANULE if small else rest > _SMALL:
            found.size = wanted
            other = _Block(rest, small, free=True, before=found, after=found.after)
            if found.after is not None:
                found.after.before = other
            found.after = other
            pools[small].add(other)
        found.free = False
        held[storage] = found
    return reserved


def _release(block: _Block, pool: _Pool) -> None:
    """Give a block back, joined with its free neighbours."""
    if (after := block.after) is not None and after.free:
        pool.remove(after)
        _absorb(block, after)
    if (before := block.before) is not None and before.free:
        pool.remove(before)
        _absorb(before, block)
        block = before
    block.free = True
    pool.add(block)


def _absorb(block: _Block, after: _Block) -> None:
    """Join a block with the one behind it."""
    block.size += after.size
    block.after = after.after
    if block.after is not None:
        block.after.before = block
