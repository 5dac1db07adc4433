"""What a run must share with the one it resumes; it stands in the checkpoint's `state.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from collie_lab import check
from collie_lab.cells import Experiment
from collie_lab.folder import read_json

__all__ = ["check_frozen", "identity"]


def identity(experiment: Experiment, data: str, counts: Mapping[str, int], device: torch.device) -> dict[str, Any]:
    """What `check_resume` compares, of data with that fingerprint; and what drew frozen random weights."""
    return {**check.identity(experiment, data), "drawn_on": _drawn_on(experiment, counts, device)}


def _drawn_on(experiment: Experiment, counts: Mapping[str, int], device: torch.device) -> str | None:
    """What drew frozen random weights, which no checkpoint keeps; another GPU draws others."""
    if experiment.model.init != "random" or counts["trainable"] == counts["parameters"]:
        return None
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def check_frozen(checkpoint: Path, drawn_here: str | None) -> None:
    """Raise ValueError where the frozen weights of a checkpoint were drawn by another device."""
    drawn_on = read_json(checkpoint / "state.json").get("identity", {}).get("drawn_on")
    if drawn_on is not None and drawn_on != drawn_here:
        raise ValueError(f"the frozen random weights of {checkpoint} were drawn by another device ({drawn_on}), "
                         f"and are others here ({drawn_here}): resume there, or begin with saved weights")
