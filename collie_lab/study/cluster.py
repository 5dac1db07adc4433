"""What an arm asks of a cluster, whichever it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Final

from pydantic import Field, field_validator

from collie_lab.cells import Cell, Problem
from collie_lab.study.arms import Arm
from collie_lab.study.grid import size_in_bytes

if TYPE_CHECKING:
    from collie_lab.study.executor import Executor

__all__ = ["Cluster"]

#: Bytes beside those that an arm's processes may take: its parent's.
_BESIDE: Final = 10**9


class Cluster(Cell):
    """An arm runs on one node, with as much as its ranks take."""

    kind: ClassVar[str] = ""
    gpus: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]+$")
    """Every rank gets one: of a type (`h100`, as the cluster calls it), or `any`; `none` for ranks on CPUs. None: `any`
    where there are some."""
    cpus: int | None = Field(default=None, ge=1)
    """For each rank. None: one; what the cluster gives with its GPUs."""
    memory: int | None = Field(default=None, gt=0)
    """Of the host, for an arm: bytes, or `64 GB`. None: the arm's `memory_limit` and 1 GB, or what the cluster gives.
    """

    @field_validator("memory", mode="before")
    @classmethod
    def _in_bytes(cls, value: Any) -> Any:
        return size_in_bytes(value)

    def open(self, slots: int | None) -> Executor:
        """What runs arms there, so many at once; by default as many as it has room for.

        Raises:
            CellError: no such cluster answers, or the library that asks it is not installed.
        """
        raise NotImplementedError

    def on_gpus(self, there: float) -> bool:
        """Whether ranks get GPUs, where a node has so many."""
        return there > 0 if self.gpus is None else self.gpus != "none"

    @property
    def gpu_type(self) -> str | None:
        """The type of GPU that is asked for."""
        return None if self.gpus in (None, "any", "none") else self.gpus

    def cpus_of(self, ranks: int) -> int:
        """How many CPUs so many ranks take."""
        return ranks * (self.cpus or 1)

    def memory_of(self, arm: Arm) -> int | None:
        """Bytes of the host's memory that an arm asks for."""
        if self.memory is not None or arm.memory_limit is None:
            return self.memory
        return arm.memory_limit + _BESIDE

    def too_large(self, arm: Arm, gpus: float, cpus: float) -> Iterator[Problem]:
        """Why no node takes an arm, where the largest has so many GPUs and CPUs."""
        ranks = arm.gpus
        asked = [("gpus", "GPUs", ranks, gpus)] if self.on_gpus(gpus) else []
        for field, what, wanted, there in [*asked, ("cpus", "CPUs", self.cpus_of(ranks), cpus)]:
            if wanted > there and (field == "gpus" or self.cpus is not None or not asked):
                yield Problem(type(self).__name__, field, f"{arm.name!r} takes {wanted} {what}; no node has more than "
                              f"{there:g}, and an arm runs on one node", "leave the arm out of the grid: "
                              "`experiment.launch(nodes=...)` runs one experiment on several nodes")
