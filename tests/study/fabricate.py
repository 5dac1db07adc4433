"""Outcomes made up for the tests: run folders as ranks and supervisor would have written them, and a frame of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

import collie_lab as lab
from collie_lab.code import pack
from collie_lab.folder import JsonLines, RunFolder
from collie_lab.study.outcomes import run_figures
from collie_lab.study.presentation import Presentation

ENVIRONMENT = {
    "collie_lab": "0.1.0", "collie_lab_git": {"commit": "1a7fb8003a3cdc98", "diff": ""}, "python": "3.11.7",
    "packages": {"torch": "2.13.0", "transformers": "5.23.0"}, "host": "a", "platform": "Linux", "cores": 2,
    "threads": 1, "gpu": None, "cuda": None,
}
BASE = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), data=lab.Skills(packing=True),
    training=lab.Training(steps=30, batch_size=8, micro_batch_size=4), evaluate=(lab.Perplexity(),),
)


class Fabricated(Presentation):
    """Arms on some axes, added one by one."""

    def __init__(self, *axes: str, tuned: Mapping[str, str] | None = None):
        self._axes, self._tuned = axes, dict(tuned or {})
        self._rows: dict[str, dict[str, Any]] = {}
        self._runs: dict[str, lab.Run] = {}

    @property
    def axes(self) -> Sequence[str]:
        return self._axes

    @property
    def tuned(self) -> Mapping[str, str]:
        return self._tuned

    @property
    def runs(self) -> Mapping[str, lab.Run]:
        return self._runs

    @property
    def frame(self) -> pd.DataFrame:
        return pd.DataFrame.from_dict(self._rows, orient="index").rename_axis("arm")

    def add(self, *labels: Any, run: lab.Run | None = None, status: str = "ok", **figures: Any) -> None:
        """An arm with its labels, in the order of the axes, and its figures."""
        name = "-".join(map(str, labels))
        row = {"id": f"{len(self._rows):012x}", **dict(zip(self._axes, labels, strict=True))}
        if run is not None:
            self._runs[name] = run
            row |= run_figures(run)
        self._rows[name] = {**row, "status": status, "reason": None if status == "ok" else f"it {status}", **figures}


def made_run(
    experiment: lab.Experiment = BASE, status: str = "ok", *, tokens: int = 2000, steps: int | None = None,
    loss: Callable[[int], float] = lambda step: 3 / step, fingerprint: str = "b6e6", environment: Any = None,
    **result: Any,
) -> lab.Run:
    """The run of an experiment that nobody has launched."""
    folder = RunFolder.create("runs", experiment.name)
    lines, steps = JsonLines(folder.path / "metrics.jsonl"), steps or experiment.training.steps
    for step in range(1, steps + 1):
        lines.append({"step": step, "time": 1.7e9 + step, "loss": loss(step), "lr": 1e-3, "grad_norm": 1.0,
                      "tokens": tokens, "tokens_per_second": tokens, "mfu": None, "memory_allocated": 10})
    lines.close()
    (folder.path / "experiment.yaml").write_text(yaml.safe_dump(pack(experiment)[0]), encoding="utf-8")
    folder.write("env.json", {**ENVIRONMENT, **(environment or {})})
    folder.write("launch.json", {"world_size": 1, "resume_from": None})
    folder.write("status.json", {"status": status, "pid": 1, "pid_started": 0.0, "started": 1.7e9,
                                 "ended": 1.7e9 + steps, "detail": ""})
    (folder.path / "data").mkdir()
    folder.write("data/index.json", {"fingerprint": fingerprint, "summary": {
        "Skills, train": {"documents": 4000}, "Skills, test": {"documents": 200}}})
    Path(folder.checkpoints / "step-000030").mkdir()
    (folder.checkpoints / "step-000030" / "weights.distcp").write_text("weights")
    if status in ("ok", "stopped"):
        folder.write("result.json", {"status": status, "steps": steps, "world_size": 1, "seconds": float(steps),
                                     "loss": loss(steps), "tokens_per_second": float(tokens), **result})
    return lab.Run(folder)
