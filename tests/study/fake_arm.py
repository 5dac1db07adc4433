"""An arm's program that trains nothing and knows only the contract of the folder: lock, status, progress.

It imports none of the package, so that many can run in a test. `diary` has a line for each thing that it did.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 8


def main(folder: Path) -> int:
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    for _ in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.02)
    else:
        return 75
    before = _read(folder / "status.json")
    if before.get("status") in ("ok", "error"):
        return 0
    state = {"attempts": before.get("attempts", 0) + 1, "seconds": 0.1, "pid": os.getpid()}
    _write(folder / "status.json", {**state, "status": "running"})
    step = _read(folder / "progress.json").get("step", 0)
    _note(folder, f"begin {step}")
    while step < STEPS:
        time.sleep(0.03)
        step += 1
        _note(folder, f"step {step}")
        _write(folder / "progress.json", {"step": step})
    _note(folder, "done")
    fails = json.loads((folder / "arm.json").read_text())["seed"] == 99
    _write(folder / "status.json", {**state, "status": "error" if fails else "ok", "reason": "a bug" if fails else ""})
    return 0


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def _note(folder: Path, words: str) -> None:
    with (folder / "diary").open("a") as file:
        file.write(words + "\n")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
