"""The notebooks of the studies, executed by papermill at their smallest profile, and the grids of all profiles.

Their arms have run by then, in this process, and so has the forecast: what a notebook finds, it does not run again.
That arms run from a study is shown in tests/study.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
import torch

import collie_lab as lab
from collie_lab.check import check_cells
from collie_lab.data import prepare
from collie_lab.folder import RunFolder, read_json, write_json
from collie_lab.provenance import provenance
from collie_lab.study import Arm, peer
from collie_lab.study.store import ArmFolder
from tests.ranks import run_here

ROOT = Path(__file__).resolve().parents[2]
#: Notebooks by their grids.
NOTEBOOKS = {"memory": "01_memory_vs_model_size", "throughput": "02_throughput",
             "optimizers_and_peft": "03_optimizers_and_peft", "pretraining": "04_pretraining"}


def _grid(name: str) -> Path:
    return ROOT / "experiments" / f"{name}.yaml"


def _run_all(study: lab.Study) -> None:
    """Every arm in this process; tuning tells of some only when others have ended."""
    done: set[str] = set()
    while arms := [arm for arm in study.arms if arm.id not in done]:
        for arm in arms:
            _run_arm(arm, study.results)
            done.add(arm.id)


def _run_arm(arm: Arm, results: Path) -> None:
    place = ArmFolder.create(results, arm)
    folder = RunFolder(place.runs / "run")
    if arm.module == peer.MODULE:
        folder.checkpoints.mkdir(parents=True)
        prepare(arm.experiment, folder)
        folder.write("launch.json", {"resume_from": None})
        peer.run(arm.experiment, folder, torch.device("cpu"))
    else:
        run_here(arm.experiment, folder.path)
        folder.write("env.json", provenance() | {"seed": arm.seed, "threads": 1})
    arm.experiment.to_yaml(folder.path / "experiment.yaml")
    folder.write("status.json", {"status": "ok", "ended": time.time(), "pooled": True})
    write_json(place.path / "status.json", {"status": "ok", "attempts": 1, "seconds": 1.0, "provenance": provenance()})


def _execute(name: str, folder: Path, **parameters: Any) -> nbformat.NotebookNode:
    papermill.execute_notebook(
        ROOT / "notebooks" / f"{NOTEBOOKS[name]}.ipynb", folder / "out.ipynb", cwd=ROOT, progress_bar=False,
        parameters={"profile": "tiny", "results": str(folder / "results"), "out": str(folder / "out"), **parameters})
    return nbformat.read(folder / "out.ipynb", as_version=4)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name: str, tmp_path: Path) -> None:
    study = lab.Study(_grid(name), "tiny", results=tmp_path / "results")
    planned = study.forecast()["planned_bytes"]
    _run_all(study)
    more = {"paper_plans": False} if name == "memory" else {}
    notebook = _execute(name, tmp_path, **more)
    assert study.status()["ok"] == len(study.arms)
    assert {arm.name for arm in study.arms if ArmFolder.find(study.results, arm.id).state["attempts"] != 1} == set()
    out = tmp_path / "out" / ("scratch" if name == "pretraining" else "")
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", [])
                if "image/png" in output.get("data", {})]
    figures = sorted(path.stem for path in (out / "figures").glob("*.png"))
    assert len(pictures) == len(figures) >= 2
    for file in (*out.glob("figures/*.png"), *out.glob("tables/*.tex")):
        assert read_json(file.with_suffix(".json"))["arms"], file
    assert (out / "report.html").stat().st_size > 10_000
    if name == "memory":  # the peaks are those of the plans, up to 74 kB at the embedding of the smallest model
        frame = study.frame
        assert list(frame["peak_bytes"]) == pytest.approx(list(planned[frame.index]), rel=0.01, abs=80_000)


def test_an_unknown_parameter_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(papermill.PapermillExecutionError, match=r"profil.*unknown parameter"):
        _execute("throughput", tmp_path, profil="cpu")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("name", "profile"), [
    (name, profile) for name in NOTEBOOKS for profile in ("cpu", "tiny", "gpu", "gpu8", "paper")
] + [("pretraining", "cpu_further")])
def test_every_arm_of_every_profile_can_start(name: str, profile: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"data": {"kind": "skills"}} if profile not in ("cpu", "tiny") else {}
    if name == "optimizers_and_peft" and profile not in ("cpu", "tiny"):  # models of a hub
        changes["model"] = {"source": "llama-7b", "init": "random"}
    study = lab.Study(_grid(name), profile, results=tmp_path, changes=changes)
    for arm in study.arms:
        if arm.experiment.parallel.engine == "deepspeed":
            pytest.importorskip("deepspeed")
        assert not check_cells(arm.experiment).errors + arm.refused, arm.name
