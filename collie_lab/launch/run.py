"""The handle of a run: everything it shows is read from its folder, so any process can hold one."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from collie_lab.asks import Answer, Asks
from collie_lab.folder import RunFolder, Tail, best_checkpoints, evaluations_after
from collie_lab.launch import _processes, _stacks
from collie_lab.launch._stall import shows_life
from collie_lab.launch.errors import RankError, rank_error
from collie_lab.logs import read_log

if TYPE_CHECKING:
    import pandas as pd

    from collie_lab.launch.pool import Pool
    from collie_lab.planning import Plan

__all__ = ["METRICS", "Run", "attach", "runs"]

#: The columns of `Run.metrics`.
METRICS: Final = ("step", "time", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "memory_allocated")

_SUMMARY: Final = ("loss", "perplexity", "exact_match", "peak_bytes", "planned_bytes", "tokens_per_second", "seconds")
_HARMLESS: Final = ("running", "ok", "stopped", "diverged")


class Run:
    """One launched experiment: its metrics, logs and end.

    A run belongs to the kernel that launched it and ends with it; its folder stays. `Run(path)` is a
    handle on the folder of any run, also one of another kernel.
    """

    def __init__(self, folder: RunFolder | str | Path, *, _owner: subprocess.Popen[bytes] | Pool | None = None):
        self.folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
        self._owner = _owner  # a pool lives at least as long as the handles of its runs
        self._metrics: list[dict[str, Any]] = []
        self._metrics_tail = Tail(self.folder.path / "metrics.jsonl")
        self._evaluations: list[dict[str, Any]] = []
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
        """Whether its processes have not all ended yet.

        On another machine, which has to share the folder, they cannot be seen. There it is whether the run has no final
        status, and has written a sign of life within half an hour.
        """
        if isinstance(self._owner, subprocess.Popen):
            return self._owner.poll() is None
        state = self.folder.read("status.json")
        if not state or (state.get("pooled") and state["ended"] is not None):  # a pool outlives its runs
            return False
        if self.host != socket.gethostname():
            return state["ended"] is None and shows_life(self.folder)
        return _processes.is_process(state["pid"], state["pid_started"])

    @property
    def host(self) -> str:
        """The machine that it was launched on."""
        return str(self.folder.read("status.json").get("host", socket.gethostname()))

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

        for event in self._events_tail.new():
            self._evaluations = evaluations_after(event, self._evaluations)
        measures = dict.fromkeys(key for row in self._evaluations for key in row if key not in ("kind", "step", "time"))
        return pd.DataFrame(self._evaluations, columns=["step", "time", *measures])

    def answers(self, evaluation: str | None = None, step: int | None = None) -> pd.DataFrame:
        """The raw answers of an evaluation, a row a sample, in the order of the data: what was asked, what the model
        said or how likely it found each choice, the reference, and the scores.

        `evaluation` is its kind, its `name` before it (`exact_match`, `dev_exact_match`); it may be left out where
        there is one alone. `step` is the last one by default.

        Raises:
            ValueError: there are several evaluations, or none of this name or at this step; those that there are.
        """
        import pandas as pd

        found: dict[str, dict[int, Path]] = {}
        for path in sorted(self.folder.evaluations.glob("*-step-*.jsonl")):
            name, _, number = path.stem.rpartition("-step-")
            found.setdefault(name, {})[int(number)] = path
        if evaluation is None and len(found) == 1:
            evaluation = next(iter(found))
        if evaluation not in found:
            raise ValueError(f"{self.id} has answers of: {', '.join(found) or 'no evaluation yet'}"
                             + (f"; not of {evaluation!r}" if evaluation else "; name one"))
        steps = found[evaluation]
        if step is not None and step not in steps:
            raise ValueError(f"{evaluation} was run after steps {', '.join(map(str, steps))}, not {step}")
        return pd.DataFrame(list(Tail(steps[step or max(steps)]).new())).set_index("index")

    @property
    def result(self) -> dict[str, Any]:
        """What the run wrote at its end; empty before, and where it failed."""
        return self.folder.read("result.json")

    @property
    def summary(self) -> pd.Series[Any]:
        """The result in one row of a table: the loss (of the last step; at the end the mean of the last ten), the
        measures of the end, memory, speed and status.

        `planned_bytes`, beside the peak, is what the plan said of it; None where there is none (yet).
        """
        import pandas as pd

        values: dict[str, Any] = dict.fromkeys(_SUMMARY)
        if records := self._new_metrics():
            values |= {key: records[-1].get(key) for key in ("loss", "tokens_per_second")}
        values |= self.result
        if (peak := self.folder.read("status.json").get("peak_bytes")) is not None:  # where memory ran out
            values["peak_bytes"] = peak
        values["planned_bytes"] = self.folder.read("plan.json").get("peak_bytes")
        values["status"] = self.status
        return pd.Series(values, name=self.id, dtype=object)

    @property
    def plan(self) -> Plan:
        """The forecast that was made beside the run; where there is none yet, it is made now, and kept.

        Raises:
            PlanError: it cannot be planned, for this reason.
        """
        from collie_lab.planning.kept import kept_plan

        return kept_plan(self.folder)

    @property
    def residual(self) -> pd.DataFrame:
        """The plan against what was measured, in bytes, and the error as a share of the measured peak: rows `weights`,
        `gradients`, `optimizer` (what the worst rank holds when its update begins), `rest` (what the peak has beyond
        that) and `total` (the peak).

        Raises:
            PlanError: it cannot be planned.
        """
        from collie_lab.planning.kept import residual

        return residual(self.plan, self.result)

    @property
    def experiment_yaml(self) -> str:
        """The experiment as it was launched; code of the notebook is named, not contained."""
        return (self.folder.path / "experiment.yaml").read_text(encoding="utf-8")

    @property
    def model_path(self) -> Path | None:
        """The folder of the trained model, which `from_pretrained` loads; None before it is written."""
        path = self.folder.path / "model"
        return path if path.is_dir() else None

    @property
    def best_checkpoints(self) -> pd.DataFrame:
        """What `BestCheckpoint` has kept, the best first: `monitor`, `step`, `value`, `path`. Those of a run that was
        resumed count too."""
        import pandas as pd

        rows = [{"monitor": monitor, **entry, "path": self.folder.checkpoints / entry["path"]}
                for monitor, board in best_checkpoints(self.folder.checkpoints).items() for entry in board]
        return pd.DataFrame([row for row in rows if row["path"].is_dir()], columns=["monitor", "step", "value", "path"])

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the best figure, for `launch(resume=...)`; None where there is none (yet)."""
        paths = self.best_checkpoints["path"]
        return paths.iloc[0] if len(paths) else None

    @property
    def system(self) -> pd.DataFrame:
        """What `SystemMeters` has seen, a row a look: `node`, `time`, `cpu` (percent of all cores), `memory` (bytes),
        `disk_read`, `disk_write`, `network_sent`, `network_received` (bytes per second), `gpu_N` (percent)."""
        import pandas as pd

        files = sorted(self.folder.path.glob("system-*.jsonl"))
        rows = sorted((row for path in files for row in Tail(path).new()), key=lambda row: row["time"])
        return pd.DataFrame(rows, columns=["node", "time", *dict.fromkeys(
            key for row in rows for key in row if key not in ("node", "time"))])

    @property
    def profile(self) -> pd.DataFrame:
        """What `Profile` has recorded on rank 0, a row an operator, the longest first: `operator`, `calls`, and the
        seconds in it alone, on the `host` and the `device` (0 on CPUs). Each `kernel` of a GPU has a row of its own,
        and its seconds are its operator's too. Traces lie in `profile` in the run folder."""
        import pandas as pd

        rows = Tail(self.folder.path / "profile" / "operators.jsonl").new()
        frame = pd.DataFrame(rows, columns=["operator", "kernel", "calls", "host", "device"])
        frame["kernel"] = frame["kernel"].eq(True)  # older folders do not tell
        return frame.sort_values(["device", "host"], ascending=False, ignore_index=True)

    def logs(self, rank: int = 0, stream: Literal["out", "err", "both"] = "out", tail: int | None = None) -> str:
        """What a rank has printed; `tail` gives the last lines only.

        Raises:
            ValueError: there is no such rank or stream.
        """
        if rank not in range(size := int(self.folder.read("launch.json").get("world_size", rank + 1))):
            raise ValueError(f"{self.id} has no rank {rank}; there are: 0 to {size - 1}")
        if stream not in ("out", "err", "both"):
            raise ValueError(f"no stream is called {stream!r}; there are: out, err, both")
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
        if self.alive or self.status == "lost":  # on another machine it may but seem so
            self.folder.stop_flag.touch()

    def kill(self) -> None:
        """End all processes of the run now; returns when they are gone.

        Raises:
            RuntimeError: they are on another machine.
        """
        if not self.alive:
            return
        pid = self._supervisor("kill")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            self.wait(timeout=15.0)
            return
        # The supervisor itself is stuck. With its end the system ends all below it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def ask(self, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.0, timeout: float | None = None,
            on_text: Callable[[str], object] | None = None) -> Answer:
        """Have the model, as it is now, answer between two steps; training then goes on as if nothing had been.

        The prompt is put as the training data put theirs: in the template of their format, or of the model's chat.
        `on_text` gets the answer piece by piece; by default it is printed. With a `temperature` it is drawn, else it is
        the likeliest word by word.

        Raises:
            RuntimeError: the run has ended, or the model could not answer.
            TimeoutError: no answer within `timeout` seconds; the question stands.
        """
        if max_new_tokens < 1 or temperature < 0:
            raise ValueError("max_new_tokens is at least 1, and no temperature below 0")
        show = on_text or functools.partial(print, end="", flush=True)
        asks, end = Asks(self.folder), None if timeout is None else time.monotonic() + timeout
        answer = Tail(asks.answer(asks.put({
            "prompt": prompt, "max_new_tokens": max_new_tokens, "temperature": temperature})))
        text = ""
        while True:
            alive = self.alive  # first: what was written before the end is then read
            for record in answer.new():
                if record.get("end"):
                    if on_text is None:
                        print()
                    if record["error"]:
                        raise RuntimeError(f"{self.id} could not answer: {record['error']}")
                    return Answer.of(text, record["step"])
                text += record["text"]
                show(record["text"])
            if not alive:
                raise RuntimeError(f"{self.id} has ended ({self.status}) without an answer"
                                   + (f"; its model is in {self.model_path}" if self.model_path else ""))
            if end is not None and time.monotonic() > end:
                raise TimeoutError(f"{self.id}: no answer after {timeout:g} s")
            time.sleep(0.02)

    def chat(self, *, max_new_tokens: int = 128, temperature: float = 0.0) -> None:
        """Show a field in the notebook in which one talks with the model while it trains: `ask`, again and again."""
        from collie_lab.view.chat import chat

        chat(self, max_new_tokens=max_new_tokens, temperature=temperature)

    def stacks(self) -> dict[int, str]:
        """What every rank is doing: the Python stacks of all its threads, innermost frame first.

        Of a run that was ended because it took too long or stalled, what its ranks were doing then.

        Raises:
            RuntimeError: it is under way on another machine.
        """
        if not self.alive:
            return _stacks.kept(self.folder)
        supervisor, plan = self._supervisor("stacks"), self.folder.read("launch.json")
        pids = _processes.ranks(supervisor)
        if not plan["nodes"]:
            return _stacks.take(self.folder, pids.values(), pids)
        return _stacks.take(self.folder, pids.values(), range(plan["world_size"]),
                            lambda: os.kill(supervisor, signal.SIGUSR2))  # which tells the other nodes

    def _supervisor(self, verb: str) -> int:
        """The pid of its supervisor, for signals of this machine."""
        if (own := socket.gethostname()) != self.host:
            raise RuntimeError(f"{self.id} runs on {self.host}, whose processes are out of reach of this machine "
                               f"({own}): call run.{verb}() there; run.stop() stops it from here")
        return int(self.folder.read("status.json")["pid"])

    def _new_metrics(self) -> list[dict[str, Any]]:
        for record in self._metrics_tail.new():
            while self._metrics and self._metrics[-1]["step"] >= record["step"]:
                self._metrics.pop()  # a run that was begun again repeats what it has lost
            self._metrics.append(record)
        return self._metrics


def runs(folder: str | Path = "runs") -> list[Run]:
    """The runs in a folder, oldest first."""
    created = {path.parent: path.stat().st_mtime for path in Path(folder).expanduser().glob("*/launch.json")}
    return [Run(path) for path in sorted(created, key=lambda path: (created[path], path.name))]


def attach(id: str | Path, folder: str | Path = "runs") -> Run:
    """The handle of a run by its id (the folder's name, or an unambiguous part of it) or by its path."""
    for path in (Path(id).expanduser(), Path(folder).expanduser() / id):
        if (path / "launch.json").is_file():
            return Run(path)
    found = [run for run in runs(folder) if str(id) in run.id]
    if len(found) == 1:
        return found[0]
    known = ", ".join(run.id for run in (found or runs(folder))[-5:]) or "none"
    raise ValueError(f"{'several runs' if found else 'no run'} in {str(folder)!r} for {str(id)!r}; there are: {known}")
