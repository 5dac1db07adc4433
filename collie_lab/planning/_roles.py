"""What a byte of a rank's memory may be for."""

from __future__ import annotations

from typing import Final, Literal

__all__ = ["ROLES", "Role"]

Role = Literal["weights", "gradients", "optimizer", "activations", "loss", "communication", "temporaries"]
ROLES: Final[tuple[Role, ...]] = (
    "weights", "gradients", "optimizer", "activations", "loss", "communication", "temporaries",
)
