"""What a step computes, moves and sends: the operations of a dry run, alike ones counted together.

FLOPs of matrix products are those of `torch.utils.flop_counter` (2·m·n·k). Attention is counted by its formula, since
the kernel of CPUs is not known there: 2 products forward and 5 backward (FlashAttention computes the scores again: Dao
et al., arXiv 2205.14135), half of each where it is causal. Bytes are those of the operands read and written once.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from collie_lab.optim.engine import Formula
from collie_lab.optim.rounding import Weight
from collie_lab.optim.rule import Gradient, Scalars, States
from collie_lab.optim.trace import C, trace

__all__ = ["COLLECTIVES", "Operation", "Phase", "Work", "extended"]

Phase = Literal["forward", "loss", "backward", "recompute", "optimizer", "hessian"]

#: Operators that move data between ranks, and what they do.
COLLECTIVES: Final = {
    "allreduce_": "all_reduce", "_allgather_base_": "all_gather", "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather", "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter", "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast", "alltoall_base_": "all_to_all", "alltoall_": "all_to_all", "send": "send",
    "all_reduce": "all_reduce", "all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter",
}
#: Operators that start nothing on a device: their time is that of the dispatcher.
_FREE: Final = frozenset({
    "_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh",
    "resize_", "promote_types", "_local_scalar_dense", "recv_", "barrier", "wait_tensor", "set_",
})
#: Operators whose arithmetic takes longer than their bytes, on a processor at least.
_MATH: Final = frozenset({
    "exp", "exp_", "log", "sin", "cos", "silu", "silu_backward", "gelu", "gelu_backward", "tanh", "tanh_backward",
    "sigmoid", "sigmoid_backward", "pow", "rsqrt", "erf", "softplus", "logsumexp", "_softmax", "_log_softmax",
    "_softmax_backward_data", "_log_softmax_backward_data", "native_dropout", "bernoulli_", "normal_", "uniform_",
})
_REDUCE: Final = frozenset({
    "sum", "mean", "amax", "max", "min", "any", "all", "norm", "linalg_vector_norm", "_foreach_norm", "cumsum",
    "native_layer_norm", "native_layer_norm_backward", "_fused_rms_norm", "_fused_rms_norm_backward",
})
#: Operators that touch as many bytes of a large operand as they put out.
_PICK: Final = frozenset({"embedding", "index_select", "gather", "index"})
_PUT: Final = frozenset({"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_", "index_put_",
                         "index_copy_"})
#: Operators in place that do not read what they write to.
_OVERWRITE: Final = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_"})

#: Of DistributedDataParallel.
_BUCKET_BYTES: Final = 25 * 2**20


class Operation(NamedTuple):
    """One kind of operation.

    Attributes:
        phase: of the step.
        kind: `matmul`, `attention`, `attention_backward`, `pointwise`, `math`, `reduce`, `view` (nothing on the
            device), `update` (a parameter by its optimizer), or a collective.
        dtype: of its first tensor: `fp32`, `bf16`, ...; of attention with the size of a head: `fp32 64`.
        flops: of one.
        bytes: that one moves; of a collective, those of the whole tensor.
        ranks: of a collective: the first, how far apart, and how many.
    """

    phase: Phase
    kind: str
    dtype: str
    flops: int
    bytes: int
    ranks: tuple[int, int, int] | None = None


class Work:
    """Counts operations as they are dispatched.

    Attributes:
        calls: how many of each kind.
        phase: what the step is at, outside of backward passes.
        counts: whether they are counted.
        stands_for: how many times each is counted.
    """

    def __init__(self) -> None:
        self.calls: Counter[Operation] = Counter()
        self.phase: Phase = "forward"
        self.counts = True
        self.stands_for = 1

    def begin(self, counts: bool) -> None:
        """A new step, and whether it counts."""
        self.calls.clear()
        self.phase, self.counts = "forward", counts

    def to_json(self) -> list[list[Any]]:
        """Rows: the fields of an operation, and how many."""
        return [[*operation, count] for operation, count in self.calls.items()]

    def note(self, func: Any, args: Any, kwargs: Any, out: Any, loss: bool = False) -> None:
        """One call of an operator; `loss`: within the head and its loss, which makes most of its gradient at once."""
        namespace = func.namespace
        if not self.counts or namespace in ("prim", "profiler"):
            return
        name = func._schema.name.partition("::")[2]
        tensors = [_local(x) for x in tree_iter((args, kwargs or {})) if isinstance(x, Tensor)]
        results = [_local(x) for x in tree_iter(out) if isinstance(x, Tensor)]
        first = next(iter(tensors or results), None)
        dtype = "" if first is None else _dtype(first)
        flops, moved, ranks = 0, 0, None
        if namespace in ("c10d", "_c10d_functional") and name in COLLECTIVES:
            kind = COLLECTIVES[name]
            moved, ranks = max((tensor.nbytes for tensor in tensors), default=0), _ranks(args)
        elif func.is_view or name in _FREE:
            kind = "view"
        elif "scaled_dot_product" in name or "flash_attention" in name:
            kind = "attention_backward" if "backward" in name else "attention"
            given = _arguments(func, args, kwargs or {})
            flops, dtype = _attention_flops(name, given), f"{dtype} {given['query'].shape[-1]}"
            moved = sum(map(_bytes, tensors + results))
        elif (count := _flop_formula(func, name)) is not None:
            kind, flops = "matmul", int(count(*args, **(kwargs or {}), out_val=out))
            moved = sum(map(_bytes, tensors + results))
        else:
            kind = "math" if name in _MATH else "reduce" if name in _REDUCE else "pointwise"
            moved = _moved(name, tensors, results, _changed(func, args, kwargs or {}))
        self.add(Operation(self._phase_now(loss), kind, dtype, flops, moved, ranks))

    def add(self, operation: Operation, count: float = 1) -> None:
        """Operations that no dispatcher sees."""
        self.calls[operation] += count * self.stands_for  # type: ignore[assignment]

    def average(self, gradient: Tensor) -> None:
        """DistributedDataParallel's message for a gradient: a piece of a bucket."""
        share = min(1.0, gradient.nbytes / _BUCKET_BYTES)
        whole = int(gradient.nbytes / share)
        self.add(Operation("backward", "all_reduce", _dtype(gradient), 0, whole, (0, 1, dist.get_world_size())), share)

    def update(self, formula: Formula, weight: Weight, gradient: Gradient, operands: States, scalars: Scalars) -> None:
        """A parameter by an update rule: weight, gradient and states read once, and written once where they change."""
        written = _written(formula, tuple(operands), tuple(scalars))
        moved = gradient.raw.nbytes + weight.tensor.nbytes * (1 if weight.rounding == "master" else 2)
        moved += 2 * (0 if weight.extra is None else weight.extra.nbytes)
        moved += sum(state.nbytes * (2 if name in written else 1) for name, state in operands.items())
        self.add(Operation("optimizer", "update", _dtype(weight.tensor), 0, moved))

    def read(self, *tensors: Tensor) -> None:
        """A pass of an update rule over tensors, of which little is kept."""
        self.add(Operation("optimizer", "update", _dtype(tensors[0]), 0, sum(tensor.nbytes for tensor in tensors)))

    def _phase_now(self, loss: bool) -> Phase:
        if self.phase != "forward":
            return self.phase
        if loss or torch._C._current_graph_task_id() == -1:
            return "loss" if loss else "forward"
        return "recompute" if torch.is_grad_enabled() else "backward"


def extended(tables: Sequence[Iterable[list[Any]]], more: int) -> list[list[Any]]:
    """The work of a model `more` layers deeper than the last of these, each a layer deeper than the one before.

    Operations whose counts lie on a straight line go on along it. Others, whose sizes grow with the depth, are taken
    together by phase and kind.
    """
    counts = [{(*row[:5], tuple(row[5]) if row[5] else None): row[6] for row in table} for table in tables]
    sums = [defaultdict[Any, list[float]](lambda: [0.0, 0.0, 0.0]) for _ in counts]  # calls, FLOPs, bytes
    result: list[list[Any]] = []
    for key in dict.fromkeys(itertools.chain(*counts)):
        values = [each.get(key, 0) for each in counts]
        changes = [after - before for before, after in itertools.pairwise(values)]
        if changes[0] >= 0 and all(math.isclose(change, changes[0], abs_tol=1e-6) for change in changes):
            result.append([*key, values[-1] + more * changes[-1]])
            continue
        phase, kind, dtype, flops, moved, ranks = key
        for each, value in zip(sums, values, strict=True):
            row = each[phase, kind, dtype, ranks]
            row[:] = row[0] + value, row[1] + value * flops, row[2] + value * moved
    for phase, kind, dtype, ranks in dict.fromkeys(itertools.chain(*sums)):
        before, last = (each[phase, kind, dtype, ranks] for each in sums[-2:])
        number, flops, moved = (max(0.0, y + more * (y - x)) for x, y in zip(before, last, strict=True))
        if number:
            result.append([phase, kind, dtype, int(flops / number), int(moved / number), ranks, number])
    return result


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local


def _dtype(tensor: Tensor) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}.get(
        tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def _bytes(tensor: Tensor) -> int:
    """Of the elements that are there: an expanded dimension is one."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def _moved(name: str, tensors: list[Tensor], results: list[Tensor], changed: list[Tensor]) -> int:
    """Bytes that an operator reads and writes."""
    written = sum(map(_bytes, changed or results))
    if name in _PICK:
        return 2 * written
    if name in _PUT:  # of what is added, twice; where it is not in place, the whole is copied before
        return 3 * min(map(_bytes, tensors[1:]), default=0) + (0 if changed else 2 * written)
    if name in _OVERWRITE:
        return written + sum(map(_bytes, tensors[1:]))
    return written + sum(map(_bytes, tensors))


def _arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _changed(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The operands that an operator writes to."""
    given = _arguments(func, args, kwargs)
    into = [given.get(argument.name) for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write]
    return [_local(x) for x in tree_iter(into) if isinstance(x, Tensor)]


def _flop_formula(func: Any, name: str) -> Any:
    """The formula of a matrix product, in place or not."""
    found = flop_registry.get(func.overloadpacket)
    if found is None and name.endswith("_") and hasattr(torch.ops.aten, name[:-1]):
        found = flop_registry.get(getattr(torch.ops.aten, name[:-1]))
    return found


def _attention_flops(name: str, given: dict[str, Any]) -> int:
    """Shapes: query [B, H, T, D], key [B, K, S, D], value [B, K, S, E]."""
    query, key, value = given["query"], given["key"], given["value"]
    scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    by_key, by_value = 2 * scores * query.shape[3], 2 * scores * value.shape[3]
    whole = 3 * by_key + 2 * by_value if "backward" in name else by_key + by_value
    return int(whole // 2 if given.get("is_causal") else whole)


def _ranks(args: Any) -> tuple[int, int, int]:
    """The first rank of a collective's group, how far apart they are, and how many."""
    boxed = [each for each in args if isinstance(each, torch.ScriptObject) and "ProcessGroup" in str(each._type())]
    if boxed:
        group = dist.ProcessGroup.unbox(boxed[0])
    else:  # functional collectives name it
        c10d: Any = dist.distributed_c10d
        group = c10d._resolve_process_group([each for each in args if isinstance(each, str)][-1])
    ranks = dist.get_process_group_ranks(group)
    return ranks[0], ranks[1] - ranks[0] if len(ranks) > 1 else 1, len(ranks)


@functools.lru_cache(maxsize=64)
def _written(formula: Formula, operands: tuple[str, ...], scalars: tuple[str, ...]) -> frozenset[str]:
    """The states that a formula changes."""
    return frozenset(trace(formula, operands, scalars, C)[2])
