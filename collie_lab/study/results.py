"""Runs side by side: a table, a figure, and files for a paper."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_lab.study.outcomes import run_figures
from collie_lab.study.presentation import Presentation

if TYPE_CHECKING:
    import pandas as pd

    from collie_lab.launch import Run

__all__ = ["Results"]


class Results(Presentation):
    """Finished runs by the name of their arm.

    A run without a result (it ran out of memory, it failed) keeps its row: its status stands in place of
    its figures.

    Raises:
        ValueError: these are no runs by name.
    """

    def __init__(self, runs: Mapping[str, Run]):
        if not isinstance(runs, Mapping) or not all(hasattr(run, "folder") for run in runs.values()):
            raise ValueError(f'Results takes runs by name, {{"AdamW": run}}, got {runs!r:.60}')
        self._runs = dict(runs)

    @property
    def runs(self) -> dict[str, Run]:
        """By the name of the arm."""
        return self._runs

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the arms are the one axis."""
        return ("Method",)

    @property
    def frame(self) -> pd.DataFrame:
        """Every figure of every run, unrounded, in base units (bytes, seconds, tokens); a row an arm.

        See `collie_lab.study.outcomes.run_figures` for what is not in `run.summary`.
        """
        import pandas as pd

        rows = {name: {**run_figures(run), "run": run.id} for name, run in self.runs.items()}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("Method")

    def export(self, folder: str | Path) -> list[Path]:
        """Write table.csv (unrounded), table.md, table.tex, figure.png, figure.pdf and arms.json.

        `arms.json` says which run each row and curve came from, with its settings and provenance.
        """
        from collie_lab.study.artefacts import save_figure

        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        table = self.table()
        self.frame.to_csv(folder / "table.csv")
        (folder / "table.md").write_text(table.to_markdown(), encoding="utf-8")
        (folder / "table.tex").write_text(table.to_latex(), encoding="utf-8")
        save_figure(self.figure(), folder / "figure", formats=("png", "pdf"))
        (folder / "arms.json").write_text(json.dumps(self._arms(), indent=1, ensure_ascii=False), encoding="utf-8")
        return sorted(path for path in folder.iterdir() if path.stem in ("table", "figure", "arms"))

    def _arms(self) -> dict[str, Any]:
        import yaml

        return {name: {"run": run.id, "status": run.status, "result": run.result,
                       "environment": run.folder.read("env.json"), "data": run.folder.read("data/index.json"),
                       "experiment": yaml.safe_load((run.folder.path / "experiment.yaml").read_text(encoding="utf-8"))}
                for name, run in self.runs.items()}
