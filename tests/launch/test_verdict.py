"""The verdict on a run from what is left of it, and the parts it is made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from collie_lab.launch import _stacks
from collie_lab.launch._agent import Exit, exits, started_closing
from collie_lab.launch._processes import oom_kills
from collie_lab.launch._verdict import Facts, Verdict, judge
from collie_lab.logs import read_log


def record(rank: int, type_: str = "ValueError", time_ns: int = 1, **more: Any) -> dict[str, Any]:
    return {"rank": rank, "type": type_, "message": "words", "time_ns": time_ns, **more}


def beat(step: int, doing: str = "step", **more: Any) -> dict[str, Any]:
    return {"step": step, "doing": doing, "shape": None, "memory": None, "memory_limit": None, **more}


KILLED = Exit(1, -9, 100)


@pytest.mark.parametrize(("facts", "verdict"), [
    (Facts("ended", 0, result={"status": "ok"}), Verdict("ok")),
    (Facts("ended", 0, result={"status": "diverged"}), Verdict("diverged")),
    (Facts("killed", 0, result={"status": "ok"}), Verdict("ok")),  # the end came before the kill
    (Facts("ended", 0), Verdict("error", "the ranks ended without a result")),
    (Facts("ended", 1, [KILLED], oom_kills=1),
     Verdict("host_oom", "rank 1: killed (SIGKILL) by the system, out of host memory", 1)),
    (Facts("ended", 1, [KILLED], oom_kills=1, beats={1: beat(7, shape=[1, 2048], memory=12e9, memory_limit=16e9)}),
     Verdict("host_oom", "rank 1: killed (SIGKILL) by the system, out of host memory in step 7, with a micro-batch of "
                         "1 × 2,048 tokens; it held 12.00 GB of 16.00 GB", 1, 12e9, (1, 2048))),
    (Facts("ended", 1, [KILLED]), Verdict("error", "rank 1: killed (SIGKILL)", 1)),
    (Facts("ended", 1, [Exit(0, 1, 7)], [record(0, "OutOfMemoryError", on_gpu=True, step=3, shape=[4, 512],
                                                memory=79e9, memory_limit=80e9)]),
     Verdict("cuda_oom", "rank 0: out of GPU memory in step 3, with a micro-batch of 4 × 512 tokens; "
                         "it held 79.00 GB of 80.00 GB", 0, 79e9, (4, 512))),
    (Facts("ended", 1, [Exit(0, 1, 7)], [record(0, "MemoryError", on_gpu=False)]),
     Verdict("host_oom", "rank 0: out of host memory", 0)),
    (Facts("stalled", None, suspects=[1], stall_timeout=30.0, beats={0: beat(6), 1: beat(5, "evaluation")}),
     Verdict("timeout", "rank 1 stalled in step 5 (evaluation): no sign of life for 30 s; `run.stacks()` shows where",
             1)),
    (Facts("stalled", None, stall_timeout=30.0, beats={0: beat(6), 1: beat(6)}),
     Verdict("timeout", "no sign of life for 30 s: the ranks wait for each other; `run.stacks()` shows where")),
    # A peer's exception follows from the crash, though only the exception has left a record.
    (Facts("failed", 1, [Exit(0, 1, 99), KILLED], [record(0)]), Verdict("error", "rank 1: killed (SIGKILL)", 1)),
    # NCCL's watchdog aborts the peers of a failed rank; torchrun and the supervisor end them.
    (Facts("failed", 1, [Exit(1, -6, 100), Exit(0, 1, 99)], [record(0)]),
     Verdict("error", "rank 0: ValueError: words", 0)),
    (Facts("failed", 1, [KILLED, Exit(0, 1, 99)], [record(0)], signalled=frozenset({1})),
     Verdict("error", "rank 0: ValueError: words", 0)),
    (Facts("failed", 1, [Exit(0, -15, 99), Exit(1, 1, 100)], [record(1)]),
     Verdict("error", "rank 1: ValueError: words", 1)),
    (Facts("failed", 1, [], [record(0, time_ns=2), record(1, "KeyError", time_ns=1)]),
     Verdict("error", "rank 1: KeyError: words", 1)),
    (Facts("ended", 1), Verdict("error", "the launcher (torchrun) failed; its words are in logs/launcher.log")),
    (Facts("ended", -9), Verdict("error", "the launcher (torchrun) was killed (SIGKILL)")),
])
def test_verdicts(facts: Facts, verdict: Verdict) -> None:
    assert judge(facts) == verdict


@pytest.mark.parametrize(("type_", "message", "verdict"), [
    ("MemoryError", "", Verdict("host_oom", "rank 0: out of host memory in step 3", 0)),
    ("RuntimeError", "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: not enough memory: you tried to "
                     "allocate 8 bytes.", Verdict("host_oom", "rank 0: out of host memory in step 3", 0)),
    ("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
     Verdict("cuda_oom", "rank 0: out of GPU memory in step 3; it held 79.00 GB", 0, 79e9)),
    ("AcceleratorError", "CUDA error: out of memory\nCUDA kernel errors might be reported at another call",
     Verdict("cuda_oom", "rank 0: out of GPU memory in step 3; it held 79.00 GB", 0, 79e9)),
    ("AcceleratorError", "CUDA error: an illegal memory access was encountered",
     Verdict("error", "rank 0: AcceleratorError: CUDA error: an illegal memory access was encountered", 0)),
])
def test_which_memory_a_rank_on_a_gpu_ran_out_of(type_: str, message: str, verdict: Verdict) -> None:
    """What it held is told of that memory alone."""
    told = record(0, type_, message=message, on_gpu=True, step=3, memory=79e9)
    assert judge(Facts("ended", 1, [Exit(0, 1, 7)], [told])) == verdict


REPORT = """
W1123 00:00:00.000000 9 torch/distributed/elastic/multiprocessing/api.py:900] Sending process 99 closing signal SIGTERM
Failures:
[0]:
  time      : 2026-11-23_00:00:00
  host      : here
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 99)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
------------------------------------------------------------
Root Cause (first observed failure):
[1]:
  time      : 2026-11-23_00:00:00
  host      : here
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 100)
"""


WAITS = """Current thread 0x00007f48c5687b80 (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 3007 in all_reduce
  File "/site-packages/torch/distributed/c10d_logger.py", line 81 in wrapper
  File "/home/strategy.py", line 120 in total
  File "<frozen runpy>", line 198 in _run_module_as_main
"""
COMPUTES = """Thread 0x00007f48c0000000 (most recent call first):
  File "/site-packages/torch/distributed/elastic.py", line 1 in run

Current thread 0x00007f48c5687b80 (most recent call first):
  File "/site-packages/torch/nn/functional.py", line 7 in linear
  File "/home/cell.py", line 3 in callback
  File "<frozen runpy>", line 198 in _run_module_as_main
"""


@pytest.mark.parametrize(("beats", "stacks", "found"), [
    ({0: beat(6), 1: beat(6)}, {0: WAITS, 1: COMPUTES}, [1]),
    ({0: beat(6), 1: beat(5)}, {0: WAITS, 1: WAITS}, [1]),
    ({0: beat(6), 1: beat(5), 2: beat(6)}, {0: COMPUTES, 1: COMPUTES, 2: ""}, [1]),  # a rank that does not answer
    ({0: beat(6), 1: beat(6)}, {0: WAITS, 1: WAITS}, []),
    ({0: beat(6, "done"), 1: beat(6)}, {1: WAITS}, [1]),
    ({0: beat(6)}, {0: COMPUTES}, [0]),
], ids=["computes", "behind", "on GPUs", "all wait", "one is done", "alone"])
def test_the_rank_that_the_others_wait_for(beats: dict[int, Any], stacks: dict[int, str], found: list[int]) -> None:
    assert _stacks.suspects(beats, stacks) == found


def test_where_a_rank_is() -> None:
    assert _stacks.innermost(COMPUTES) == "cell.py:3 in callback"
    assert _stacks.innermost(WAITS) == "strategy.py:120 in total"
    assert _stacks.innermost("") == ""


def test_torchruns_report_gives_codes_and_suspect() -> None:
    assert exits(REPORT) == [Exit(1, -9, 100), Exit(0, 1, 99)]
    assert exits("nothing to report") == []
    assert started_closing(REPORT)
    assert not started_closing("W1123 Setting OMP_NUM_THREADS")


def test_kills_for_want_of_memory_are_counted_by_cgroup(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) == 0
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/job\n0::/job\n")
    (tmp_path / "proc/vmstat").write_text("nr_free 1\noom_kill 9\n")
    assert oom_kills(tmp_path) == 9
    for file, count in {"memory/job/memory.oom_control": 3, "job/memory.events": 2}.items():
        path = tmp_path / "sys/fs/cgroup" / file
        path.parent.mkdir(parents=True)
        path.write_text(f"oom 7\noom_kill {count}\n")
        assert oom_kills(tmp_path) == count


def test_logs_read_as_a_terminal_shows_them(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.err"
    assert read_log(log) == ""
    log.write_bytes(b"one\r\n\r 10%\r100%\nthree\n" + b"x" * 200_000 + b"\nlast")
    assert read_log(log).splitlines()[:3] == ["one", "100%", "three"]
    assert read_log(log, tail=1) == "last"
    assert read_log(log, tail=4).splitlines()[0] == "100%"
