"""Tensor parallelism: every layer's matrices cut after the plan that transformers ships with the model.

All parameters become DTensors on the ranks that share them, so that optimizers, FSDP2 and checkpoints see the whole
through its pieces; the forward pass computes with plain local tensors and sends the messages of `collectives`. So a
layer needs no model file of ours, and adapters of peft are cut like the matrices that they adapt.

A matrix is cut by *columns* (of its mathematical form: rows of torch's weight, dimension 0), its input whole and its
output in pieces, or by *rows* (dimension 1), its input in pieces and its output summed. Between the last matrix of a
block and the first of the next all ranks hold the same; with `sequence`, each a piece of the tokens, and the messages
are gathers and scattered sums.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from transformers import PreTrainedModel

from collie_lab.parallel.collectives import copy, gather, gather_for_shares, reduce, reduce_scatter, split
from collie_lab.parallel.stages import Blank, TiedCopy

__all__ = ["STYLES", "TensorParallel", "has_experts", "local_piece"]

Role = Literal["column", "column_gather", "row", "row_split", "experts", "shares", "whole", "vocabulary", "outside"]

#: Styles of transformers' plans, and what they mean here. Experts are shared out whole, rather than cut each.
STYLES: dict[str, Role] = {
    "colwise": "column", "colwise_rep": "column_gather", "colwise_gather_output": "column_gather",
    "rowwise": "row", "rowwise_rep": "row_split", "rowwise_split_input": "row_split",
    "moe_tp_experts": "experts", "replicated_with_grad_allreduce": "shares",
    "embedding_rowwise": "vocabulary", "embedding_colwise": "vocabulary",
}
_PARAMETERS_OF_EXPERTS = ("packed_colwise", "packed_rowwise")
_COLUMNS, _ROWS = ("column", "column_gather"), ("row", "row_split")


class TensorParallel:
    """Cuts a model over the ranks of a one-dimensional mesh.

    Attributes:
        spread: the activations between blocks are pieces of the sequence now. Off for generation.
        cuts_vocabulary: embedding and head are in pieces of the vocabulary, if the ranks divide it.
    """

    def __init__(self, mesh: DeviceMesh, sequence: bool):
        self._mesh, self._sequence = mesh, sequence
        self.group, self.size, self.rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
        self.spread = sequence
        self.cuts_vocabulary = False

    def cut(self, model: PreTrainedModel) -> None:
        """Replace the parameters by DTensors and the forwards of their modules, in place.

        The model is on meta, or whole and the same on all ranks; LoRA may be in it already.

        Raises:
            ValueError: the family has no plan, its plan has a style that is not known here, or sizes do not divide.
        """
        prefix = model.base_model_prefix + "."
        plan = {name.removeprefix(prefix): style for name, style in (model.tp_plan or {}).items()}
        roles, regions = self._roles(model, plan)
        _check_heads(model, plan, self.size)
        if self._sequence:
            self._gather_regions(model, regions)
        seen: dict[Tensor, nn.Parameter] = {}
        for name, module in list(model.named_modules()):
            if not any(parameter is not None for parameter in module._parameters.values()):
                continue
            role = roles.get(module, "whole")
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    if parameter not in seen:  # tied weights stay one
                        seen[parameter] = self._distribute(f"{name}.{key}", parameter, role, key)
                    module._parameters[key] = seen[parameter]
            self._wrap(module, role)
        self._separate_random(model, roles)

    # --- the plan -----------------------------------------------------------------------------------

    def _roles(self, model: PreTrainedModel, plan: dict[str, str]) -> tuple[dict[nn.Module, Role], list[str]]:
        """What becomes of each module that is not simply the same on all ranks; names of modules around columns."""
        if not plan:
            raise ValueError(f"{model.config.model_type}: transformers has no tensor-parallel plan for this family; "
                             "tp=1 (data parallel and zero work)")
        if unknown := sorted(set(plan.values()) - set(STYLES) - set(_PARAMETERS_OF_EXPERTS)):
            raise ValueError(f"{model.config.model_type}: its tensor-parallel plan wants {unknown[0]!r}, which is not "
                             "supported here; tp=1")
        roles: dict[nn.Module, Role] = {}
        regions: dict[str, None] = {}
        prefix = model.base_model_prefix + "."
        for name, module in model.named_modules():
            style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name.removeprefix(prefix)))
            if style is not None and style in STYLES:
                roles |= _with_adapter(module, STYLES[style])
                if STYLES[style] in _COLUMNS and name.startswith(prefix):
                    regions[name.rpartition(".")[0]] = None
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        vocabulary = {module.weight.shape[0] for module in (embedding, head)
                      if getattr(module, "weight", None) is not None}
        self.cuts_vocabulary = all(size % self.size == 0 for size in vocabulary)
        if not regions:
            raise ValueError(f"{model.config.model_type}: its tensor-parallel plan fits none of its modules; tp=1")
        for module in (embedding, head):
            roles[module] = "vocabulary" if self.cuts_vocabulary else "outside"
        if isinstance(embedding, Blank):  # another pipeline stage has it: here it has a shape, and no values
            blank = embedding.forward
            embedding.forward = lambda ids: self._split_tokens(blank(ids))  # type: ignore[method-assign]
        return roles, list(regions)

    def _gather_regions(self, model: PreTrainedModel, regions: list[str]) -> None:
        """Have the modules around cut matrices (attention, MLP) see all tokens."""
        if has_experts(model):
            raise ValueError("sequence_parallel with experts is not supported; leave it out")
        blocks = set(model._no_split_modules or ())
        for name in regions:
            region = model.get_submodule(name)
            if type(region).__name__ in blocks:
                raise ValueError(f"sequence_parallel: {model.config.model_type} cuts {name} without a module "
                                 "around it; leave it out")
            region.forward = self._gathering(region.forward)  # type: ignore[method-assign]

    def _gathering(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self.spread:
                return forward(*args, **kwargs)
            if args:
                return forward(gather_for_shares(args[0], 1, self.group), *args[1:], **kwargs)
            hidden = gather_for_shares(kwargs.pop("hidden_states"), 1, self.group)
            return forward(hidden_states=hidden, **kwargs)

        return run

    # --- parameters ---------------------------------------------------------------------------------

    def _distribute(self, name: str, parameter: nn.Parameter, role: Role, key: str) -> nn.Parameter:
        placement: Placement = Replicate()
        if role in (*_COLUMNS, "experts", "vocabulary"):
            placement = Shard(0)
        elif role in _ROWS and key == "weight":
            placement = Shard(1)
        local = parameter.detach()
        if isinstance(placement, Shard):
            if local.shape[placement.dim] % self.size:
                raise ValueError(f"tp={self.size} does not divide dimension {placement.dim} of {name} "
                                 f"{tuple(local.shape)}; choose a tp that does")
            local = local.chunk(self.size, placement.dim)[self.rank].clone()
        whole = DTensor.from_local(local, self._mesh, [placement], run_check=False, shape=parameter.shape,
                                   stride=parameter.stride())
        return nn.Parameter(whole, requires_grad=parameter.requires_grad)

    @contextlib.contextmanager
    def _local(self, module: nn.Module, role: Role) -> Iterator[None]:
        """The module computes with the local pieces of its parameters.

        Where each rank sees other heads, or other tokens, the gradient of a parameter that all have is a share.
        """
        shares = role == "shares" or (self.spread and role not in ("outside", "vocabulary"))
        whole = dict(module._parameters)
        for name, parameter in whole.items():
            if parameter is not None:
                module._parameters[name] = local_piece(parameter, shares)  # type: ignore[assignment]
        try:
            yield
        finally:
            module._parameters.update(whole)

    # --- forwards -----------------------------------------------------------------------------------

    def _wrap(self, module: nn.Module, role: Role) -> None:
        forward = module.forward
        if isinstance(module, TiedCopy):
            return  # its weight is for the head of this stage
        if role == "vocabulary":
            module.forward = self._embedding(module, forward) if isinstance(module, nn.Embedding) \
                else self._head(module, forward)
        elif role == "experts":
            module.forward = self._experts(module, forward)
        elif role == "outside" and isinstance(module, nn.Embedding):
            module.forward = self._plain(module, forward, role, after=self._split_tokens)  # type: ignore[method-assign]
        elif role in _COLUMNS:
            after = (lambda out: gather(out, -1, self.group)) if role == "column_gather" else None
            module.forward = self._plain(module, forward, role, before=self._whole_input, after=after)
        elif role in _ROWS:
            module.forward = self._row(module, forward, role)
        else:
            module.forward = self._plain(module, forward, role)

    def _plain(self, module: nn.Module, forward: Callable[..., Any], role: Role, *,
               before: Callable[[Tensor], Tensor] | None = None,
               after: Callable[[Tensor], Tensor] | None = None) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                args = (before(args[0]), *args[1:])
            with self._local(module, role):
                out = forward(*args, **kwargs)
            return out if after is None else after(out)

        return run

    def _whole_input(self, hidden: Tensor) -> Tensor:
        """What a matrix in columns reads. In gathered regions the gather sums up the gradient."""
        return hidden if self.spread else copy(hidden, self.group)

    def _split_tokens(self, hidden: Tensor) -> Tensor:
        return split(hidden, 1, self.group) if self.spread else hidden

    def _summed(self, share: Tensor) -> Tensor:
        """The sum over the ranks; of this rank's tokens, where they are spread."""
        return reduce_scatter(share, 1, self.group) if self.spread else reduce(share, self.group)

    def _row(self, module: nn.Module, forward: Callable[..., Any], role: Role) -> Callable[..., Any]:
        def run(hidden: Tensor) -> Tensor:
            if role == "row_split":
                hidden = split(hidden, -1, self.group)
            with self._local(module, role):
                bias = module._parameters.get("bias")
                if bias is not None:  # once, not once a rank
                    module._parameters["bias"] = None
                out = self._summed(forward(hidden))
            return out if bias is None else out + bias

        return run

    def _embedding(self, module: nn.Embedding, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Each rank looks up what it has; the others have zeros there."""
        padding, module.padding_idx = module.padding_idx, None  # it would have to be a local row

        def run(ids: Tensor) -> Tensor:
            with self._local(module, "vocabulary"):
                rows = module.weight.shape[0]
                places = ids - self.rank * rows
                absent = (places < 0) | (places >= rows)
                found = forward(places.masked_fill(absent, 0)).masked_fill(absent[..., None], 0)
            if padding is not None:  # its row is not trained
                found = torch.where((ids == padding)[..., None], found.detach(), found)
            return self._summed(found)

        return run

    def _head(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Whole logits, for generation; the loss makes its own (`training.loss`)."""
        def run(hidden: Tensor) -> Tensor:
            with self._local(module, "vocabulary"):
                return gather(forward(copy(hidden, self.group)), -1, self.group)

        return run

    def _experts(self, module: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Each rank runs its experts; those of others get a number past the last, by which transformers skips them."""
        module.num_experts = own = module.num_experts // self.size
        module._is_expert_parallel = True  # has its kernels expect such numbers

        def run(hidden: Tensor, index: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            here = index - self.rank * own
            foreign = (here < 0) | (here >= own)
            weights = copy(weights, self.group).masked_fill(foreign, 0)
            with self._local(module, "experts"):
                out = forward(copy(hidden, self.group), here.masked_fill(foreign, own), weights, *args, **kwargs)
            return reduce(out, self.group)

        return run

    # --- for the loss, and around it ----------------------------------------------------------------

    def whole_tokens(self, hidden: Tensor) -> Tensor:
        """The hidden states [B, T, C] of all tokens, as the head reads them."""
        if self.spread:
            return (gather_for_shares if self.cuts_vocabulary else gather)(hidden, 1, self.group)
        return copy(hidden, self.group) if self.cuts_vocabulary else hidden

    @contextlib.contextmanager
    def unspread(self) -> Iterator[None]:
        """All ranks see all tokens: one at a time cannot be shared out."""
        self.spread = False
        try:
            yield
        finally:
            self.spread = self._sequence

    def _separate_random(self, model: PreTrainedModel, roles: dict[nn.Module, Role]) -> None:
        """Dropout on what only this rank has draws numbers of its own; all else is alike on all ranks.

        The attention function of `training.packed` enters `separate_random` of the module that calls it.
        """
        for module in model.modules():
            if hasattr(module, "base_layer") and roles.get(module.base_layer) == "row":  # type: ignore[call-overload]
                for dropout in module.lora_dropout.children():  # type: ignore[union-attr]
                    if isinstance(dropout, nn.Dropout):  # peft puts an identity where nothing is dropped
                        dropout.forward = self._separated(dropout.forward)  # type: ignore[method-assign]
            if "column" in {roles.get(getattr(child, "base_layer", child)) for child in module.children()}:
                module.separate_random = self._random  # type: ignore[assignment]

    def _separated(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._random():
                return forward(*args, **kwargs)

        return run

    @contextlib.contextmanager
    def _random(self) -> Iterator[None]:
        """Numbers of this rank, seeded from the common ones, so that a recomputed forward pass draws the same."""
        seed = int(torch.randint(2**40, ())) * self.size + self.rank
        devices = [torch.cuda.current_device()] if self._mesh.device_type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield


def local_piece(parameter: Tensor, shares: bool = False) -> Tensor:
    """This rank's piece of a DTensor, differentiable; `shares`: gradients of what all ranks have are to be summed."""
    if not isinstance(parameter, DTensor):
        return parameter
    placements = [Partial() if shares and placement.is_replicate() else placement
                  for placement in parameter.placements]
    piece: Tensor = parameter.to_local(grad_placements=placements)
    return piece


def has_experts(model: PreTrainedModel) -> bool:
    """Whether the model's plan shares out experts."""
    return "moe_tp_experts" in (model.tp_plan or {}).values()


def _with_adapter(module: nn.Module, role: Role) -> dict[nn.Module, Role]:
    """The roles of a planned module; of LoRA's parts too, where it has been adapted.

    B follows the columns of what it adapts and A is whole; or A follows its rows, and B is whole.
    """
    if not hasattr(module, "base_layer"):
        return {module: role}
    roles: dict[nn.Module, Role] = {module.base_layer: role}  # type: ignore[dict-item]
    part = module.lora_B if role in _COLUMNS else module.lora_A
    return roles | dict.fromkeys(part.children(), role)  # type: ignore[union-attr]


def _check_heads(model: PreTrainedModel, plan: dict[str, str], size: int) -> None:
    """Heads stay whole: a matrix may well divide where its heads do not."""
    if "colwise" not in plan.values():
        return
    config = model.config.get_text_config()
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, field, None)
        if heads and heads % size:
            raise ValueError(f"tp={size} does not divide {field}={heads}; choose a tp that does")
