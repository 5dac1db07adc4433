"""C++ at run time: a source becomes a library, built once and kept in `~/.cache/collie_lab` (`XDG_CACHE_HOME`)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from collie_lab.machine import user_cache

__all__ = ["build", "find_compiler", "missing_for_torch"]


def find_compiler() -> str | None:
    """The C++ compiler of this machine."""
    return next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)


def missing_for_torch() -> tuple[str, str] | None:
    """What torch.compile needs and this machine has not, and how to get it: on a GPU too, where Triton builds what
    starts its kernels."""
    if not (os.environ.get("CXX") or os.environ.get("CC") or find_compiler()):
        return "a C++ compiler", "install one (Debian: `apt install g++`)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"Python's headers ({header})", "install them (Debian: `apt install python3-dev`)"
    return None


def build(source: str, flags: Sequence[str]) -> ctypes.CDLL:
    """The library of a source, from the cache or from the compiler, which must be there.

    Its name is made of all that it depends on: the source, the flags, the compiler and the processor.

    Raises:
        OSError: the compiler refuses the source.
    """
    compiler = find_compiler()
    assert compiler is not None
    flags = [*flags, "-shared", "-fPIC"]
    key = hashlib.sha256("\n".join([source, *flags, compiler, _version(compiler), _processor()]).encode())
    folder = user_cache("kernels")
    library = folder / f"{key.hexdigest()[:32]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            file, made = Path(name) / "source.cpp", Path(name) / "library.so"
            file.write_text(source, encoding="utf-8")
            run = subprocess.run([compiler, str(file), "-o", str(made), *flags], capture_output=True, text=True)
            if run.returncode:
                raise OSError(f"{compiler} failed: {run.stderr[-500:]}")
            made.rename(library)  # whole or not at all: ranks build at the same time
    return ctypes.CDLL(str(library))


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout


@functools.cache
def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines of different kinds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    telling = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return "\n".join(sorted(telling)) or platform.platform()
