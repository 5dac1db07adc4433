"""The kernel of an arm: this very Python, without ports, and gone when the process that started it is.

A kernel of papermill's own making is whatever the machine calls `python3`, listens on ports that another one may take
at the same time, and outlives a parent that is killed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.utils import run_sync

from collie_lab.rank import die_with_parent

__all__ = ["KERNEL", "kernel"]

#: The name under which jupyter_client knows the Python that it runs in, where no other of that name is found.
KERNEL: Final = "python3"

#: What a kernel does before it answers: the notebook will want it, and this process has papermill to load meanwhile.
_FIRST: Final = "import collie_lab.study.opened; del collie_lab"


@contextmanager
def kernel(folder: Path) -> Iterator[tuple[Any, subprocess.Popen[bytes]]]:
    """A kernel manager for papermill, and its process; ended at the end."""
    manager = AsyncKernelManager(kernel_name=KERNEL, kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
                                 connection_file=str(folder / "kernel.json"))
    if sys.platform == "linux":
        manager.transport = "ipc"
        manager.ip = f"@collie-lab-{os.getpid()}"  # an abstract socket: no file is left, and no port taken
    with contextlib.suppress(FileNotFoundError):
        os.unlink(manager.connection_file)  # of an attempt that was killed
    tie = die_with_parent if sys.platform == "linux" else None
    run_sync(manager.start_kernel)(preexec_fn=tie, extra_arguments=[
        "--HistoryManager.hist_file=:memory:", f"--IPKernelApp.exec_lines={_FIRST}"])
    process = manager.provisioner.process
    try:
        yield manager, process
    finally:
        with contextlib.suppress(Exception):  # it may be dead already
            run_sync(manager.shutdown_kernel)(now=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
