"""Adapters that a layout cannot take; part of `collie_lab.check`, which imports neither torch nor peft."""

from __future__ import annotations

from collections.abc import Iterator

from collie_lab.cells import IA3, Experiment, Freeze, LoRA, Problem

__all__ = ["adapter_problems"]

_HEADS = ("lm_head", "embed_out", "output_layer")


def adapter_problems(experiment: Experiment) -> Iterator[Problem]:
    """Errors of the adapter, each with its remedy."""
    cell, name = experiment.adapter, type(experiment.adapter).__name__
    if cell is None or isinstance(cell, Freeze):
        return
    targets: tuple[str, ...] = getattr(cell, "targets", None) or ()
    if heads := [target for target in targets if target in _HEADS]:
        yield Problem(name, "targets", f"{heads[0]} is the output head, which the loss uses without an adapter",
                      "leave it out")
    if isinstance(cell, IA3):
        yield from _feedforward(cell)
    if experiment.parallel.tp > 1 and not (isinstance(cell, LoRA) and not cell.dora):
        yield Problem("Parallel", "tp", f"{'DoRA' if isinstance(cell, LoRA) else name} needs whole matrices: tensor "
                      "parallelism cuts LoRA along, and no other adapter", "tp=1; dp, zero and pp work with all")


def _feedforward(cell: IA3) -> Iterator[Problem]:
    if cell.targets is None and cell.feedforward:
        yield Problem("IA3", "feedforward", "without effect: the family's defaults name both", "give targets too",
                      level="warning")
    elif unknown := [name for name in cell.feedforward if name not in (cell.targets or ())]:
        yield Problem("IA3", "feedforward", f"{unknown[0]} is none of targets", "name it there too")
