"""The quickstart, executed by papermill as the demo does it, small; on generated and on real input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "00_quickstart.ipynb"
FILES = {"arms.json", "figure.pdf", "figure.png", "table.csv", "table.md", "table.tex"}


def _execute(**parameters: Any) -> nbformat.NotebookNode:
    papermill.execute_notebook(NOTEBOOK, "out.ipynb", parameters={"out": "out", **parameters}, progress_bar=False)
    return nbformat.read("out.ipynb", as_version=4)


def _check(notebook: nbformat.NotebookNode) -> list[str]:
    assert {file.name for file in Path("out").iterdir()} == FILES
    images = [output for cell in notebook.cells for output in cell.get("outputs", [])
              if "image/png" in output.get("data", {})]
    assert len(images) >= 3  # what the panels leave, and the figure
    text = Path("out/table.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("|")]  # below it: what is unequal between the arms
    assert len(table) == 5
    assert not any("–" in row or "error" in row for row in table[2:])
    return table


@pytest.mark.parametrize(("parameters", "message"), [
    ({"stepps": 500}, r"stepps.*unknown parameter"), ({"batch_size": 3}, r"batch_size.*cannot be shared equally"),
])
def test_what_is_wrong_is_told_before_the_pool_starts(parameters: dict[str, int], message: str) -> None:
    with pytest.raises(papermill.PapermillExecutionError, match=message):
        _execute(**parameters)
    run = [cell for cell in nbformat.read("out.ipynb", as_version=4).cells if cell.get("execution_count")]
    assert not any("lab.Pool(" in cell.source for cell in run)


@pytest.mark.ranks
def test_on_generated_data() -> None:
    table = _check(_execute(pretraining_steps=4, steps=4, batch_size=4, answers=8))
    assert [row.split("|")[1].strip() for row in table[2:]] == ["AdamW", "LOMO", "LoRA"]


@pytest.mark.ranks
def test_on_a_trained_model_and_real_data(shared: Path) -> None:
    splits = json.loads((shared / "data/clinc150/data_full.json").read_text(encoding="utf-8"))
    Path("some.json").write_text(json.dumps({name: rows[::20] for name, rows in splits.items()}), encoding="utf-8")
    _check(_execute(model=str(shared / "models/stories260k"), data="some.json", steps=6, batch_size=8, answers=8))
