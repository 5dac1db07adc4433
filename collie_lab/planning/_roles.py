"""What a byte of a rank's memory may be for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final, Literal

__all__ = ["ROLES", "Role", "Roles"]

Role = Literal["weights", "gradients", "optimizer", "activations", "loss", "communication", "temporaries"]
ROLES: Final[tuple[Role, ...]] = (
    "weights", "gradients", "optimizer", "activations", "loss", "communication", "temporaries",
)


class Roles:
    """Knows what the bytes that appear now are for.

    Attributes:
        role: that.
    """

    role: Role = "weights"

    @contextlib.contextmanager
    def as_role(self, role: Role) -> Iterator[None]:
        """Within it, what appears is for this."""
        before, self.role = self.role, role
        try:
            yield
        finally:
            self.role = before
