"""The panel in a real kernel: as papermill and nbconvert run it, and as a person does."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

pytestmark = pytest.mark.signals

ROOT = Path(__file__).parents[2]

# What the cells need: a run that a thread of the kernel writes.
SETUP = """
import os, sys, threading, time
sys.path.insert(0, {root!r})
from pathlib import Path
from collie_lab.folder import JsonLines, RunFolder
from collie_lab.view import watch
from tests.view.fabricate import FakeRun, append, end, record

def start(steps, rate):
    folder = RunFolder.create({parent!r}, "toy")
    folder.write("status.json", {{"status": "running", "started": time.time()}})
    append(folder, "events.jsonl", [{{"time": time.time(), "kind": "start", "steps": steps, "step": 0}}])
    def work():
        for step in range(1, steps + 1):
            append(folder, "metrics.jsonl", [record(step, 1 + 1 / step, time.time())])
            time.sleep(1 / rate)
            if folder.stop_flag.exists():
                break
        end(folder, "stopped" if folder.stop_flag.exists() else "ok")
    threading.Thread(target=work).start()
    return FakeRun(folder)
"""


@pytest.fixture
def manager() -> KernelManager:
    made = KernelManager()
    made.kernel_spec.argv[0] = sys.executable
    return made


def test_an_executed_notebook_holds_the_final_picture_alone(manager: KernelManager, tmp_path: Path) -> None:
    cells = [SETUP.format(root=str(ROOT), parent=str(tmp_path)), "print('before'); watch(start(60, rate=60))",
             "watch(start(30, rate=60), start(40, rate=60), labels=['a', 'b'])"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, km=manager, timeout=60).execute()
    stream, picture = notebook.cells[1].outputs
    assert stream.text == "before\n"
    assert picture.output_type == "display_data"
    assert set(picture.data) == {"text/html", "image/png", "text/plain"}
    assert "ok: step 60/60" in picture.data["text/plain"]
    assert "<svg" in picture.data["text/html"]
    (comparison,) = notebook.cells[2].outputs
    assert set(comparison.data) == {"text/html", "image/png", "text/plain"}
    assert comparison.data["text/plain"].splitlines()[1].startswith("b: ok: step 40/40")
    assert "widgets" not in notebook.metadata
    nbformat.validate(notebook)


class Kernel:
    """A kernel and what it published."""

    def __init__(self, manager: KernelManager):
        self.manager = manager
        manager.start_kernel()
        self.client = manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, code: str, interrupt_on: str = "") -> list[dict[str, Any]]:
        """Execute as a person's notebook does; optionally interrupt at the first message of a type."""
        request = self.client.execute(code, allow_stdin=True)
        messages: list[dict[str, Any]] = []
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            if message["msg_type"] == interrupt_on:
                interrupt_on = ""
                self.manager.interrupt_kernel()
            if message["parent_header"].get("msg_id") == request:
                messages.append(message)
                if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                    return messages

    def until(self, condition: Any, seconds: float = 30) -> list[dict[str, Any]]:
        """What is published until `condition(message)` holds."""
        messages: list[dict[str, Any]] = []
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                messages.append(self.client.get_iopub_msg(timeout=0.2))
            except Empty:
                continue
            if condition(messages[-1]):
                return messages
        raise AssertionError(f"never published; last: {messages[-1:]}")


@pytest.fixture
def kernel(manager: KernelManager, tmp_path: Path) -> Iterator[Kernel]:
    made = Kernel(manager)
    try:
        made.run(SETUP.format(root=str(ROOT), parent=str(tmp_path)))
        yield made
    finally:
        made.client.stop_channels()
        manager.shutdown_kernel(now=True)


def _data(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message["content"]["data"] for message in messages if message["msg_type"] == "update_display_data"]


def _texts(messages: list[dict[str, Any]]) -> str:
    return "".join(message["content"]["text"] for message in messages if message["msg_type"] == "stream")


def test_a_person_watches_interrupts_and_presses_stop(kernel: Kernel) -> None:
    # A blocking cell: a bounded number of updates whatever the rate of records, the last one the picture.
    began = time.monotonic()
    messages = kernel.run("watch(start(1000, rate=1000))")
    updates = _data(messages)
    assert len(updates) <= 5 * (time.monotonic() - began) + 2
    assert "image/png" in updates[-1]
    assert [message["msg_type"] for message in messages].count("display_data") == 3  # panel, fold, log

    # An interrupt reaches the caller; the panel goes on to the end of the run.
    code = ("run = start(10_000, rate=50)\ntry: watch(run, stops=True)\nexcept KeyboardInterrupt:\n"
            "    run.stop(); watch(run, stops=True); print('stopped gently')")
    messages = kernel.run(code, interrupt_on="update_display_data")
    assert _texts(messages) == "stopped gently\n"
    assert "stopped: step" in _data(messages)[-1]["text/plain"]

    # A cell that does not wait: the panel lives on, its button works, and leaves no widget behind.
    messages = kernel.run("run = start(10_000, rate=50); watch(run, wait=False)")
    opened = {message["content"]["comm_id"]: message["content"]["data"]["state"]["_model_name"]
              for message in messages if message["msg_type"] == "comm_open"}
    button = next(comm for comm, name in opened.items() if name == "ButtonModel")
    click = {"comm_id": button, "data": {"method": "custom", "content": {"event": "click"}}}
    kernel.client.shell_channel.send(kernel.client.session.msg("comm_msg", click))
    messages = kernel.until(lambda message: message["msg_type"] == "comm_close"
                            and message["content"]["comm_id"] == button)
    closed = {message["content"]["comm_id"] for message in messages if message["msg_type"] == "comm_close"}
    assert closed == set(opened)
    assert any("stopped: step" in data["text/plain"] and "image/png" in data for data in _data(messages))
