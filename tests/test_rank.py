"""What a rank tells of a failure, and how it ends."""

from __future__ import annotations

import subprocess
import sys

from collie_lab.rank import account


class _SpeechlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_an_exception_without_a_text_is_told() -> None:
    told = account(_SpeechlessError(), __file__)
    assert told["type"] == "_SpeechlessError"
    assert told["message"] == "(its text cannot be told: RuntimeError in _SpeechlessError.__str__)"
    assert "_SpeechlessError" in told["traceback"]


def test_a_long_text_is_shortened() -> None:
    told = account(ValueError("a" * 1_000_000 + "z"), __file__)
    assert told["message"].startswith("aaa")
    assert told["message"].endswith("aaz")
    assert "[... 998,001 characters ...]" in told["message"]
    assert len(told["traceback"]) < 21_000


def test_a_thread_that_goes_on_does_not_keep_a_finished_rank() -> None:
    source = """
import threading, time
from collie_lab import rank
rank._PATIENCE = 0.2
threading.Thread(target=time.sleep, args=(600,), name="the sleeper").start()
threading.Thread(target=lambda: print("done"), name="the quick").start()
rank.leave()
"""
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "done\n"
    assert "threads go on: the sleeper. They are left" in ended.stderr
