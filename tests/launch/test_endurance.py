"""Ten launches in a row, five of them interrupted at random moments: nothing is left of any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy

import collie_lab
from collie_lab.launch import runs

#: Launches as a kernel's main thread makes them. SIGALRM stands for Jupyter's SIGINT, which raises the same exception.
SCRIPT = """
import json, random, signal, sys, time
import psutil
import toy

def interrupt(*_):
    raise KeyboardInterrupt

def callback(trainer):
    trainer.barrier()
    time.sleep(0.05)

signal.signal(signal.SIGALRM, interrupt)
moments, told, own = random.Random(5), [], psutil.Process()
for number in range(10):
    if number % 2:  # two at the very beginning, three on the way
        signal.setitimer(signal.ITIMER_REAL, (0.1 if number < 4 else 6.0) * moments.random())
    try:
        steps = 100_000 if number % 2 else 20
        told.append(toy.start(sys.argv[1], "runs", callback, steps=steps, wait=True).status)
    except KeyboardInterrupt:
        told.append("interrupted")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if number == 0:
        files = own.num_fds()
print(json.dumps({"told": told, "files": own.num_fds() - files, "sockets": len(own.net_connections()),
                  "children": len(own.children())}))
"""


@pytest.mark.signals
def test_ten_launches_leave_nothing(tmp_path: Path, mark: str) -> None:
    temporary, semaphores = tmp_path / "temporary", set(os.listdir("/dev/shm"))
    temporary.mkdir()
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(collie_lab.__file__).parent.parent)])
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT, mark], cwd=tmp_path, capture_output=True, text=True, timeout=280,
        env={**os.environ, "PYTHONPATH": paths, "TMPDIR": str(temporary), toy.MARK: mark})
    assert output.returncode == 0, output.stderr
    found = json.loads(output.stdout.splitlines()[-1])
    assert found["told"][::2] == ["ok"] * 5
    assert set(found["told"][1::2]) <= {"stopped", "interrupted"}
    # No process, and so no port: what the launching process itself holds is counted.
    assert (found["files"], found["sockets"], found["children"]) == (0, 0, 0)
    toy.assert_gone(mark, seconds=1.0)
    assert set(os.listdir("/dev/shm")) <= semaphores
    assert list(temporary.iterdir()) == []
    # What was interrupted before its start has left no folder; all others say how they ended.
    assert {run.status for run in runs(tmp_path / "runs")} <= {"ok", "stopped"}
    assert len(list((tmp_path / "runs").iterdir())) == len(runs(tmp_path / "runs"))
