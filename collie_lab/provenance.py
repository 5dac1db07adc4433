"""What ran, where, and with which versions, as far as it is known without torch."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from collie_lab._version import __version__

__all__ = ["code_version", "provenance"]

_PACKAGES: Final = ("torch", "transformers", "peft", "tokenizers", "numpy", "deepspeed")


def provenance() -> dict[str, Any]:
    """Commit and diff hash of the working directory and of collie_lab, versions, driver, host."""
    installed = _installed()
    return {
        "collie_lab": __version__, "collie_lab_git": _git(Path(__file__).parent), "git": _git(Path.cwd()),
        "python": sys.version.split()[0], "packages": {name: installed.get(name) for name in _PACKAGES},
        "environment": _digest("\n".join(f"{name}=={version}" for name, version in sorted(installed.items()))),
        "driver": _driver(), "host": platform.node(), "platform": platform.platform(), "cores": os.cpu_count(),
    }


def code_version(facts: dict[str, Any]) -> str:
    """The version of collie_lab that stands in a provenance, in a word: `8c5ee3d2`, `8c5ee3d2+1f0c` with changes."""
    git = facts.get("collie_lab_git")
    if not git:
        return str(facts.get("collie_lab", ""))
    return str(git["commit"][:8]) + (f"+{git['diff'][:4]}" if git["diff"] else "")


def _installed() -> dict[str, str]:
    """Every installed package and its version, what a lock file would say, from the names of their folders: it takes
    half a second to read the files of all."""
    found: dict[str, str] = {}
    for place in filter(None, reversed(sys.path)):
        for folder in Path(place).glob("*.dist-info"):
            name, _, version = folder.name.removesuffix(".dist-info").partition("-")
            found[name.lower().replace("_", "-")] = version
    return found


def _driver() -> str | None:
    """The version of NVIDIA's driver."""
    try:
        found = re.search(r"Kernel Module[^\d]*([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found[1] if found else None


@functools.cache
def _git(folder: Path) -> dict[str, str] | None:
    """The commit of a checkout and a hash of what differs from it; None outside of one."""
    def ask(*command: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True).stdout

    try:
        commit, diff = ask("rev-parse", "HEAD").strip(), ask("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "diff": _digest(diff) if diff else ""}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
