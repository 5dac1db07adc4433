"""Layouts that a model, an optimizer or a batch cannot take; part of `collie_lab.check`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from collie_lab.cells import Experiment, LibraryOptimizer, Parallel, Problem, RuleCell
from collie_lab.cells.parallel import check_micro_batches
from collie_lab.data.hub import text_fields

__all__ = ["parallel_problems"]

# Sizes that tensor-parallel ranks share, by the names that configurations of transformers give them.
_SHARED_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "num_local_experts", "num_experts",
                 "n_routed_experts")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


def parallel_problems(experiment: Experiment, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Errors and warnings of the layout, each with its remedy; `config` is the model's."""
    cell = experiment.parallel
    config = text_fields(config)
    if cell.tp > 1:
        yield from _tensor(experiment, config)
    if cell.pp > 1:
        yield from _pipeline(experiment, config)
    yield from _without_effect(cell)


def _tensor(experiment: Experiment, config: Mapping[str, Any]) -> Iterator[Problem]:
    cell, family, optimizer = experiment.parallel, config.get("model_type", ""), experiment.optimizer
    if isinstance(optimizer, LibraryOptimizer) and not optimizer.shardable:
        yield Problem("Parallel", "tp", f"{type(optimizer).__name__} cannot update pieces of matrices: "
                      f"{optimizer.why_whole}", "tp=1, or an optimizer of collie_lab")
    plan = _plan(family, "base_model_tp_plan")
    if plan is None:
        return
    if not plan:
        yield Problem("Parallel", "tp", f"transformers has no tensor-parallel plan for the family {family}",
                      "tp=1; dp and zero work with every model")
        return
    uncut = set(_SHARED_SIZES[:2]) if "colwise" not in plan.values() else set()  # attention is computed whole
    for name in _SHARED_SIZES:
        size = config.get(name)
        if isinstance(size, int) and size % cell.tp and name not in uncut:
            yield Problem("Parallel", "tp", f"{cell.tp} ranks cannot share {name}={size} equally",
                          f"a divisor of {size}")
    if cell.sequence_parallel and "moe_tp_experts" in plan.values():
        yield Problem("Parallel", "sequence_parallel", f"not supported with experts ({family})", "leave it out")


def _pipeline(experiment: Experiment, config: Mapping[str, Any]) -> Iterator[Problem]:
    cell, family, training = experiment.parallel, config.get("model_type", ""), experiment.training
    plan = _plan(family, "base_model_pp_plan")
    if plan is not None and not plan:
        yield Problem("Parallel", "pp", f"transformers has no pipeline plan for the family {family}",
                      "pp=1; dp and zero work with every model")
    stages = cell.pp * cell.virtual_stages
    layers = next((config[name] for name in _LAYERS if isinstance(config.get(name), int)), None)
    if layers is not None and layers < stages:
        yield Problem("Parallel", "pp", f"{stages} pipeline stages, but the model has {layers} layers",
                      f"at most {layers} stages" + (" (this schedule gives each rank two)" if stages > cell.pp else ""))
    if cell.schedule == "zero_bubble" and cell.zero:
        yield Problem("Parallel", "schedule", "zero_bubble computes the gradients of weights apart, where FSDP2 does "
                      "not see them", 'schedule="1f1b" or zero=0')
    optimizer = experiment.optimizer
    if isinstance(optimizer, RuleCell) and optimizer.in_backward and optimizer.accumulate != "hold":
        yield Problem(type(optimizer).__name__, "accumulate", "in a pipeline nothing can be updated before the last "
                      "micro-batch: others still need the weights", 'accumulate="hold" (exact, with the memory of all '
                      "gradients), or in_backward=False")
    if training.batch_size % cell.dp:
        return  # reported with the batches
    share = training.batch_size // cell.dp
    if cell.micro_batches is not None and share % cell.micro_batches:
        yield Problem("Parallel", "micro_batches", f"{cell.micro_batches} does not divide the {share} sequences of a "
                      "data-parallel rank", f"a divisor of {share}")
    elif cell.micro_batches is not None and training.micro_batch_size not in (None, share // cell.micro_batches):
        yield Problem("Parallel", "micro_batches", f"{cell.micro_batches} micro-batches of {share} sequences are not "
                      f"of Training.micro_batch_size={training.micro_batch_size}", "give one of the two")
    elif (count := share // cell.micro_batch_size(training.batch_size, training.micro_batch_size)) < stages:
        yield Problem("Parallel", "micro_batches", f"{count} micro-batches cannot fill {stages} pipeline stages",
                      f"Training(batch_size=...) of at least {stages * cell.dp}, or smaller micro-batches")
    else:
        try:
            check_micro_batches(cell.schedule, cell.pp, count)
        except ValueError as error:
            message, _, remedy = str(error).partition("; ")
            yield Problem("Parallel", "micro_batches", message, remedy)


def _without_effect(cell: Parallel) -> Iterator[Problem]:
    def warning(field: str, message: str, remedy: str = "") -> Problem:
        return Problem("Parallel", field, message, remedy, level="warning")

    if cell.zero and cell.dp == 1 and cell.offload is None:
        yield warning("zero", "nothing to shard on one data-parallel rank", "set `dp` too, or leave it out")
    if cell.sequence_parallel and cell.tp == 1:
        yield warning("sequence_parallel", "without effect on one tensor-parallel rank", "set `tp` too")
    if cell.shard is not None and not cell.zero:
        yield warning("shard", "without effect: nothing is sharded", "zero=3, or leave it out")
    if cell.pp == 1:
        for field in {"schedule", "micro_batches"} & cell.chosen:
            yield warning(field, "without effect outside of a pipeline", "set `pp` too, or leave it out")
    elif cell.zero == 3:
        yield warning("zero", "in a pipeline weights stay gathered between micro-batches, as with zero=2", "zero=2")


def _plan(family: str, name: str) -> dict[str, Any] | None:
    """A family's plan, empty where there is none; None for a family that transformers does not know."""
    from transformers import CONFIG_MAPPING

    if family not in CONFIG_MAPPING:
        return None
    config = CONFIG_MAPPING[family]
    return dict(getattr(config, name, None) or {})
