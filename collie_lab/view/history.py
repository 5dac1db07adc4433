"""The data step of every picture: follows a run folder and holds what its files have said so far."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np

from collie_lab.folder import RunFolder, Tail, evaluations_after, read_json
from collie_lab.size import Size
from collie_lab.view.beats import Beats, Trouble
from collie_lab.view.curves import Array, Curve, curve

__all__ = ["COLUMNS", "Evaluation", "Failure", "History"]

#: The columns of `metrics.jsonl`; a value that is missing or null becomes NaN.
COLUMNS: Final = (
    "step", "time", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "memory_allocated",
)

#: The speed, and with it the remaining time, is taken over so many of the latest steps.
_WINDOW = 50


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one evaluation."""

    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class Failure:
    """One error, and all ranks that failed with it."""

    ranks: tuple[int, ...]
    kind: str
    message: str
    traceback: str


class History:
    """What a run has written so far. `update` reads what is new; everything else only looks at it.

    When a run resumes from a checkpoint and repeats steps, the later account of a step replaces the
    earlier one.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.beats = Beats(folder)
        self.warnings: list[str] = []
        self.total: int | None = None
        self.size: Size | None = None
        self.first_step = 0
        self.status = "starting"
        self.result: dict[str, Any] = {}
        self._columns = {name: array("d") for name in COLUMNS}
        self._metrics = Tail(folder.path / "metrics.jsonl")
        self._events = Tail(folder.path / "events.jsonl")
        self._evaluations: list[dict[str, Any]] = []
        self._status: dict[str, Any] = {}
        self._phase: tuple[float, str] = (0.0, "")
        self._stopping = False
        self._restarted = 0.0
        self._launch: dict[str, Any] = {}

    def update(self, alive: bool = True) -> bool:
        """Read what is new and say whether anything is. `alive`: whether the run's processes still exist."""
        before = (self.status, self._stopping)
        any_new = False
        for record in self._events.new():
            self._take_event(record)
            any_new = True
        for record in self._metrics.new():
            self._take_metrics(record)
            any_new = True
        self._status = self.folder.read("status.json")
        self.status = self._status.get("status", "starting")
        if not alive:
            # With no process left nothing will be added: what still says "running" has lost its supervisor.
            self.status = "lost" if self.status in ("starting", "running") else self.status
            self.result = self.folder.read("result.json")
        self.beats.update(now=not alive)
        self._stopping = self._stopping or self.folder.stop_flag.exists()
        return any_new or before != (self.status, self._stopping)

    def _take_metrics(self, record: dict[str, Any]) -> None:
        steps = self._columns["step"]
        while steps and steps[-1] >= record["step"]:
            for column in self._columns.values():
                column.pop()
        for name, column in self._columns.items():
            value = record.get(name)
            column.append(float("nan") if value is None else value)

    def _take_event(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        self._evaluations = evaluations_after(record, self._evaluations)
        if kind == "start":
            self.total = record.get("steps")
            self.first_step = record.get("step") or 0
            if "weight_bytes" in record:
                self.size = Size(**{field.name: record[field.name] for field in fields(Size)})
        elif kind == "phase":
            self._phase = (record["time"], record["text"])
        elif kind == "warning":
            self.warnings.append(record["text"])
        elif kind == "restart":
            self._take_restart(record)

    def _take_restart(self, record: dict[str, Any]) -> None:
        where = f"from step {record['step']:,}" if record.get("step") else "from the beginning"
        reason = f", after {record['detail']}" if record.get("detail") else ""
        self.warnings.append(f"restarted {where} (attempt {record['attempt']}){reason}")
        self._restarted = record["time"]
        self._phase = (record["time"], "restarting the processes")
        self.beats.restart()

    def __len__(self) -> int:
        """Number of steps recorded."""
        return len(self._columns["step"])

    def column(self, name: str) -> Array:
        """One of `COLUMNS`, a value a recorded step."""
        return np.array(self._columns[name], dtype=np.float64)

    def latest(self, name: str) -> float | None:
        """The last value of a column; None where it is missing."""
        column = self._columns[name]
        return column[-1] if column and column[-1] == column[-1] else None

    def curve(self, name: str, points: int = 600) -> Curve:
        """A column over the steps, raw and smoothed, with at most so many points."""
        return curve(self.column("step"), self.column(name), points)

    @property
    def evaluations(self) -> list[Evaluation]:
        """The evaluations, without what a restart has taken back."""
        return [Evaluation(record["step"], {
            key: float(value) for key, value in record.items()
            if key not in ("step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool)
        }) for record in self._evaluations]

    def evaluated(self, metric: str) -> tuple[Array, Array]:
        """Steps and values of one metric over the evaluations."""
        pairs = [(item.step, item.values[metric]) for item in self.evaluations if metric in item.values]
        steps, values = zip(*pairs, strict=True) if pairs else ((), ())
        return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)

    @property
    def step(self) -> int:
        """The last step done; the one a resumed run began with, before its first."""
        return int(self._columns["step"][-1]) if len(self) else self.first_step

    @property
    def span(self) -> tuple[int, int]:
        """The steps that an axis is to cover: from where the records begin to the planned end."""
        first = int(self._columns["step"][0]) - 1 if len(self) else self.first_step
        return first, max(self.total or 0, self.step, first + 1)

    @property
    def alive(self) -> bool:
        """Whether the run has not ended, as far as the last `update` could see."""
        return self.status in ("starting", "running")

    @property
    def phase(self) -> str:
        """What a live run does besides steps: `loading the model`; empty while it steps."""
        if not self.alive:
            return ""
        if self._stopping:
            return "stopping after this step"
        moment, text = self._phase
        if len(self):
            return text if moment > self._columns["time"][-1] else ""
        return text or "starting the processes"

    @property
    def rate(self) -> float | None:
        """Steps a second over the latest steps, evaluations between them included."""
        times = [moment for moment in self._columns["time"][-_WINDOW:] if moment > self._restarted]
        if len(times) < 2 or times[-1] <= times[0]:
            return None
        return (len(times) - 1) / (times[-1] - times[0])

    def eta(self, now: float | None = None) -> float | None:
        """Seconds until the last step, counted from `now`; None where it is unknown or the run has ended."""
        if self.rate is None or self.total is None or not self.alive:
            return None
        since = (time.time() if now is None else now) - self._columns["time"][-1]
        return max((self.total - self.step) / self.rate - max(since, 0.0), 0.0)

    def elapsed(self, now: float | None = None) -> float | None:
        """Seconds from the start of the run to `now`, or to its end."""
        start = self._status.get("started") or self._launched("created")
        if start is None:
            return None
        end = self._status.get("ended")
        if end is None:
            times = self._columns["time"]
            end = (time.time() if now is None else now) if self.alive else times[-1] if times else start
        return max(float(end) - float(start), 0.0)

    @property
    def world_size(self) -> int:
        """Number of ranks; 0 where it is not known."""
        return int(self._launched("world_size") or 0)

    def _launched(self, key: str) -> Any:
        """A word of `launch.json`, which never changes."""
        if not self._launch:
            self._launch = self.folder.read("launch.json")
        return self._launch.get(key)

    @property
    def troubles(self) -> list[Trouble]:
        """The ranks of a live run that stand out: silent for long, or behind the others."""
        return self.beats.troubles(1 / self.rate if self.rate else None) if self.alive else []

    def recent(self, name: str, window: int = 20) -> float | None:
        """The mean of a column over the latest steps, missing values left out."""
        values = [value for value in self._columns[name][-window:] if value == value]
        return sum(values) / len(values) if values else None

    def peak(self, name: str) -> float | None:
        """The largest value of a column."""
        values = self.column(name)
        values = values[np.isfinite(values)]
        return float(values.max()) if len(values) else None

    @property
    def detail(self) -> str:
        """How the run ended, in the supervisor's words where it left any."""
        if self.status == "lost":
            return "Its supervisor ended without a word. What there is to know is in `logs` of its folder."
        return str(self._status.get("detail") or "")

    def failures(self) -> list[Failure]:
        """The errors of the ranks, the earliest first, equal ones as one."""
        records = [read_json(path) for path in self.folder.errors.glob("rank-*.json")]
        records = sorted((record for record in records if record), key=lambda record: record.get("time_ns", 0))
        grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for record in records:
            grouped.setdefault((record.get("type", "error"), record.get("message", "")), []).append(record)
        return [Failure(tuple(sorted(item["rank"] for item in items)), kind, message, items[0].get("traceback", ""))
                for (kind, message), items in grouped.items()]
