"""The nodes cell: the machines of a launch. No part of an experiment, which is the same on any number of them."""

from __future__ import annotations

from pydantic import Field

from collie_lab.cells._base import Cell

__all__ = ["Nodes"]


class Nodes(Cell):
    """So many machines, each with the same number of ranks: `experiment.launch(nodes=Nodes(2, "10.0.0.1"))`.

    The notebook's machine is node 0. On each of the others one runs the command that `launch` prints. They share
    the file system on which the run folder lies, and a private network: whoever reaches `address` could join.
    """

    count: int = Field(ge=2)
    """Machines, the notebook's own included."""
    address: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """The IPv4 address or name by which the others reach the notebook's machine."""
    port: int = Field(default=29500, ge=1, le=65535)
    """A free port of the notebook's machine, for torchrun's rendezvous."""
    interface: str | None = None
    """The network interface of the ranks' messages, on every machine. None: the one that leads to `address`."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds to wait for the other machines."""

    def __init__(self, count: int, address: str, **fields: object) -> None:
        super().__init__(count=count, address=address, **fields)
