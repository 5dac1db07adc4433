"""Runs side by side: a table, a figure, and files for a paper."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from collie_lab.launch import Run

__all__ = ["Results"]

# What each column of the table shows: its figure in a run's summary, the unit's factor, its format.
_COLUMNS: dict[str, tuple[str, float, str]] = {
    "Trained": ("trainable", 1.0, "{:,.0f}"),
    "Loss": ("loss", 1.0, "{:.3f}"),
    "Perplexity": ("perplexity", 1.0, "{:.2f}"),
    "Exact match (%)": ("exact_match", 100.0, "{:.1f}"),
    "Peak memory (MB)": ("peak_bytes", 1e-6, "{:.1f}"),
    "TGS": ("tgs", 1.0, "{:,.0f}"),
}


class Results:
    """Finished runs by the name of their arm.

    A run without a result (it ran out of memory, it failed) keeps its row: its status stands in place of
    its figures.
    """

    def __init__(self, runs: Mapping[str, Run]):
        self.runs = dict(runs)

    @property
    def frame(self) -> pd.DataFrame:
        """Every figure of every run, unrounded, in base units (bytes, seconds, tokens); a row an arm.

        `tgs` is useful tokens per rank and second.
        """
        import pandas as pd

        rows = {}
        for name, run in self.runs.items():
            summary = run.summary
            speed = summary.get("tokens_per_second")
            tgs = float("nan") if speed is None else speed / summary.get("world_size", 1)
            rows[name] = {**summary, "tgs": tgs, "run": run.id}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("Method")

    def table(self) -> pd.DataFrame:
        """The figures that matter, as one reads them."""
        import pandas as pd

        frame, columns = self.frame, {}
        for title, (key, factor, form) in _COLUMNS.items():
            if key in frame and frame[key].notna().any():
                columns[title] = [_cell(value, factor, form, status)
                                  for value, status in zip(frame[key], frame["status"], strict=True)]
        return pd.DataFrame(columns, index=frame.index)

    def figure(self) -> Figure:
        """Loss curves and the figures of the table as bars."""
        from collie_lab.view import compare

        return compare(list(self.runs.values()), labels=list(self.runs))

    def export(self, folder: str | Path) -> list[Path]:
        """Write table.csv (unrounded), table.md, table.tex, figure.png, figure.pdf and arms.json.

        `arms.json` says which run each row and curve came from, with its settings and provenance.
        """
        import matplotlib.pyplot as plt

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        table = self.table()
        self.frame.to_csv(folder / "table.csv")
        (folder / "table.md").write_text(_markdown(table), encoding="utf-8")
        (folder / "table.tex").write_text(_latex(table), encoding="utf-8")
        figure = self.figure()
        for suffix in ("png", "pdf"):
            figure.savefig(folder / f"figure.{suffix}", dpi=200, bbox_inches="tight")
        plt.close(figure)
        (folder / "arms.json").write_text(json.dumps(self._arms(), indent=1, ensure_ascii=False), encoding="utf-8")
        return sorted(path for path in folder.iterdir() if path.stem in ("table", "figure", "arms"))

    def _arms(self) -> dict[str, Any]:
        import yaml

        return {name: {"run": run.id, "status": run.status, "result": run.result,
                       "environment": run.folder.read("env.json"), "data": run.folder.read("data/index.json"),
                       "experiment": yaml.safe_load((run.folder.path / "experiment.yaml").read_text(encoding="utf-8"))}
                for name, run in self.runs.items()}

    def _repr_html_(self) -> str:
        return str(self.table().to_html())


def _cell(value: Any, factor: float, form: str, status: str) -> str:
    if status not in ("ok", "stopped"):
        return status.replace("_", " ")
    if value is None or value != value:
        return "–"
    return form.format(float(value) * factor)


def _markdown(table: pd.DataFrame) -> str:
    """A Markdown table, columns aligned in plain text too."""
    rows = [[str(table.index.name), *table.columns], *([str(name), *row] for name, row in
                                                       zip(table.index, table.to_numpy().tolist(), strict=True))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(text.ljust(width) if column == 0 else text.rjust(width)
                               for column, (text, width) in enumerate(zip(row, widths, strict=True))) + " |"
             for row in rows]
    rule = "|" + "|".join("-" * (width + 2) if column == 0 else "-" * (width + 1) + ":"
                          for column, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _latex(table: pd.DataFrame) -> str:
    """A booktabs table; special characters are escaped."""
    plain = table.rename_axis(None)
    styler = plain.style.format(escape="latex").format_index(escape="latex").format_index(escape="latex", axis=1)
    return str(styler.to_latex(hrules=True, column_format="l" + "r" * len(table.columns)))
