"""The panel as people meet it: in JupyterLab, live, after the end, after a reload, in both themes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

if TYPE_CHECKING:
    from tests.browser.lab import Lab

pytestmark = [pytest.mark.browser, pytest.mark.ranks, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "notebooks" / "00_quickstart.ipynb"

EXPERIMENT = """
import collie_lab as lab
exp = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), parallel=lab.Parallel(dp=2), optimizer=lab.AdamW(lr=3e-3),
    data=lab.Skills(size=100, test_size=10, packing=True, max_length=64),
    training=lab.Training(steps=100_000, batch_size=4, export=False),
)
"""

FAILS = """
def fails(trainer):
    print("rank", trainer.rank, "was here")
    if trainer.rank == 1:
        raise ValueError(f'no <word> at {trainer.step}')

exp.replace(callbacks=(fails,)).launch()
"""

#: Runs that no rank works on: what the panel shows, all at once.
FABRICATED = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from collie_lab.folder import RunFolder
from collie_lab.view import watch
from tests.view.fabricate import FakeRun, append, end, record

for status in ("running", "ok", "stopped", "diverged", "error"):
    folder = RunFolder.create("runs", status)
    folder.write("status.json", {{"status": "running", "started": time.time()}})
    append(folder, "metrics.jsonl", [record(step, 1 + 1 / step) for step in range(1, 31)])
    append(folder, "events.jsonl", [
        {{"time": 0, "kind": "start", "steps": 40, "step": 0, "world_size": 2}},
        {{"time": 0, "kind": "evaluation", "step": 20, "perplexity": 4.0}},
        {{"time": 0, "kind": "warning", "text": "half of the tokens are padding"}}])
    if status == "error":
        folder.write("errors/rank-1.json", {{"rank": 1, "time_ns": 1, "type": "ValueError", "message": "no such word",
                                            "traceback": "Traceback (most recent call last):\\n  line 7"}})
    if status != "running":
        end(folder, status, detail="rank 1: exit code 1" if status == "error" else "")
    watch(FakeRun(folder), wait=False)
"""


def test_the_quickstart_moves_ends_and_stays(lab: Lab) -> None:
    small = {"model": "llama-tiny", "ranks": 1, "pretraining_steps": 60, "steps": 4, "answers": 8, "out": "out"}
    nbformat.write(parameterize_notebook(load_notebook_node(str(QUICKSTART)), small), lab.folder / "quickstart.ipynb")
    notebook = lab.open("quickstart.ipynb")
    notebook.record()
    notebook.run_all()
    notebook.until_idle(seconds=480)

    running = (re.match(r"pretraining-.*?running.*?step (\d+)/60", text) for text in notebook.page.evaluate("said"))
    steps = [int(match[1]) for match in running if match]
    assert steps == sorted(steps)
    assert len(set(steps)) > 3
    texts = notebook.texts()
    for text, name in zip(texts, ("pretraining", "adamw", "lomo", "lora"), strict=True):
        assert re.match(f"{name}-.*ok.*took", text)
    assert (lab.folder / "out" / "table.md").exists()

    notebook.save_and_reload()
    assert notebook.texts() == texts
    assert notebook.outputs.locator("img").count() == 1  # the figure


def test_the_stop_button_ends_the_run_with_its_result(lab: Lab) -> None:
    notebook = lab.open("stop.ipynb", EXPERIMENT, "run = exp.launch(wait=False)",
                        "run.wait(), run.result['status'], run.result['steps'] == run.steps")
    notebook.run_cell(0)
    notebook.run_cell(1)
    notebook.until_panel(r"step [1-9]\d*/")
    button = notebook.outputs.get_by_role("button", name="Stop")
    button.click()
    notebook.run_cell(2)
    notebook.until_idle()
    assert notebook.outputs.last.inner_text().strip() == "('stopped', 'stopped', True)"
    button.wait_for(state="detached")
    texts = notebook.texts()
    assert "stopped" in texts[0]
    notebook.save_and_reload()
    assert notebook.texts() == texts
    assert notebook.outputs.locator(".jupyter-widgets").count() == 0


def test_a_failing_rank_is_told_in_the_panel_and_raised_in_the_cell(lab: Lab) -> None:
    notebook = lab.open("fails.ipynb", EXPERIMENT, FAILS, "'reached'")
    notebook.run_all()
    notebook.until_idle()
    assert "rank 1: ValueError: no <word> at 1" in "\n".join(notebook.panels.locator(".box").all_inner_texts())
    error = notebook.outputs.last.inner_text()  # the next cell has none: it was not reached
    assert "RankError: error: rank 1: ValueError: no <word> at 1" in error
    assert "raise ValueError(f'no <word> at {trainer.step}')" in error

    log = notebook.outputs.locator("pre", has_text="rank 0 was here")
    assert not log.is_visible()
    notebook.outputs.get_by_text("log of rank 0").click()
    assert log.is_visible()


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_every_text_is_readable(lab: Lab, theme: str) -> None:
    notebook = lab.open(f"{theme}.ipynb", FABRICATED)
    notebook.theme(theme)
    notebook.run_all()
    notebook.until_idle()
    contrasts = notebook.contrasts()
    assert {"running", "ok", "stopped", "diverged", "error", "loss", "half of the tokens are padding"} <= set(contrasts)
    assert {text: ratio for text, ratio in contrasts.items() if ratio < 4.5} == {}  # WCAG 2.1, level AA
