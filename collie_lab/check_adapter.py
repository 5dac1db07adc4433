"""Adapters that a layout cannot take; part of `collie_lab.check`, which imports neither torch nor peft."""

from __future__ import annotations

from collections.abc import Iterator

from collie_lab.cells import IA3, Experiment, Freeze, LoRA, Prefix, Problem, Prompt, VirtualTokens

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
    if isinstance(cell, LoRA):
        yield from _lora(cell)
    if isinstance(cell, VirtualTokens):
        yield from _virtual(cell, experiment)
    elif experiment.parallel.tp > 1 and not (isinstance(cell, LoRA) and not cell.dora):
        yield Problem("Parallel", "tp", f"{'DoRA' if isinstance(cell, LoRA) else name} needs whole matrices: tensor "
                      "parallelism cuts LoRA along, and no other adapter", "tp=1; dp, zero and pp work with all")


def _lora(cell: LoRA) -> Iterator[Problem]:
    if cell.dora and cell.init in ("pissa", "olora"):
        yield Problem("LoRA", "init", f"{cell.init} with DoRA could not be exported for the model as it was: the "
                      "magnitudes belong to the changed weights", "dora=False, or another init")


def _virtual(cell: VirtualTokens, experiment: Experiment) -> Iterator[Problem]:
    name, parallel = type(cell).__name__, experiment.parallel
    for axis, size, reason in (
        ("pp", parallel.pp, "virtual tokens enter with the embedding, and the stages after it would have nothing to "
         "train" if not cell.cached else "a prefix is one matrix for all layers, of which no stage has all"),
        ("tp", parallel.tp, "the network and the embeddings of virtual tokens are no part of the model's plan"),
    ):
        if size > 1:
            yield Problem("Parallel", axis, f"{name}: {reason}", f"{axis}=1; dp and zero work with it")
    if isinstance(cell, Prompt) and cell.text is not None and "init" in cell.model_fields_set:
        yield Problem("Prompt", "init", "without effect beside a text", "leave one of them out", level="warning")
    if isinstance(cell, Prefix) and cell.hidden is not None and not cell.projection:
        yield Problem("Prefix", "hidden", "without effect unless projection=True", level="warning")


def _feedforward(cell: IA3) -> Iterator[Problem]:
    if cell.targets is None and cell.feedforward:
        yield Problem("IA3", "feedforward", "without effect: the family's defaults name both", "give targets too",
                      level="warning")
    elif unknown := [name for name in cell.feedforward if name not in (cell.targets or ())]:
        yield Problem("IA3", "feedforward", f"{unknown[0]} is none of targets", "name it there too")
