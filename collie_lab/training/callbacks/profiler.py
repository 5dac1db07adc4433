"""What a few steps do, operator by operator, on host and device: torch's profiler around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from typing_extensions import override

from collie_lab.cells import Callback, Profile
from collie_lab.folder import write_lines

__all__ = ["Profiler"]


class Profiler(Callback):
    """Writes `profile/rank-N.json.gz`, a trace of every rank, and `profile/operators.jsonl` of rank 0."""

    def __init__(self, cell: Profile):
        self._first, self._last = cell.first, cell.first + cell.steps - 1
        self._step = 0  # of this process: a run that goes on is cold again
        self._profile: profile | None = None

    @override
    def before_step(self, trainer: Any) -> None:
        self._step += 1
        if self._step == self._first:
            cuda = [ProfilerActivity.CUDA] if trainer.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profile.start()

    @override
    def after_step(self, trainer: Any) -> None:
        if self._step == self._last:
            self._write(trainer)

    @override
    def on_end(self, trainer: Any, result: Mapping[str, Any]) -> None:
        self._write(trainer)  # of a run that has ended in the midst of it

    @override
    def on_exception(self, trainer: Any, error: BaseException) -> None:
        if self._profile is not None:
            self._profile.stop()

    def _write(self, trainer: Any) -> None:
        if self._profile is None:
            return
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        found, self._profile = self._profile, None
        found.stop()
        folder = trainer.folder.path / "profile"
        folder.mkdir(exist_ok=True)
        found.export_chrome_trace(str(folder / f"rank-{trainer.rank}.json.gz"))
        if trainer.rank == 0:
            write_lines(folder / "operators.jsonl", _rows(found))
            trainer.event("profile", step=trainer.step, path="profile")


def _rows(found: profile) -> list[dict[str, Any]]:
    rows = []
    for each in found.key_averages():
        kernel = each.device_type.name == "CUDA"
        # Names that code gives to parts of itself (`Optimizer.step#AdamW`) cover the kernels in them once more.
        if not (kernel and each.is_user_annotation):
            rows.append({"operator": each.key, "kernel": kernel, "calls": each.count,
                         "host": each.self_cpu_time_total / 1e6, "device": each.self_device_time_total / 1e6})
    return rows
