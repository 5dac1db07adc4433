"""A run from plain Python: in a terminal a line moves and Ctrl-C stops after the step; in a pipe there are lines."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
import toy

import collie_lab

SCRIPT = """
import sys, time
import toy

fails = "fail" in sys.argv

def callback(trainer):
    time.sleep(0.05)
    if trainer.step == 4 and trainer.rank == 1 and fails:
        while not (trainer.folder.path / "metrics.jsonl").exists():  # the other rank may start later
            time.sleep(0.01)
        time.sleep(0.5)
        raise ValueError("in step 4")
    if trainer.step == 1:
        print("not shown")

if __name__ == "__main__":
    run = toy.start(sys.argv[1], "runs", callback, steps=int(sys.argv[2]), show=True, wait=True)
    print("status", run.status, "steps", run.result["steps"])
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(
        [str(Path(__file__).parent), str(Path(collie_lab.__file__).parent.parent)]))
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_control_c_stops_after_the_step(script: str, tmp_path: Path, mark: str) -> None:
    terminal = pexpect.spawn(sys.executable, [script, mark, "100000"], cwd=str(tmp_path), encoding="utf-8", timeout=90,
                             dimensions=(40, 140), env={**os.environ, "TERM": "xterm"},
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # as a shell does
    terminal.expect(r"run toy-\S+ in ")
    terminal.expect(r"step \d+/100,000")
    terminal.expect(r"step [1-9]\d/100,000")  # the same line, later
    assert "not shown" not in terminal.before
    terminal.sendintr()
    terminal.expect(r"stopped: step \d+/100,000 in .*perplexity 2\.500")
    terminal.expect(r"status stopped steps \d+")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    toy.assert_gone(mark, seconds=1.0)


def test_lines_in_a_pipe_and_a_failure(script: str, tmp_path: Path, mark: str) -> None:
    output = subprocess.run([sys.executable, script, mark, "50", "fail"], cwd=tmp_path, capture_output=True, text=True,
                            timeout=120)
    lines = output.stdout.splitlines()
    assert lines[0].startswith("run toy-")
    assert re.search(r"^  step +\d+/50 .*loss .* tok/s", output.stdout, re.MULTILINE)
    assert "error: step" in output.stdout
    assert "rank 1: ValueError: in step 4" in output.stdout
    assert 'raise ValueError("in step 4")' in output.stderr  # the exception itself, as Python shows it
    assert output.stderr.rstrip().splitlines()[-1].startswith("logs: runs/")
    assert output.returncode == 1
    assert "\x1b" not in output.stdout
    toy.assert_gone(mark, seconds=1.0)
