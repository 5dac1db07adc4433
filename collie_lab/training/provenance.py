"""Where a run happened and with what: enough to repeat it."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from collie_lab._version import __version__

__all__ = ["provenance"]

_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy", "deepspeed")


def provenance(seed: int) -> dict[str, Any]:
    """Commit and diff hash of the working directory and of collie_lab, versions, seed, hardware, host."""
    gpu = torch.cuda.is_available()
    return {
        "collie_lab": __version__, "collie_lab_git": _git(Path(__file__).parent), "git": _git(Path.cwd()),
        "python": sys.version.split()[0], "packages": {name: _version(name) for name in _PACKAGES},
        "seed": seed, "host": platform.node(), "platform": platform.platform(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None, "cuda": torch.version.cuda if gpu else None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, str] | None:
    """The commit of a checkout and a hash of what differs from it; None outside of one."""
    def ask(*command: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True).stdout

    try:
        commit, diff = ask("rev-parse", "HEAD").strip(), ask("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "diff": hashlib.sha256(diff.encode()).hexdigest()[:12] if diff else ""}
