"""Figures as CSV files."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from collie_lab import cells
from collie_lab.training.callbacks.sinks import Kind, Opening, Sink

__all__ = ["Tables"]


class Tables(Sink):
    """`metrics.csv` with a row a step, `evaluations.csv` with a row an evaluation."""

    name = "CSV"

    def __init__(self, cell: cells.CSV):
        super().__init__()
        self._folder = cell.folder
        self._tables: dict[Kind, _Table] = {}

    @override
    def open(self, opening: Opening) -> None:
        folder = opening.place(self._folder, opening.folder.path)
        folder.mkdir(parents=True, exist_ok=True)
        self._tables = {"train": _Table(folder / "metrics.csv", opening.step),
                        "eval": _Table(folder / "evaluations.csv", opening.step)}

    @override
    def write(self, kind: Kind, step: int, moment: float, figures: Mapping[str, float]) -> None:
        self._tables[kind].add({"step": step, "time": moment, **figures})

    @override
    def close(self, result: Mapping[str, Any] | None) -> None:
        """Every row is written already."""


class _Table:
    """A CSV file that grows by rows and, seldom, by columns; it begins with what is there of steps up to `until`."""

    def __init__(self, path: Path, until: int):
        self._path = path
        self._columns: list[str] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self._columns = list(reader.fieldnames or ())
                rows = [row for row in reader if int(row["step"]) <= until]
            self._rewrite(rows)

    def add(self, row: dict[str, Any]) -> None:
        if new := [name for name in row if name not in self._columns]:
            rows: list[dict[str, Any]] = []
            if self._columns:
                with self._path.open(newline="", encoding="utf-8") as file:
                    rows = list(csv.DictReader(file))
            self._columns += new
            self._rewrite(rows)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        temporary = self._path.with_name(f".{self._path.name}.partial")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self._path)
