"""What a result tells of the way a run ended."""

from __future__ import annotations

from typing import Any

from collie_lab.folder import RunFolder

__all__ = ["ending"]


def ending(status: str, reason: str, folder: RunFolder) -> dict[str, Any]:
    """The newest checkpoint, whose weights are finite, and the `detail` of a run that ended before its last step."""
    newest = folder.latest_checkpoint()
    checkpoint = None if newest is None else str(newest.relative_to(folder.path))
    told: dict[str, Any] = {} if checkpoint is None else {"checkpoint": checkpoint}
    if status == "diverged":
        good = f"the last good checkpoint: {checkpoint}" if checkpoint else "there is no checkpoint"
        return {**told, "loss": None, "detail": f"{reason}; {good}"}
    return {**told, "detail": reason} if reason else told
