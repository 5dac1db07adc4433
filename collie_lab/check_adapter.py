"""Adapters that a model or a layout cannot take; part of `collie_lab.check`."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

from collie_lab.cells import IA3, Experiment, Freeze, LoRA, Model, Problem

__all__ = ["adapter_problems"]

_HEADS = ("lm_head", "embed_out", "output_layer")


def adapter_problems(experiment: Experiment, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Errors of the adapter, each with its remedy; `config` is the model's."""
    cell, name = experiment.adapter, type(experiment.adapter).__name__
    if cell is None:
        return
    if isinstance(cell, Freeze):
        yield from _patterns(cell, experiment.model)
        return
    targets: tuple[str, ...] = getattr(cell, "targets", None) or ()
    if heads := [target for target in targets if target in _HEADS]:
        yield Problem(name, "targets", f"{heads[0]} is the output head, which the loss uses without an adapter",
                      "leave it out")
    elif targets:
        yield from _targets(name, targets, experiment.model)
    if experiment.parallel.tp > 1 and not (isinstance(cell, LoRA) and not cell.dora):
        yield Problem("Parallel", "tp", f"{'DoRA' if isinstance(cell, LoRA) else name} needs whole matrices: tensor "
                      "parallelism cuts LoRA along, and no other adapter", "tp=1; dp, zero and pp work with all")
    family = config.get("model_type")
    if isinstance(cell, IA3) and cell.targets is None and family is not None:
        yield from _family(str(family))


def _family(family: str) -> Iterator[Problem]:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN

    if family not in KNOWN:
        yield Problem("IA3", "targets", f"peft knows no default for the family {family}",
                      "the names of its key, value and second feed-forward layers, and that last one as feedforward")


def _targets(name: str, targets: tuple[str, ...], model: Model) -> Iterator[Problem]:
    """As peft matches them: the last parts of a module's name."""
    if (whole := _blueprint(model)) is None:
        return
    layers = [path for path, module in whole.named_modules() if type(module).__name__.endswith(("Linear", "Conv1D"))]
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in layers):
            known = dict.fromkeys(path.rpartition(".")[2] for path in layers)
            yield Problem(name, "targets", f"no linear layer of {model.source} is called {target!r}",
                          ", ".join(layer for layer in known if layer not in _HEADS))


def _patterns(cell: Freeze, model: Model) -> Iterator[Problem]:
    if (whole := _blueprint(model)) is None:
        return
    names = [name for name, _ in whole.named_parameters(remove_duplicate=False)]
    for pattern in cell.train:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            yield Problem("Freeze", "train", f"no parameter of {model.source} matches {pattern!r}",
                          f"parameters are called like {names[0]} and {names[len(names) // 2]}")


def _blueprint(model: Model) -> Any:
    """The model without weights; None where it cannot be built, which others report."""
    from collie_lab.training.weights import blueprint

    try:
        return blueprint(model)
    except Exception:
        return None
