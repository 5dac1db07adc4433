"""What a run must share with the one it resumes; it stands in the checkpoint's `state.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from collie_lab import check
from collie_lab.cells import Evaluation, Experiment
from collie_lab.folder import read_json

__all__ = ["check_frozen", "identity", "known_figures", "setting", "told_figures"]


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


def setting(experiment: Experiment, device: torch.device) -> dict[str, Any]:
    """What speed and memory depend on, of what a run that goes on may change."""
    training = experiment.training
    return {"parallel": experiment.parallel.to_dict(), "micro_batch_size": training.micro_batch_size,
            "recompute": training.recompute, "precision": training.precision,
            "weights": training.weights,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            **({"compile": True} if training.compile else {})}  # checkpoints from before there was such a thing count


Figures = Mapping[int, Mapping[str, float]]
"""What evaluations have found, by their place in the experiment."""


def told_figures(experiment: Experiment, figures: Figures) -> list[tuple[str, Mapping[str, float]]]:
    """Figures beside what was asked for them, as JSON can hold it."""
    return [(_asked(experiment.evaluate[place]), found) for place, found in figures.items()]


def known_figures(experiment: Experiment, told: list[tuple[str, dict[str, float]]]) -> dict[int, dict[str, float]]:
    """Those that an experiment asks for too, which may have other evaluations than the one that told them."""
    known = dict(told)
    return {place: known[asked] for place, cell in enumerate(experiment.evaluate) if (asked := _asked(cell)) in known}


def _asked(cell: Evaluation) -> str:
    """A hash of an evaluation, and of the code of the functions in it: the same in every process."""
    fields = cell.to_dict(lambda _, value: _code(value) if callable(value) else repr(value))
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode(errors="backslashreplace")).hexdigest()


def _code(value: Any) -> str:
    """What a function does, with the numbers and texts that it captures, or the methods of a class or an object; not
    where it stands."""
    place = value if hasattr(value, "__code__") or isinstance(value, type) else type(value)
    functions = [place] if hasattr(place, "__code__") else vars(place).values()
    held = [repr(cell.cell_contents) for cell in getattr(value, "__closure__", None) or ()
            if isinstance(cell.cell_contents, (int, float, str))]
    codes = [_bytes(each.__code__) for each in functions if hasattr(each, "__code__")]
    return " ".join([place.__qualname__, *held, *codes])


def _bytes(code: CodeType) -> str:
    constants = [_bytes(each) if isinstance(each, CodeType) else
                 str(sorted(map(repr, each))) if isinstance(each, frozenset) else repr(each) for each in code.co_consts]
    return repr((code.co_code, code.co_names, constants))
