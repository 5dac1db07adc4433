"""Adapters that a layout cannot take; part of `collie_lab.check`, which imports neither torch nor peft."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from collie_lab.cells import (
    IA3,
    OFT,
    AdaLoRA,
    AddedAdapter,
    Experiment,
    LibraryOptimizer,
    LoRA,
    Model,
    Prefix,
    Problem,
    Prompt,
    PTuning,
    QLoRA,
    VirtualTokens,
)
from collie_lab.data.hub import context_length
from collie_lab.data.prepare import room_for_documents
from collie_lab.data.tensor_names import adapter_tensors, layer_names, names_one_of
from collie_lab.folder import read_json

__all__ = ["adapter_problems"]

_HEADS = ("lm_head", "embed_out", "output_layer")


def adapter_problems(experiment: Experiment, config: dict[str, Any]) -> Iterator[Problem]:
    """Errors and warnings of the adapter on a model with this configuration, each with its remedy."""
    cell, name = experiment.adapter, type(experiment.adapter).__name__
    if not isinstance(cell, AddedAdapter):
        return
    targets: tuple[str, ...] = getattr(cell, "targets", None) or ()
    if heads := [target for target in targets if target in _HEADS]:
        yield Problem(name, "targets", f"{heads[0]} is the output head, which the loss uses without an adapter",
                      "leave it out")
    yield from _unknown(name, [target for target in targets if target not in _HEADS], experiment.model)
    if cell.load is not None:
        yield from _load(cell, cell.load)
    match cell:
        case IA3():
            yield from _feedforward(cell)
        case LoRA():
            yield from _lora(cell)
            if isinstance(cell, QLoRA):
                yield from _quantized(cell, experiment)
                return
        case VirtualTokens():
            yield from _virtual(cell, experiment, context_length(config))
            return
        case AdaLoRA():
            yield from _budget(cell, experiment)
            return
    if experiment.parallel.tp > 1 and not (isinstance(cell, LoRA) and not cell.dora):
        yield Problem("Parallel", "tp", f"{'DoRA' if isinstance(cell, LoRA) else name} needs whole matrices: tensor "
                      "parallelism cuts LoRA along, and no other adapter", "tp=1; dp, zero and pp work with all")


def _unknown(name: str, targets: Sequence[str], model: Model) -> Iterator[Problem]:
    """Targets that name nothing in the model, where its names are known before it is built."""
    layers = layer_names(model) if targets else None
    if layers is None:
        return
    for target in targets:
        if not names_one_of(target, layers):
            there = sorted({layer.rpartition(".")[2] for layer in layers})
            yield Problem(name, "targets", f"{model.source} has no layer {target!r}", "there are: " + ", ".join(there))


def _load(cell: AddedAdapter, source: str) -> Iterator[Problem]:
    """Whether a folder holds an adapter of this kind and size."""
    name, file = type(cell).__name__, Path(source).expanduser() / "adapter_config.json"
    config = read_json(file)
    if not config:
        yield Problem(name, "load", f"{source} is no peft folder: it has no adapter_config.json",
                      "run.model_path of a run with an adapter")
        return
    if isinstance(cell, (PTuning, AdaLoRA)) or (isinstance(cell, Prefix) and cell.projection):
        reason = "the ranks that were found are those of its own steps" if isinstance(cell, AdaLoRA) else \
            "the network that made its tokens served the training alone, and is not in it"
        yield Problem(name, "load", f"an exported {name} cannot be trained on: {reason}", "leave it out")
        return
    if isinstance(cell, LoRA) and cell.init != "default":
        yield Problem(name, "init", "without effect beside load", "leave one of them out")
    for key, (field, mine) in _as_saved(cell).items():
        if config.get(key) != mine:
            yield Problem(name, field or "load", f"{source} holds an adapter with {key}={config.get(key)!r}, which is "
                          f"{mine!r} here", "the same as there")
    targets: tuple[str, ...] = getattr(cell, "targets", None) or ()
    try:
        saved = adapter_tensors(file.parent)
    except OSError as error:
        yield Problem(name, "load", f"{source} holds no values that can be read: {error}",
                      "an adapter_model.safetensors, as run.model_path has it")
        return
    for tensor in saved if targets else ():
        if not any(f".{target}." in tensor for target in targets):
            yield Problem(name, "targets", f"{source} adapts more than these: {tensor}", "the same as there")
            return


def _as_saved(cell: AddedAdapter) -> dict[str, tuple[str, Any]]:
    """Of what peft saves in a configuration: the field of the cell, and its value here."""
    match cell:
        case LoRA():
            return {"peft_type": ("", "LORA"), "r": ("r", cell.r), "lora_alpha": ("alpha", cell.alpha),
                    "use_rslora": ("rslora", cell.rslora), "use_dora": ("dora", cell.dora)}
        case OFT():
            return {"peft_type": ("", "OFT"), "oft_block_size": ("block_size", cell.block_size)}
        case IA3():
            return {"peft_type": ("", "IA3")}
        case Prompt():
            return {"peft_type": ("", "PROMPT_TUNING"), "num_virtual_tokens": ("tokens", cell.tokens)}
        case Prefix():
            return {"peft_type": ("", "PREFIX_TUNING"), "num_virtual_tokens": ("tokens", cell.tokens)}
    return {}


def _budget(cell: AdaLoRA, experiment: Experiment) -> Iterator[Problem]:
    """AdaLoRA judges all layers together, by whole gradients, after the update."""
    parallel, optimizer, steps = experiment.parallel, experiment.optimizer, experiment.training.steps
    if cell.target_r >= cell.init_r:
        yield Problem("AdaLoRA", "target_r", f"{cell.target_r} of {cell.init_r} directions a layer are all of them",
                      "less than init_r; or LoRA")
    if cell.warmup + cell.final >= 1.0:
        yield Problem("AdaLoRA", "final", "warmup and final leave no step in between", "less of either")
    for axis, size in (("tp", parallel.tp), ("pp", parallel.pp), ("zero", parallel.zero + 1)):
        if size > 1:
            yield Problem("Parallel", axis, "AdaLoRA deals out ranks over all layers by whole matrices and gradients, "
                          "which no rank has here", "dp alone")
    if parallel.engine == "deepspeed":
        yield Problem("Parallel", "engine", "AdaLoRA needs the gradients after an update, and DeepSpeed keeps them",
                      'engine="torch"')
    if optimizer.in_backward:
        yield Problem(type(optimizer).__name__, "in_backward", "AdaLoRA judges by gradients, which are gone when "
                      "they are used in the backward pass", f"{type(optimizer).__name__}(in_backward=False)")
    if isinstance(optimizer, LibraryOptimizer):
        yield Problem("Experiment", "optimizer", "AdaLoRA's importances stand beside the states of an optimizer of "
                      "collie_lab", "AdamW, Lion, Adan, Sophia, SGD, ...")
    if steps < 10:
        yield Problem("Training", "steps", f"{steps} steps are too few for AdaLoRA's schedule", "at least 10")


def _lora(cell: LoRA) -> Iterator[Problem]:
    if cell.dora and cell.init in ("pissa", "olora"):
        yield Problem("LoRA", "init", f"{cell.init} with DoRA could not be exported for the model as it was: the "
                      "magnitudes belong to the changed weights", "dora=False, or another init")


def _quantized(cell: QLoRA, experiment: Experiment) -> Iterator[Problem]:
    parallel = experiment.parallel
    if importlib.util.find_spec("bitsandbytes") is None:
        yield Problem("Experiment", "adapter", "QLoRA needs the package bitsandbytes", "pip install bitsandbytes")
    for axis, size in (("tp", parallel.tp), ("zero", parallel.zero + 1)):
        if size > 1:
            yield Problem("Parallel", axis, "a four-bit matrix is one flat piece, which no layout cuts",
                          f"{axis}={'0' if axis == 'zero' else '1'}; dp and pp work with it")
    if parallel.engine == "deepspeed":
        yield Problem("Parallel", "engine", "DeepSpeed does not know four-bit weights", 'engine="torch"')
    if cell.dora or cell.init in ("pissa", "olora"):
        yield Problem("QLoRA", "dora" if cell.dora else "init", "the first values come from weights in full precision, "
                      "which are not kept", "the default, or LoRA")


def _virtual(cell: VirtualTokens, experiment: Experiment, context: int | None) -> Iterator[Problem]:
    name, parallel = type(cell).__name__, experiment.parallel
    room = room_for_documents(experiment, context)
    if room is not None and room < 2:  # a document is a token to learn, after one to learn it from
        yield Problem(name, "tokens", f"{cell.tokens} leave nothing of the model's context of {context} for a document",
                      "fewer")
    for axis, size, reason in (
        ("pp", parallel.pp, "virtual tokens enter with the embedding, and the stages after it would have nothing to "
         "train" if not cell.cached else "a prefix is one matrix for all layers, of which no stage has all"),
        ("tp", parallel.tp, "the network and the embeddings of virtual tokens are no part of the model's plan"),
    ):
        if size > 1:
            yield Problem("Parallel", axis, f"{name}: {reason}", f"{axis}=1; dp and zero work with it")
    optimizer = experiment.optimizer
    if isinstance(optimizer, LibraryOptimizer) and optimizer.for_matrices:
        yield Problem("Experiment", "optimizer", f"{type(optimizer).__name__} is for the matrices of blocks, and "
                      f"{name} trains none", "AdamW")
    if isinstance(cell, Prompt) and cell.text is not None and "init" in cell.chosen:
        yield Problem("Prompt", "init", "without effect beside a text", "leave one of them out", level="warning")
    if isinstance(cell, Prefix) and cell.hidden is not None and not cell.projection:
        yield Problem("Prefix", "hidden", "without effect unless projection=True", level="warning")


def _feedforward(cell: IA3) -> Iterator[Problem]:
    if cell.targets is None and cell.feedforward:
        yield Problem("IA3", "feedforward", "without effect: the family's defaults name both", "give targets too",
                      level="warning")
    elif unknown := [name for name in cell.feedforward if name not in (cell.targets or ())]:
        yield Problem("IA3", "feedforward", f"{unknown[0]} is none of targets", "name it there too")
