"""What must differ between a step on fake tensors and a real one: all of it, and only while a dry run lasts.

Each patch stands for one thing that torch cannot do without values, or does behind the dispatcher's back.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from typing_extensions import override

from collie_lab.cells import Experiment, Model
from collie_lab.optim.engine import Eager, Formula
from collie_lab.optim.native import factored_scratch, split_factored
from collie_lab.optim.rounding import Weight
from collie_lab.optim.rule import Gradient, Scalars, States, Update
from collie_lab.optim.tiles import scratch_sizes
from collie_lab.optim.updates import Updates
from collie_lab.parallel.sharding import blocks
from collie_lab.planning._ledger import Ledger
from collie_lab.planning._roles import Role
from collie_lab.planning._work import Work
from collie_lab.training.probe import Path, find_path
from collie_lab.training.weights import blueprint, materialise

__all__ = ["KNOWN_PATHS", "patched", "probe_once"]


class _DryEngine(Eager):
    """An engine that writes in place and nothing else, as compiled loops and kernels do."""

    def __init__(self, work: Work, device: torch.device, *, on_gpu: bool = False):
        super().__init__(device)
        self._work, self._on_gpu = work, on_gpu
        self.together = on_gpu

    @override
    def elementwise(self, formula: Formula, weight: Weight, gradient: Gradient, operands: States,
                    scalars: Scalars) -> None:
        """No byte is taken."""
        self._work.update(formula, weight, gradient, operands, scalars)

    @override
    def factored(self, matrix: Formula, vector: Formula, updates: Updates, scalars: Scalars) -> list[Update]:
        """Whole matrices and vectors as loops and kernels have them: passes, with little scratch."""
        mine, left = split_factored(updates)
        matrices = [tensor for update in mine if (tensor := update.weight.tensor).ndim == 2]
        scratch = _kernels_scratch(matrices) if self._on_gpu else factored_scratch(matrices)
        for weight, gradient, states, _ in mine:
            is_matrix, number = weight.tensor.ndim == 2, gradient.raw.view(-1)[0]
            self._work.read(weight.tensor, gradient.raw)
            if is_matrix:
                self._work.read(gradient.raw)
            self._work.update(matrix if is_matrix else vector, weight, gradient,
                              {**states, "shrink": number, "size": number}, {})
        del scratch
        return left

    @override
    def moments(self, weight: Weight, gradient: Gradient) -> tuple[Tensor, Tensor, Tensor]:
        """Uninitialised sums."""
        self._work.read(weight.tensor, gradient.raw)
        m, n = weight.tensor.shape
        row, square = weight.tensor.new_empty(2, m, dtype=weight.dtype).unbind()
        return row, weight.tensor.new_empty(n, dtype=weight.dtype), square.sum()

    @override
    def energy(self, gradient: Gradient, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised sum."""
        self._work.read(gradient.raw)
        return torch.empty_like(row, dtype=dtype).sum()


def _kernels_scratch(matrices: Iterable[Tensor]) -> Tensor:
    """What `optim.factored` takes of a GPU's memory at most, where all matrices share a launch; without its tables."""
    shapes = np.array([matrix.shape for matrix in matrices])
    sizes = scratch_sizes(*shapes.reshape(-1, 2).T).values()
    return torch.empty(int(sum(size.sum() for size in sizes)), dtype=torch.float32)


@contextlib.contextmanager
def patched(fake: FakeTensorMode, ledger: Ledger, *, padded: bool) -> Iterator[None]:
    """The context of a dry run, from the building of the model to its last step.

    `padded`: some rows are filled up.

    From where a rank would give the model its weights on, everything is fake and counted: within the context the two
    modes are entered there.
    """
    import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.pipelining import schedules
    from torch.distributed.tensor import _utils
    from transformers import masking_utils

    import collie_lab.optim.optimizer as optimizer
    import collie_lab.parallel.pipeline as pipeline
    import collie_lab.parallel.strategy as strategy
    import collie_lab.training.batch as batch
    import collie_lab.training.loss as loss
    import collie_lab.training.model as model
    import collie_lab.training.packed as packed

    with contextlib.ExitStack() as patches:
        def put(owner: Any, name: str, value: Any) -> None:
            patches.enter_context(mock.patch.object(owner, name, value))

        def fill(root: nn.Module, cell: Model, seed: int, device: torch.device, dtype: torch.dtype, *_: Any) -> None:
            with _each_once(root):
                materialise(root, _fake_storage(fake, ledger, device, dtype))
            patches.enter_context(fake)
            patches.enter_context(ledger)
            for module in (batch, packed):
                put(module, "to_device", _to_device(fake, ledger))
            for parameter in root.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(ledger.mark_gradient)
            for name in {type(module).__module__ for module in root.modules()}:  # which have imported it
                if hasattr(family := sys.modules[name], "create_recurrent_attention_mask"):
                    put(family, "create_recurrent_attention_mask",
                        _knowing_rows(family.create_recurrent_attention_mask, "attention_mask", padded))
            ledger.watch(blocks(root))
            ledger.role = "optimizer"

        put(model, "find_path", _find_path_once(find_path))
        put(model, "fill", fill)
        put(model, "set_first_values", lambda *_: None)
        put(optimizer, "choose_engine", lambda _, device: _DryEngine(ledger.work, device, on_gpu=ledger.on_gpu))
        put(strategy, "DistributedDataParallel", type("_Replicas", (_Replicas,), {"ledger": ledger}))
        put(pipeline._Stage, "forward", _first_batch)
        put(masking_utils, "_ignore_causal_mask_sdpa",
            _knowing_rows(masking_utils._ignore_causal_mask_sdpa, "padding_mask", padded))
        if not ledger.on_gpu:
            put(torch, "get_rng_state", _counted_state(torch.get_rng_state, ledger))
        put(torch.distributed.tensor._utils, "compute_local_shape_and_global_offset",
            _with_values(_utils.compute_local_shape_and_global_offset))
        put(fsdp_param, "alloc_storage", _then_counted(fsdp_param.alloc_storage, ledger))
        put(fsdp_param, "free_storage", _then_counted(fsdp_param.free_storage, ledger))
        for name in ("unshard", "wait_for_unshard", "post_backward"):
            put(FSDPParamGroup, name, _in_role("communication", getattr(FSDPParamGroup, name), ledger))
        put(loss, "linear_loss", _in_role("loss", loss.linear_loss, ledger))
        put(schedules, "_batch_p2p", _holding(schedules._batch_p2p))
        if hasattr(schedules._PipelineSchedule, "_warmup_p2p"):
            put(schedules._PipelineSchedule, "_warmup_p2p", _static)
        yield


#: The way to the loss of models that were tried, by their configurations.
KNOWN_PATHS: Final[dict[str, Path]] = {}


def probe_once(experiment: Experiment) -> None:
    """Find the way to a model's loss, for all dry runs of this configuration at any depth."""
    _find_path_once(find_path)(blueprint(experiment.model), experiment.data.packing)


def _find_path_once(find: Callable[[PreTrainedModel, bool], Path]) -> Callable[[PreTrainedModel, bool], Path]:
    def call(model: PreTrainedModel, packing: bool) -> Path:
        fields = {name: sorted(set(map(str, value))) if isinstance(value, list) else value  # of layers that are alike
                  for name, value in model.config.to_dict().items()}
        fields.pop(model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers"), None)
        key = json.dumps([fields, packing], sort_keys=True, default=str)
        if key not in KNOWN_PATHS:
            KNOWN_PATHS[key] = find(model, packing)
        return KNOWN_PATHS[key]

    return call


@contextlib.contextmanager
def _each_once(root: nn.Module) -> Iterator[None]:
    """Within it a module with several places in the tree, as peft gives the embedding, has the first alone: what is
    fake cannot be made fake again."""
    seen: set[nn.Module] = set()
    again: list[tuple[nn.Module, str, nn.Module]] = []
    for module in list(root.modules()):
        for name, child in module.named_children():
            if child in seen:
                again.append((module, name, child))
                module._modules[name] = None
            seen.add(child)
    try:
        yield
    finally:
        for module, name, child in again:
            module._modules[name] = child


def _fake_storage(fake: FakeTensorMode, ledger: Ledger, device: torch.device, dtype: torch.dtype
                  ) -> Callable[[Tensor], Tensor]:
    """What makes a parameter or buffer fake: of `dtype` where it was on meta; counted as weights."""
    made: dict[int, Tensor] = {}

    def make(tensor: Tensor) -> Tensor:
        if id(tensor) in made:
            return made[id(tensor)]
        kind = dtype if tensor.device.type == "meta" and tensor.is_floating_point() else tensor.dtype
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        with fake, torch.no_grad():
            part = torch.empty_like(local, device=device, dtype=kind)
            whole: Tensor = DTensor(part, tensor._spec, requires_grad=tensor.requires_grad) \
                if isinstance(tensor, DTensor) else part
        ledger.take(part)
        made[id(tensor)] = whole
        return whole

    return make


def _to_device(fake: FakeTensorMode, ledger: Ledger) -> Callable[[NDArray[np.int64], torch.device], Tensor]:
    """What numpy holds takes none of torch's memory on a CPU."""
    def convert(array: NDArray[np.int64], device: torch.device) -> Tensor:
        tensor: Tensor = fake.from_tensor(torch.from_numpy(np.ascontiguousarray(array)))
        ledger.ignore(tensor)
        return tensor

    return convert


class _Replicas(nn.Module):
    """DistributedDataParallel's memory: gradients live in buckets, from the first step to the last."""

    ledger: Ledger  # of a subclass: the loop asks for the class

    def __init__(self, module: nn.Module, **_: Any):
        super().__init__()
        self.module, self._work = module, self.ledger.work
        self._exchanges = True
        self._buckets: dict[torch.dtype, Tensor] = {}
        sizes: dict[torch.dtype, int] = {}
        with self.ledger.as_role("gradients"):
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            for parameter in trained:
                sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
            for dtype, size in sizes.items():
                self._buckets[dtype] = torch.empty(size, dtype=dtype, device=trained[0].device)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._into_bucket)

    def _into_bucket(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if not self._exchanges:  # what piles up does so outside of the buckets
            return
        self._work.average(parameter.grad)
        parameter.grad = self._buckets[parameter.dtype][:parameter.numel()].view_as(parameter)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """As DistributedDataParallel's."""
        self._exchanges = False
        try:
            yield
        finally:
            self._exchanges = True


def _with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """Offsets of shards come from small index tensors, which must hold numbers."""
    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call


def _then_counted(function: Callable[[Tensor], None], ledger: Ledger) -> Callable[[Tensor], None]:
    """FSDP2 empties and refills storages, which no operator tells of."""
    def call(tensor: Tensor) -> None:
        function(tensor)
        with ledger.as_role("communication"):
            ledger.take(tensor)

    return call


def _counted_state(function: Callable[[], Tensor], ledger: Ledger) -> Callable[[], Tensor]:
    """Every layer that will be recomputed keeps the state of the random numbers, a real tensor."""
    def call() -> Tensor:
        with unset_fake_temporarily(), ledger.paused():
            state = function()
        ledger.take(state)
        return state

    return call


def _in_role(role: Role, function: Callable[..., Any], ledger: Ledger) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with ledger.as_role(role):
            return function(*args, **kwargs)

    return call


def _knowing_rows(function: Callable[..., Any], argument: str, padded: bool) -> Callable[..., Any]:
    """Where no row is filled up, transformers leaves out the mask that an argument is; it tells by values."""
    signature = inspect.signature(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        mask = bound.arguments[argument]
        if mask is not None and not padded:
            bound.arguments[argument] = None
        return function(*bound.args, **bound.kwargs)

    return call


class _Message:
    """A send or a receipt that keeps its tensors for as long as somebody keeps it, as those of a real group do."""

    def __init__(self, work: Any, tensors: list[Tensor]):
        self._work, self._tensors = work, tensors

    def wait(self) -> None:
        """As a group's."""
        self._work.wait()


def _holding(batch: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def call(operations: list[Any], desc: str | None = None) -> list[Any]:
        tensors = [operation.tensor for operation in operations]
        return [_Message(work, tensors) for work in batch(operations, desc)]

    return call


def _first_batch(stage: Any, *hidden: Tensor, index: Tensor) -> Tensor:
    """A micro-batch's number is not known; all have one shape."""
    out: Tensor = stage._run(0, hidden[0] if hidden else None)
    return out


def _static(schedule: Any, stages: Any, has_backward: bool, p2p_done: bool) -> None:
    """Stages vote, by numbers, on how they learn shapes; ours give them."""
    from torch.distributed.pipelining._utils import InferenceMode

    for stage in stages:
        stage._inference_mode = InferenceMode.STATIC
