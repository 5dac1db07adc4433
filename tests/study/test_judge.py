"""What became of an arm, from what is left of it."""

from __future__ import annotations

import signal

import pytest

from collie_lab.study._judge import Facts, judge

BUG = {"name": "ValueError", "message": "bad\nmore", "traceback": "Traceback ..."}


@pytest.mark.parametrize(("facts", "status", "reason"), [
    (Facts(run_status="ok"), "ok", ""),
    (Facts(run_status="ok", raised=BUG), "ok", "the notebook failed after the run: ValueError: bad"),
    (Facts(run_status="ok", stopping=True, kernel_code=-signal.SIGKILL), "ok", ""),
    (Facts(run_status="diverged", run_detail="loss is NaN"), "diverged", "loss is NaN"),
    (Facts(run_status="cuda_oom", run_detail="rank 0", raised=BUG), "cuda_oom", "rank 0"),
    (Facts(run_status="error", run_detail="rank 1: ValueError: bad", raised=BUG), "error", "rank 1: ValueError: bad"),
    (Facts(run_status="timeout", run_detail="no end after 9 s", raised=BUG), "timeout", "no end after 9 s"),
    (Facts(run_status="error", over="5 GB of 4 GB", raised=BUG), "host_oom", "5 GB of 4 GB"),
    (Facts(over="5 GB of 4 GB", kernel_code=-signal.SIGKILL), "host_oom", "5 GB of 4 GB"),
    (Facts(timed_out=True, timeout=9.0, kernel_code=-signal.SIGKILL), "timeout",
     "no end after 9 s; the kernel was killed"),
    (Facts(run_status="stopped", run_detail="ended, for the kernel was gone", kernel_code=-signal.SIGKILL), "lost",
     "the kernel was killed (SIGKILL)"),
    (Facts(run_status="stopped", kernel_code=-signal.SIGKILL, oom_kills=1), "host_oom",
     "the system ended the kernel (SIGKILL), out of host memory"),
    (Facts(kernel_code=-signal.SIGTERM, oom_kills=1), "lost", "the kernel was ended (SIGTERM)"),
    (Facts(kernel_code=-signal.SIGSEGV), "error", "the kernel: segmentation fault (SIGSEGV)"),
    (Facts(kernel_code=1), "error", "the kernel: exit code 1"),
    (Facts(stopping=True, kernel_code=-signal.SIGKILL), "stopped", "stopped on request"),
    (Facts(stopping=True, run_status="stopped"), "stopped", "stopped on request"),
    (Facts(run_status="stopped"), "stopped", "stopped by somebody else"),
    (Facts(raised=BUG), "error", "ValueError: bad"),
    (Facts(raised={**BUG, "name": "MemoryError", "message": ""}), "host_oom", "MemoryError"),
    (Facts(), "error", "the notebook ended without a run"),
])
def test_verdicts(facts: Facts, status: str, reason: str) -> None:
    outcome = judge(facts)
    assert (outcome.status, outcome.reason) == (status, reason)
