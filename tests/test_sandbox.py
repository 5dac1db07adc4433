"""Programs that a model wrote: what they can do, and what they cannot."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from collie_lab import sandbox

# A kernel without filters is no failure; a program that gets out of the sandbox is one, and the tests below show it.
if (reason := sandbox.unavailable()) and not reason.startswith("a program"):
    pytest.skip(f"no sandbox here: {reason}", allow_module_level=True)


@pytest.mark.parametrize(("program", "outcome"), [
    ("import math, re, hashlib, typing, collections; assert math.sqrt(4) == 2; print('x' * 10**7)", "passed"),
    ("assert 1 + 1 == 3, 'sum'", "failed: AssertionError: sum"),
    ("def f(:", "failed: SyntaxError"),
    ("while True: pass", "timeout"),
    ("import time; time.sleep(60)", "timeout"),
    ("x = bytearray(4 << 30)", "failed: MemoryError"),
    ("import socket; socket.create_connection(('127.0.0.1', 9))", "failed: PermissionError"),
    ("import os; os.fork()", "failed: PermissionError"),
    ("import subprocess; subprocess.run(['true'])", "failed: PermissionError"),
    ("import threading; threading.Thread(target=print).start()", "failed: RuntimeError"),
    ("import os; os.kill(os.getppid(), 9)", "failed: PermissionError"),
    ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "failed: "),
    ("import sys; sys.exit(0)", "failed: SystemExit"),
    ("import os; os._exit(0)", "died"),
    ("import os\nwhile True: os.write(1, b'x' * 10**6)", "died"),
    ("input()", "failed: EOFError"),
    ("import os; assert set(os.environ) <= {'LC_CTYPE'}", "passed"),
    ("import ctypes; assert ctypes.CDLL(None).socket(2, 1, 0) >= 0", "failed: AssertionError"),  # not through Python
])
def test_what_a_program_may(program: str, outcome: str) -> None:
    assert sandbox.run(program, seconds=0.3 if outcome == "timeout" else 20.0).startswith(outcome)


def test_files_stay_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("whole")
    for attempt in ("open({file!r}, 'w')", "open({file!r}, 'a')", "open({file!r} + 'b', 'x')", "os.remove({file!r})",
                    "os.rename({file!r}, {file!r} + 'c')", "os.mkdir({file!r} + 'd')", "os.chmod({file!r}, 0)",
                    "os.truncate({file!r}, 0)", "os.symlink('/', {file!r} + 'e')"):
        found = sandbox.run("import os; " + attempt.format(file=str(file)))
        assert found.startswith("failed: PermissionError"), (attempt, found)
    assert sandbox.run(f"assert open({str(file)!r}).read() == 'whole'") == "passed"
    assert os.listdir(tmp_path) == ["a"]


def test_canonical_solutions_pass_and_others_fail(shared: Path) -> None:
    """Every tenth of HumanEval's problems; and none with nothing in its place."""
    with gzip.open(shared / "data/humaneval/HumanEval.jsonl.gz") as file:
        problems = [json.loads(line) for line in file][::10]
    ends = [f"\n{problem['test']}\ncheck({problem['entry_point']})" for problem in problems]
    solved = [problem["prompt"] + problem["canonical_solution"] + end
              for problem, end in zip(problems, ends, strict=True)]
    unsolved = [problem["prompt"] + "    pass\n" + end for problem, end in zip(problems, ends, strict=True)]
    outcomes = sandbox.run_all(solved + unsolved, workers=2)
    assert outcomes == ["passed"] * len(solved) + outcomes[len(solved):]
    assert all(outcome.startswith("failed: ") for outcome in outcomes[len(solved):])
