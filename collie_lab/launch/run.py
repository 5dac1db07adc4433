"""The handle of a run: everything it shows is read from its folder, so any process can hold one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from collie_lab.folder import RunFolder, Tail
from collie_lab.launch import _processes
from collie_lab.launch.errors import RankError, rank_error
from collie_lab.logs import read_log

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["METRICS", "Run", "attach", "runs"]

#: The columns of `Run.metrics`.
METRICS: Final = ("step", "time", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "memory_allocated")

_SUMMARY: Final = ("loss", "perplexity", "exact_match", "peak_bytes", "tokens_per_second", "seconds")
_STACKS_WITHIN: Final = 2.0
_HARMLESS: Final = ("running", "ok", "stopped", "diverged")


class Run:
    """One launched experiment: its metrics, logs and end.

    A run belongs to the kernel that launched it and ends with it; its folder stays. `Run(path)` is a
    handle on the folder of any run, also one of another kernel.
    """

    def __init__(self, folder: RunFolder | str | Path, *, _process: subprocess.Popen[bytes] | None = None):
        self.folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
        self._process = _process
        self._metrics: list[dict[str, Any]] = []
        self._metrics_tail = Tail(self.folder.path / "metrics.jsonl")
        self._events: list[dict[str, Any]] = []
        self._events_tail = Tail(self.folder.path / "events.jsonl")

    def __repr__(self) -> str:
        step = f", step {self.steps}" if self.steps else ""
        return f"<Run {self.id}: {self.status}{step}>"

    @property
    def id(self) -> str:
        """The name of its folder."""
        return self.folder.id

    # --- state

    @property
    def alive(self) -> bool:
        """Whether its processes have not all ended yet."""
        if self._process is not None:
            return self._process.poll() is None
        state = self.folder.read("status.json")
        return bool(state) and _processes.is_process(state["pid"], state["pid_started"])

    @property
    def status(self) -> str:
        """One of `collie_lab.folder.STATUSES`."""
        alive = self.alive  # first: a supervisor writes the final status before it ends
        status = str(self.folder.read("status.json").get("status", "running"))
        return "lost" if status == "running" and not alive else status

    @property
    def detail(self) -> str:
        """One sentence on how it ended, where there is something to say: `rank 1: killed (SIGKILL)`."""
        return str(self.folder.read("status.json").get("detail", ""))

    @property
    def error(self) -> RankError | None:
        """The error of a failed run; None while it runs and where it did not fail."""
        status = self.status
        return None if status in _HARMLESS else rank_error(self.folder, status)

    # --- results

    @property
    def steps(self) -> int:
        """The last step with a record."""
        records = self._new_metrics()
        return int(records[-1]["step"]) if records else 0

    @property
    def metrics(self) -> pd.DataFrame:
        """A row a step, with the columns `METRICS`; `.loc[step]` finds a step by its number."""
        import pandas as pd

        records = self._new_metrics()
        more = dict.fromkeys(key for record in records for key in record if key not in METRICS)
        frame = pd.DataFrame(records, columns=[*METRICS, *more])
        frame = frame.astype({name: "int64" if name in ("step", "tokens") else "float64" for name in METRICS})
        return frame.set_index(frame["step"].to_numpy())

    @property
    def evaluations(self) -> pd.DataFrame:
        """A row an evaluation: its step, time and measures."""
        import pandas as pd

        self._events += self._events_tail.new()
        rows = [{key: value for key, value in event.items() if key != "kind"}
                for event in self._events if event["kind"] == "evaluation"]
        measures = dict.fromkeys(key for row in rows for key in row if key not in ("step", "time"))
        return pd.DataFrame(rows, columns=["step", "time", *measures])

    @property
    def result(self) -> dict[str, Any]:
        """What the run wrote at its end; empty before, and where it failed."""
        return self.folder.read("result.json")

    @property
    def summary(self) -> pd.Series[Any]:
        """The result in one row of a table: the last loss, the measures of the end, memory, speed and status."""
        import pandas as pd

        values: dict[str, Any] = dict.fromkeys(_SUMMARY)
        if records := self._new_metrics():
            values |= {key: records[-1].get(key) for key in ("loss", "tokens_per_second")}
        values |= self.result
        values["status"] = self.status
        return pd.Series(values, name=self.id, dtype=object)

    @property
    def experiment_yaml(self) -> str:
        """The experiment as it was launched; code of the notebook is named, not contained."""
        return (self.folder.path / "experiment.yaml").read_text(encoding="utf-8")

    @property
    def model_path(self) -> Path | None:
        """The folder of the trained model, which `from_pretrained` loads; None before it is written."""
        path = self.folder.path / "model"
        return path if path.is_dir() else None

    def logs(self, rank: int = 0, stream: Literal["out", "err", "both"] = "out", tail: int | None = None) -> str:
        """What a rank has printed; `tail` gives the last lines only."""
        streams = ("out", "err") if stream == "both" else (stream,)
        return "".join(read_log(self.folder.log(rank, name), tail) for name in streams)

    # --- control

    def wait(self, timeout: float | None = None) -> str:
        """Wait for the end and return the status. It raises for no failure: that is `run.error`.

        `TimeoutError` after `timeout` seconds; the run goes on.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while self.alive:
            if end is not None and time.monotonic() > end:
                raise TimeoutError(f"{self.id} still runs after {timeout:g} s; run.stop() or run.kill() ends it")
            time.sleep(0.05)
        return self.status

    def stop(self) -> None:
        """Ask the ranks to stop after the step they are in; returns at once.

        They write a checkpoint and their result. Ranks that do not heed it within the launch's `grace`
        (two steps, where a step takes longer) are killed.
        """
        if self.alive:
            self.folder.stop_flag.touch()

    def kill(self) -> None:
        """End all processes of the run now; returns when they are gone."""
        if not self.alive:
            return
        pid = self.folder.read("status.json")["pid"]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            self.wait(timeout=15.0)
            return
        # The supervisor itself is stuck. With its end the system ends all below it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def stacks(self) -> dict[int, str]:
        """What every rank is doing now: the Python stacks of all its threads, innermost frame first."""
        if not self.alive:
            return {}
        supervisor, plan = self.folder.read("status.json")["pid"], self.folder.read("launch.json")
        pids = _processes.ranks(supervisor)
        ranks = range(plan["world_size"]) if plan["nodes"] else pids
        ends = {rank: log.stat().st_size if (log := self.folder.log(rank, "err")).exists() else 0 for rank in ranks}
        with contextlib.suppress(ProcessLookupError):
            for pid in pids.values():
                os.kill(pid, signal.SIGUSR1)
            if plan["nodes"]:
                os.kill(supervisor, signal.SIGUSR2)  # which tells the other nodes
        deadline = time.monotonic() + _STACKS_WITHIN
        texts: dict[int, str] = {}
        while time.monotonic() < deadline:
            before = texts
            time.sleep(0.1)
            texts = {rank: _text_from(self.folder.log(rank, "err"), end) for rank, end in ends.items()}
            if texts == before and all(texts.values()):
                break
        return texts

    def _new_metrics(self) -> list[dict[str, Any]]:
        self._metrics += self._metrics_tail.new()
        return self._metrics


def runs(folder: str | Path = "runs") -> list[Run]:
    """The runs in a folder, oldest first."""
    created = {path.parent: path.stat().st_mtime for path in Path(folder).glob("*/launch.json")}
    return [Run(path) for path in sorted(created, key=lambda path: (created[path], path.name))]


def attach(id: str | Path, folder: str | Path = "runs") -> Run:
    """The handle of a run by its id (the folder's name, or an unambiguous part of it) or by its path."""
    for path in (Path(id), Path(folder) / id):
        if (path / "launch.json").is_file():
            return Run(path)
    found = [run for run in runs(folder) if str(id) in run.id]
    if len(found) == 1:
        return found[0]
    known = ", ".join(run.id for run in (found or runs(folder))[-5:]) or "none"
    raise ValueError(f"{'several runs' if found else 'no run'} in {str(folder)!r} for {str(id)!r}; there are: {known}")


def _text_from(path: Path, offset: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
