"""Peak memory on a CPU: every byte of every thread, as torch's own profiler counts them where it can."""

from __future__ import annotations

import functools
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from collie_lab import AdaLomo, AdamW, Experiment, Lomo, LoRA, Model, Perplexity, Skills, Sophia, Training
from collie_lab.training import memory
from collie_lab.training.memory import CpuMemory, NoMemory, build_memory, uncounted
from tests.ranks import run_here


def test_bytes_are_those_of_the_tensors_whoever_frees_them() -> None:
    before = torch.zeros(1000)
    meter = CpuMemory()
    kept = [torch.zeros(100, 100)]
    with meter.step():
        thread = threading.Thread(target=lambda: (kept.append(torch.zeros(10_000, dtype=torch.int64)), kept.pop(0)))
        thread.start()
        thread.join()
    assert meter.peak_bytes == 40_000 + 80_000
    with meter.step():
        pass
    assert meter.step_bytes == 80_000  # what the other thread has freed is free
    with uncounted():
        host = torch.zeros(500)
    with meter.step():
        del host
    assert (meter.step_bytes, meter.peak_bytes) == (80_000, 120_000)
    assert before.numel() == 1000


def test_a_steps_peak_is_that_of_the_profiler() -> None:
    """In one thread, where the profiler misses nothing."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)), torch.nn.GELU())
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.ones(32, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    meter = CpuMemory()
    with meter.step():
        step()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert meter.peak_bytes == peak > 90_000


@pytest.mark.parametrize("cells", [
    {"optimizer": AdamW(lr=1e-3)}, {"optimizer": Sophia(lr=1e-3, hessian_every=1)}, {"optimizer": AdaLomo(lr=1e-3)},
    {"optimizer": Lomo(lr=1e-3), "training": Training(steps=2, batch_size=2, clip_grad_norm=1.0, recompute="full")},
    {"adapter": LoRA(r=2)},
], ids=["adamw", "sophia", "adalomo", "lomo", "lora"])
def test_a_run_leaves_nothing_in_memory(cells: dict[str, Any], tmp_path: Path) -> None:
    """As a pool needs, whose runs follow each other in one process."""
    base = Experiment(model=Model("llama-1m", init="random"), data=Skills(size=20, test_size=2),
                      optimizer=AdamW(lr=1e-3), training=Training(steps=2, batch_size=2), evaluate=[Perplexity()])
    meter = CpuMemory()
    left = []
    for round_ in ("first", "second"):  # the first fills caches
        run_here(base.replace(**cells), tmp_path / round_)
        gc.collect()
        with meter.step():
            pass
        left.append(meter.step_bytes)
    assert left[1] == left[0]


@functools.cache
def _refused() -> None:
    raise OSError("g++ failed: unknown option -std=c++20")


@pytest.mark.parametrize(("attribute", "value", "words"), [
    ("find_compiler", lambda: None, "that takes a C++ compiler, and none was found"),
    ("_counter", _refused, "g++ failed: unknown option"),
])
def test_without_a_compiler_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, attribute: str,
                                            value: object, words: str) -> None:
    monkeypatch.setattr(memory, attribute, value)
    assert isinstance(build_memory(torch.device("cpu")), NoMemory)
    experiment = Experiment(model=Model("llama-tiny", init="random"), data=Skills(size=20, test_size=4),
                            optimizer=AdamW(), training=Training(steps=2, batch_size=2, checkpoint_every=1))
    run = run_here(experiment, tmp_path / "run")
    assert run.read("result.json")["peak_bytes"] is None
    told = (run.path / "events.jsonl").read_text(encoding="utf-8")
    assert "peak memory is not measured" in told
    assert words in told
