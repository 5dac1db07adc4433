"""What this machine has, known without torch."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["visible_gpus"]


def visible_gpus() -> list[str]:
    """The GPUs that processes of this one would see, as `CUDA_VISIBLE_DEVICES` names them."""
    folder, visible = Path("/proc/driver/nvidia/gpus"), os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(list(folder.iterdir())) if folder.is_dir() else 0
    if count and visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number in range(count)]
