"""Plans that runs keep, and what they were worth."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

import pytest
from typer.testing import CliRunner

import collie_lab as lab
from collie_lab.cli import app
from collie_lab.folder import RunFolder
from collie_lab.gpus import find_gpu, on_machine
from collie_lab.planning import _client, kept
from tests.ranks import run_here

EXPERIMENT = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), data=lab.RandomTokens(length=48, documents=8),
    training=lab.Training(steps=3, batch_size=2, export=False))
SUMMARY = {"rank": 0, "first": 900, "peak": 1000, "reserved": 1100, "components": {"weights": 400, "activations": 600},
           "held": {"weights": 400, "gradients": 100, "optimizer": 200}, "course": {}, "update": 1.0,
           "layers_run": [2, 2]}
RESULT = {"peak_bytes": 800, "weights_bytes": 400, "gradients_bytes": 100, "optimizer_bytes": 220}


def _folder(name: str, status: str = "ok", **files: dict[str, Any]) -> RunFolder:
    """What a launch, its ranks and the keeper of plans leave."""
    folder = RunFolder.create("runs", name)
    EXPERIMENT.to_yaml(folder.path / "experiment.yaml")
    folder.write("launch.json", {"world_size": 1})
    folder.write("status.json", {"status": status, "pid": 1, "pid_started": 0.0, "ended": 1.0})
    for file, value in files.items():
        folder.write(f"{file}.json", value)
    return folder


def _plan(**changes: Any) -> dict[str, Any]:
    return {"gpu": None, "length": 48, "peak_bytes": 1000, "summaries": [SUMMARY], **changes}


def test_a_residual_is_planned_less_measured_by_component() -> None:
    run = lab.Run(_folder("a", plan=_plan(), result=RESULT))
    frame = run.residual
    assert list(frame.index) == ["weights", "gradients", "optimizer", "rest", "total"]
    assert list(frame["planned"]) == [400, 100, 200, 300, 1000]
    assert list(frame["measured"]) == [400, 100, 220, 80, 800]
    assert frame.loc["total", "error"] == pytest.approx(0.25)  # all in relation to the measured peak
    assert frame["error"].iloc[:-1].sum() == pytest.approx(0.25)
    assert run.summary["planned_bytes"] == 1000
    assert run.plan.peak_bytes == 1000
    assert run.plan.experiment == EXPERIMENT


def test_a_run_that_trained_is_planned_to_the_byte() -> None:
    folder = _folder("real")
    run_here(EXPERIMENT, folder.path)
    found = lab.residuals()
    row = found.frame.loc[folder.id]
    assert abs(row["error"]) < 1e-3
    assert row["weights_error"] == row["gradients_error"] == 0
    assert row["gpu"] is None
    assert repr(found).startswith("peak memory of 1 run: median error 0.0")
    assert folder.read("plan.json")["peak_bytes"] == row["planned"]  # kept for the next time


def test_dry_runs_outlive_the_thread_that_asked_first() -> None:
    _client.rest(quiet=False)
    thread = threading.Thread(target=EXPERIMENT.plan)
    thread.start()
    thread.join()
    process = _client._IDLE[False].queue[-1].process
    assert EXPERIMENT.plan().peak_bytes > 0
    # A death signal of Linux would have come with the thread's end.
    assert process is _client._IDLE[False].queue[-1].process
    assert process.stdin is not None
    process.stdin.close()  # the kernel is gone
    assert process.wait(timeout=60) == 0


def test_residuals_over_runs_say_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert repr(lab.residuals("none")) == "no runs"
    gpu = {"name": "H200", "memory": 10**11, "bandwidth": 1.0, "flops": 1.0, "link": 1.0, "workspace": 24}
    first = _folder("first", plan=_plan(), result=RESULT)
    second = _folder("second", plan=_plan(gpu=gpu), result={"peak_bytes": 1024})
    failed = _folder("failed", "cuda_oom", plan=_plan())
    refused = _folder("refused", plan={"reason": "DeepSpeed's buffers are its own"}, result=RESULT)
    found = lab.residuals()
    assert capsys.readouterr().out == ""  # nothing had to be planned
    assert found.frame["error"].dropna().to_dict() == {first.id: 0.25, second.id: 0.0}
    assert found.frame.loc[second.id, ["gpu", "weights_measured"]].tolist()[0] == "H200"
    assert found.frame.loc[second.id, "weights_measured"] != found.frame.loc[second.id, "weights_measured"]  # NaN
    assert found.frame["reason"].to_dict() == {
        first.id: "", second.id: "", failed.id: "cuda oom", refused.id: "DeepSpeed's buffers are its own"}
    assert "median error 12.500%, worst 25.000%" in repr(found)
    assert "2 without" in repr(found)
    output = CliRunner().invoke(app, ["residuals", "--figure", "residuals.png"]).output
    assert f"{first.id} llama-tiny CPU 1.00 kB 800 B +25.000% 0 0 -2.500% +27.500%" in re.sub(" +", " ", output)
    page = found._repr_html_()
    assert "+25.000%" in page
    assert "data:image/png" in page


def test_code_of_a_notebook_is_not_loaded_from_a_folder() -> None:
    def loss(logits: Any, labels: Any) -> Any:
        return logits

    from collie_lab import code

    experiment = EXPERIMENT.with_("training.loss", loss)
    folder = _folder("a", result=RESULT)
    import yaml

    (folder.path / "experiment.yaml").write_text(yaml.safe_dump(code.pack(experiment)[0]), encoding="utf-8")
    (folder.path / "code.pkl").write_bytes(b"not to be read")
    assert "Training.loss" in lab.residuals().frame.loc[folder.id, "reason"]
    folder.write("plan.json", _plan())
    assert lab.Run(folder).plan.peak_bytes == 1000


def test_a_launch_keeps_the_plan_from_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def planned(experiment: lab.Experiment, gpu: Any, quiet: bool) -> lab.Plan:
        asked.append((threading.current_thread().name, quiet))
        if experiment.name == "bad":
            raise ValueError("no such operator")
        return lab.Plan(experiment, gpu, 48, (SUMMARY,))

    monkeypatch.setattr(kept, "plan", planned)
    folders = [_folder("a"), _folder("b"), _folder("c")]
    kept.keep(EXPERIMENT, folders[0])  # switched off for the tests
    monkeypatch.delenv("COLLIE_LAB_PLANS")
    kept.keep(EXPERIMENT.replace(name="bad"), folders[1])
    kept.keep(EXPERIMENT, folders[2])
    deadline = time.monotonic() + 30
    while not folders[2].read("plan.json") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert asked == [("plans of runs", True)] * 2
    assert not folders[0].read("plan.json")
    assert folders[1].read("plan.json") == {"reason": "ValueError: no such operator"}
    assert folders[2].read("plan.json")["peak_bytes"] == 1000


@pytest.mark.parametrize(("name", "found"), [
    ("NVIDIA H200", "H200"), ("NVIDIA H200 NVL", "H200 NVL"), ("NVIDIA H100 80GB HBM3", "H100"),
    ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 NVL", "H100 NVL"), ("NVIDIA GeForce RTX 3090", "RTX 3090"),
    ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A100 80GB PCIe", "A100"), ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
    ("NVIDIA A100-PCIE-40GB", "A100-40GB"), ("NVIDIA A10", "A10"), ("NVIDIA A10G", "A10G"), ("NVIDIA L4", "L4"),
    ("NVIDIA RTX A6000", "A6000"), ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"), ("Tesla T4", "T4"),
    ("Tesla V100-SXM2-32GB", "V100"), ("Tesla V100-SXM2-16GB", "V100-16GB"), ("AMD Instinct MI300X", "MI300X"),
    ("NVIDIA A100-SXM-64GB", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("Quadro RTX 8000", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), (None, None),
])
def test_the_drivers_names(name: str | None, found: str | None) -> None:
    gpu = on_machine({"gpu": name})
    assert (gpu and gpu.name) == found
    if found is not None:
        assert find_gpu(str(name)) is gpu
