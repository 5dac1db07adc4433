"""The run folder: the contract between the processes of a run and everyone who reads it.

    runs/<name>-<id>/  experiment.yaml  launch.json  status.json  metrics.jsonl  events.jsonl  result.json
                       env.json  plan.json  logs/rank-N.{out,err}  logs/launcher.log  errors/rank-N.json
                       errors/stacks-N.json  beats/rank-N.json  checkpoints/  evaluations/<name>-step-N.jsonl
                       data/  tokenizer/  code.pkl (what no YAML holds)  asks/  profile/  model/  stop
                       attempts/N/ (of a run that was begun again)  nodes/N.json (with several machines)
                       system-N.jsonl  metrics.csv  tensorboard/ (of callbacks)

`status.json`, `errors/stacks-N.json`, `attempts/` and `nodes/` belong to the parents (the supervisors), `plan.json` to
the kernel, everything else to the ranks. A JSON file is written whole or not at all; those in `beats/` and `nodes/`
change all the time and are rewritten in place: who reads one half written reads again. A JSONL file grows by whole
lines, so a reader may follow it while it is written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

__all__ = [
    "BEST", "STATUSES", "Board", "JsonLines", "RunFolder", "Tail", "best_checkpoints", "checkpoints_in",
    "evaluations_after", "read_json", "write_json", "write_lines",
]

#: Every state of a run. `lost`: its supervisor died without a word.
STATUSES: Final = (
    "running", "ok", "stopped", "cuda_oom", "host_oom", "diverged", "timeout", "error", "lost",
)

#: The file in `checkpoints/` that names those with the best figures.
BEST: Final = "best.json"
_SPARE: Final = ".spare"
_SPARE_BYTES: Final = 2**16
#: The best checkpoints by one figure, the best first: each a `step`, its `value`, and its `path` beside the file
#: (absolute where it is one of the run that was resumed).
Board = list[dict[str, Any]]


class RunFolder:
    """Paths of one run, and how its files are read and written."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().resolve()

    @classmethod
    def create(cls, parent: str | Path, name: str) -> RunFolder:
        """A new folder `<parent>/<name>-<id>`; the id is the time and a few random letters."""
        parent = Path(parent).expanduser()
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            stamp = time.strftime("%m%d-%H%M%S")
            path = parent / f"{name}-{stamp}-{os.urandom(2).hex()}"
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
        folder = cls(path)
        for sub in (folder.logs, folder.errors, folder.beats, folder.checkpoints):
            sub.mkdir()
        return folder

    @property
    def id(self) -> str:
        """The folder's name, by which a run is known."""
        return self.path.name

    @property
    def logs(self) -> Path:
        """Standard output and error of every rank, and the launcher's own words."""
        return self.path / "logs"

    @property
    def errors(self) -> Path:
        """One record for each rank that failed."""
        return self.path / "errors"

    @property
    def beats(self) -> Path:
        """One small file for each rank, its sign of life: see `collie_lab.beat`."""
        return self.path / "beats"

    @property
    def checkpoints(self) -> Path:
        """One folder for each kept checkpoint: `step-000100`."""
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        """The raw answers: a file for each evaluation and step, `exact_match-step-000100.jsonl`, a line a sample."""
        return self.path / "evaluations"

    @property
    def stop_flag(self) -> Path:
        """Its existence asks the ranks to stop after the step they are in."""
        return self.path / "stop"

    def beat(self, rank: int) -> Path:
        """The sign of life of one rank."""
        return self.beats / f"rank-{rank}.json"

    def node(self, number: int) -> Path:
        """The beacon of one machine, where there are several: its sign of life and its words to the others."""
        return self.path / "nodes" / f"{number}.json"

    def launcher_log(self, node: int = 0) -> Path:
        """The words of the supervisor and torchrun on one machine."""
        return self.logs / (f"launcher-{node}.log" if node else "launcher.log")

    def log(self, rank: int, stream: str = "out") -> Path:
        """The log of one rank; `stream` is `out` or `err`."""
        return self.logs / f"rank-{rank}.{stream}"

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; an empty dictionary where there is none yet."""
        return read_json(self.path / name)

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file of the folder, whole or not at all."""
        write_json(self.path / name, value)

    def reserve(self) -> None:
        """Set disk space aside for `insist`."""
        (self.path / _SPARE).write_bytes(bytes(_SPARE_BYTES))

    def insist(self, name: str, value: dict[str, Any]) -> None:
        """As `write`; on a full disk in the space that was set aside: how a run has failed is to be known."""
        try:
            self.write(name, value)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            (self.path / _SPARE).unlink(missing_ok=True)
            self.write(name, value)

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return next(reversed(checkpoints_in(self.checkpoints)), None)


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-[0-9]*"), key=lambda path: int(path.name.removeprefix("step-")))


def best_checkpoints(folder: Path) -> dict[str, Board]:
    """The boards of `best.json` in a folder of checkpoints, by their figure; none where there is no such file."""
    return read_json(folder / BEST)


def evaluations_after(event: dict[str, Any], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations that stand after an event of `events.jsonl`: a start takes back those of later steps than its
    checkpoint's, an evaluation earlier accounts of its measures at its step."""
    if event["kind"] == "start":
        return [old for old in before if old["step"] <= (event.get("step") or 0)]
    if event["kind"] != "evaluation":
        return before
    measures = event.keys() - {"kind", "step", "time"}
    return [*(old for old in before if old["step"] != event["step"] or not old.keys() & measures), event]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file as a dictionary; empty where the file does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except FileNotFoundError:
        return {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON by a temporary file, fsync and rename. Numbers that are not finite become null."""
    _write_whole(path, [json.dumps(finite(value), indent=1, ensure_ascii=False)])


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file likewise, all of it at once."""
    _write_whole(path, (json.dumps(finite(record), ensure_ascii=False) + "\n" for record in records))


def _write_whole(path: Path, parts: Iterable[str]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        # Half a character that no UTF-8 has becomes `\ud800`, which is JSON's own way to write it.
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def finite(value: Any) -> Any:
    """The same value with NaN and infinities as None: JSON knows neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


class JsonLines:
    """Appends records to a JSONL file, one `write` a line, so that a crash loses at most the last.

    The file has one writer at a time. What an earlier one has left of a line, on a full disk, is dropped.
    """

    def __init__(self, path: Path):
        self._file = path.open("a+b", buffering=0)
        if self._file.tell() and not self._ends_with_newline():
            self._file.seek(0)
            self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record as one line."""
        line = (json.dumps(finite(record), ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        while line:  # a disk that is nearly full takes a part, and fails at the rest
            line = line[self._file.write(line):]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _ends_with_newline(self) -> bool:
        self._file.seek(-1, os.SEEK_END)
        return self._file.read() == b"\n"


class Tail:
    """Follows a JSONL file: each call of `new` yields the records written since the last."""

    def __init__(self, path: Path):
        self._path = path
        self._offset = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Records of the complete lines that have come since; nothing where the file does not exist yet."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            yield json.loads(line)
