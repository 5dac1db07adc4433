"""Runs of a real kernel that is interrupted, restarted or killed, and errors as a notebook shows them."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy
from jupyter_client.manager import KernelManager

import collie_lab
from collie_lab.launch import Run, runs

SETUP = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(collie_lab.__file__).parent.parent)]!r}
import os, time, toy
"""

#: Rank 0 waits in a collective for rank 1, which never comes; both have forked children.
HANG = """
def callback(trainer):
    trainer.barrier()
    if os.fork() == 0:
        time.sleep(100)
    (trainer.folder.path / f"ready-{trainer.rank}").touch()
    if trainer.rank == 1:
        time.sleep(100)
    trainer.barrier()
"""


class Kernel:
    def __init__(self, manager: KernelManager):
        self.manager = manager
        self.client = manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def execute(self, code: str) -> None:
        """Run a cell that has to succeed."""
        reply = self.client.execute_interactive(code, timeout=60, store_history=True, output_hook=lambda _: None)
        assert reply["content"]["status"] == "ok", reply["content"]

    def begin(self, code: str) -> str:
        """Start a cell and do not wait for it; one that fails is not to abort those that follow."""
        return str(self.client.execute(code, stop_on_error=False))

    def reply(self, request: str, timeout: float) -> dict[str, Any]:
        while (message := self.client.get_shell_msg(timeout=timeout))["parent_header"].get("msg_id") != request:
            pass
        return dict(message["content"])


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    manager = KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    manager.start_kernel(cwd=str(tmp_path))
    try:
        kernel = Kernel(manager)
        kernel.execute(SETUP)
        yield kernel
        kernel.client.stop_channels()
    finally:
        manager.shutdown_kernel(now=True)


def hanging_run(kernel: Kernel, folder: Path, mark: str) -> tuple[Run, str]:
    kernel.execute(HANG)
    request = kernel.begin(f"run = toy.start({mark!r}, 'runs', callback, wait=True)")
    toy.wait_until(lambda: len(runs(folder / "runs")) == 1)
    run = runs(folder / "runs")[0]
    toy.wait_until(lambda: all((run.folder.path / f"ready-{rank}").exists() for rank in (0, 1)))
    time.sleep(0.3)  # rank 0 enters the collective
    return run, request


def test_an_interrupt_ends_the_cell_and_the_run(kernel: Kernel, tmp_path: Path, mark: str) -> None:
    run, request = hanging_run(kernel, tmp_path, mark)
    kernel.manager.interrupt_kernel()
    reply = kernel.reply(request, timeout=10)
    toy.assert_gone(mark, seconds=1.0)
    assert reply["ename"] == "KeyboardInterrupt"
    assert run.status == "stopped"
    kernel.execute("answer = 6 * 7")  # the kernel still runs cells: anything but an `ok` reply fails here


def test_a_second_interrupt_kills_and_a_heeded_one_returns_the_run(kernel: Kernel, tmp_path: Path, mark: str) -> None:
    kernel.execute("def callback(trainer):\n    time.sleep(0.1)")
    request = kernel.begin(f"run = toy.start({mark!r}, 'runs', callback, steps=1000, wait=True)")
    toy.wait_until(lambda: runs(tmp_path / "runs") and runs(tmp_path / "runs")[0].steps > 1)
    kernel.manager.interrupt_kernel()
    assert kernel.reply(request, timeout=30)["status"] == "ok"
    kernel.execute("assert run.status == 'stopped' and run.result")

    request = kernel.begin(f"toy.start({mark!r}, 'second', lambda trainer: time.sleep(100), grace=60, wait=True)")
    toy.wait_until(lambda: list(tmp_path.glob("second/*/logs/rank-1.out")))
    kernel.manager.interrupt_kernel()
    toy.wait_until(lambda: list(tmp_path.glob("second/*/stop")))
    kernel.manager.interrupt_kernel()
    assert kernel.reply(request, timeout=10)["ename"] == "KeyboardInterrupt"
    toy.assert_gone(mark, seconds=1.0)


@pytest.mark.parametrize("how", ["restart", "SIGKILL"])
def test_nothing_outlives_the_kernel(kernel: Kernel, tmp_path: Path, mark: str, how: str) -> None:
    run, _ = hanging_run(kernel, tmp_path, mark)
    if how == "restart":
        kernel.manager.restart_kernel(now=False)
    else:
        kernel.manager.signal_kernel(9)
    toy.assert_gone(mark)
    assert run.status == "stopped"
    assert "kernel" in run.detail


def test_an_interrupt_reaches_the_ranks_of_a_pool(kernel: Kernel, tmp_path: Path, mark: str) -> None:
    """A cell in Python code is interrupted, and the names stay; one in a collective takes all ranks with it."""
    kernel.execute(f"import collie_lab as lab\npool = lab.Pool(2, env={{toy.MARK: {mark!r}}})\npool.run('kept = 1')")
    request = kernel.begin("pool.run('open(f\"{rank}\", \"w\").close()\\nimport time\\ntime.sleep(100)')")
    toy.wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    kernel.manager.interrupt_kernel()
    assert kernel.reply(request, timeout=10)["ename"] == "KeyboardInterrupt"
    kernel.execute("assert pool.pull('kept') == 1")

    request = kernel.begin("pool.run('open(f\"{rank + 2}\", \"w\").close()\\nif rank == 0: dist.barrier()')")
    toy.wait_until(lambda: (tmp_path / "2").exists() and (tmp_path / "3").exists())
    kernel.manager.interrupt_kernel()
    assert kernel.reply(request, timeout=10)["ename"] == "RankError"
    toy.assert_gone(mark, seconds=5.0)
    kernel.execute("pool.close()")  # its folder is there for as long as its kernel, which a test kills


def test_a_detached_run_outlives_a_restart(kernel: Kernel, tmp_path: Path, mark: str) -> None:
    """The next kernel finds it and sees all of its metrics."""
    kernel.execute("def callback(trainer):\n"
                   "    while trainer.step == 3 and not (trainer.folder.path / 'go on').exists():\n"
                   "        time.sleep(0.05)")
    kernel.execute(f"toy.start({mark!r}, 'runs', callback, steps=4, ranks=1, detach=True)")
    toy.wait_until(lambda: runs(tmp_path / "runs")[0].steps == 2)
    kernel.manager.restart_kernel(now=False)
    kernel.client.wait_for_ready(timeout=60)
    kernel.execute(SETUP + "import collie_lab as lab\nrun = lab.attach('toy')\nassert run.alive\n"
                           "(run.folder.path / 'go on').touch()\nassert run.wait(60) == 'ok'\n"
                           "assert run.metrics['step'].tolist() == [1, 2, 3, 4]")
    toy.assert_gone(mark)


def test_a_failure_shows_the_cells_own_line(kernel: Kernel, tmp_path: Path, mark: str) -> None:
    """The edited local module is used as the kernel has it, and a failing line of a cell is shown."""
    (tmp_path / "helper.py").write_text("def number():\n    return 1\n")
    kernel.execute("import sys; sys.path.insert(0, os.getcwd()); import helper\n"
                   "helper.number = lambda: 2  # edited in the kernel")
    kernel.execute("def callback(trainer):\n"
                   "    print(helper.number())\n"
                   "    raise RuntimeError('in the cell')  # the failing line\n")
    request = kernel.begin(f"toy.start({mark!r}, 'runs', callback, ranks=1, wait=True)")
    reply = kernel.reply(request, timeout=60)
    text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(reply["traceback"]))
    assert reply["ename"] == "RankError"
    assert "raise RuntimeError('in the cell')  # the failing line" in text
    assert runs(tmp_path / "runs")[0].logs() == "2\n"
