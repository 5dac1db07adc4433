"""Tables and files from run folders; no process is started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import collie_lab as lab
from collie_lab.folder import JsonLines, RunFolder
from tests.study.fabricate import made_run
from tests.study.grids import toy_grid


def _run(name: str, status: str = "ok", **result: float) -> lab.Run:
    folder = RunFolder.create("runs", name)
    lines = JsonLines(folder.path / "metrics.jsonl")
    for step in range(1, 4):
        lines.append({"step": step, "time": step, "loss": 3.0 / step, "lr": 0.1, "grad_norm": 1.0, "tokens": 100,
                      "tokens_per_second": 50.0, "mfu": None, "memory_allocated": 10})
    lines.close()
    (folder.path / "experiment.yaml").write_text("model: {source: x}\n", encoding="utf-8")
    folder.write("status.json", {"status": status, "pid": 1, "pid_started": 0.0, "started": 0.0, "ended": 1.0})
    if result:
        folder.write("result.json", {"status": status, "steps": 3, "world_size": 2, **result})
    return lab.Run(folder)


@pytest.fixture
def results() -> lab.Results:
    good = {"loss": 1.0, "perplexity": 2.5, "exact_match": 0.25, "peak_bytes": 2_000_000, "tokens_per_second": 3000.0,
            "trainable": 1234}
    return lab.Results({"AdamW & co": _run("a", **good), "LOMO": _run("b", "cuda_oom")})


@pytest.mark.parametrize("runs", [["run-1"], {"AdamW": "run-1"}])
def test_what_are_no_runs_by_name_is_said(runs: Any) -> None:
    with pytest.raises(ValueError, match=r'takes runs by name, {"AdamW": run}, got .*run-1'):
        lab.Results(runs)


def test_table_shows_figures_and_a_failed_run_as_its_status(results: lab.Results) -> None:
    table = results.table()
    assert table.loc["AdamW & co"].to_dict() == {
        "Trained": "1,234", "Loss": "1.000", "Perplexity": "2.50", "Exact match (%)": "25.0",
        "Peak memory (MB)": "2.0", "TGS": "1,500"}
    assert set(table.loc["LOMO"]) == {"cuda oom"}


def test_a_table_of_no_runs_has_its_head_in_every_format(tmp_path: Path) -> None:
    table = lab.Results({}).table()
    assert table.to_markdown() == "| Method |\n|--------|\n"
    for siunitx in (False, True):
        assert "\\toprule\nMethod \\\\\n\\midrule\n\\bottomrule" in table.to_latex(siunitx=siunitx)
    assert len(table.save(tmp_path / "table")) == 5
    assert lab.Results({}).table(["loss"]).to_latex() == table.to_latex()


def test_export_goes_to_the_home_folder(results: lab.Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert {file.parent for file in results.export("~/out")} == {tmp_path / "out"}


def test_export_writes_every_format_and_where_it_comes_from(results: lab.Results, tmp_path: Path) -> None:
    files = results.export(tmp_path / "out")
    names = ["arms.json", "figure.pdf", "figure.png", "table.csv", "table.md", "table.tex"]
    assert [file.name for file in files] == names
    frame = pd.read_csv(tmp_path / "out" / "table.csv", index_col=0)
    assert frame.loc["AdamW & co", "peak_bytes"] == 2_000_000
    assert frame.loc["AdamW & co", "tgs"] == 1500
    markdown = (tmp_path / "out" / "table.md").read_text(encoding="utf-8").splitlines()
    assert markdown[0].startswith("| Method")
    assert len({len(line) for line in markdown}) == 1
    latex = (tmp_path / "out" / "table.tex").read_text(encoding="utf-8")
    assert r"AdamW \& co & 1,234 & 1.000" in latex
    assert r"\toprule" in latex
    arms = json.loads((tmp_path / "out" / "arms.json").read_text(encoding="utf-8"))
    assert arms["LOMO"]["status"] == "cuda_oom"
    assert arms["AdamW & co"]["run"] == results.runs["AdamW & co"].id


def test_a_study_without_axes_is_one_row_over_its_seeds(tmp_path: Path) -> None:
    study = lab.Study(toy_grid([0, 1, 2]), results=tmp_path / "results")
    for arm, loss in zip(study.arms, (1.0, 2.0, 3.0), strict=True):
        folder = study._made(arm)
        shutil.move(made_run(loss=lambda step, loss=loss: loss, peak_bytes=1e9).folder.path, folder.runs)
        folder.write_status({"status": "ok"})
    table = study.table(["loss"])
    assert table.text.to_dict() == {"Loss": {"toy": "2.000 ± 1.000"}}
    assert table.arms == ["seed=0", "seed=1", "seed=2"]
    assert "2.000 ± 1.000" in table.to_latex().replace(r"$\pm$", "±")
    assert study.figure("bars", metric="loss").data["n"].tolist() == [3]
    assert study.figure("curves").data["loss_std"].tolist() == pytest.approx([1.0] * 30)
    assert not study.fairness()
    alone = lab.Study({key: value for key, value in toy_grid([]).items() if key != "seeds"}, results=tmp_path / "alone")
    assert alone.axes == ["study"]
    assert list(alone.table(["loss"]).loc["toy"]) == ["pending"]


def test_an_axis_keeps_its_labels_where_a_figure_has_its_name(tmp_path: Path) -> None:
    steps = {"short": {"training.steps": 2}, "long": {"training.steps": 3}}
    study = lab.Study(toy_grid([0], product={"steps": steps}), results=tmp_path)
    for arm in study.arms:
        shutil.move(made_run().folder.path, study._made(arm).runs)
        study._made(arm).write_status({"status": "ok"})
    assert study.frame["steps"].tolist() == ["short", "long"]
    assert study.table(["loss"]).rows == [("short",), ("long",)]
