"""What this machine has, and where it keeps things; known without torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

__all__ = ["gpu_model", "usable_cpus", "user_cache", "visible_gpus"]

#: A folder for each GPU, of NVIDIA's driver.
_DRIVER: Final = Path("/proc/driver/nvidia/gpus")


def visible_gpus() -> list[str]:
    """The GPUs that processes of this one would see, as `CUDA_VISIBLE_DEVICES` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(list(_DRIVER.iterdir())) if _DRIVER.is_dir() else 0
    if count and visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number in range(count)]


def gpu_model() -> str:
    """What the driver calls the first of the GPUs that processes of this one would see, `NVIDIA GeForce RTX 3090`; ""
    without one."""
    for folder in sorted(_DRIVER.iterdir()) if visible_gpus() else ():
        for line in (folder / "information").read_text(encoding="utf-8").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return ""


def usable_cpus() -> int:
    """The CPUs that this process may use: a job or a container often has a few of the machine's alone."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def user_cache(kind: str) -> Path:
    """The user's folder for what was found or made once and would be the same again: `~/.cache/collie_lab`, or beneath
    `XDG_CACHE_HOME`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "collie_lab" / kind
