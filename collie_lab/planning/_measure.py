"""One rank of a calibration: `python -m collie_lab.planning._measure RANK WORLD_SIZE FOLDER`, started by `calibrate`.

All ranks measure at the same time, since they share a machine's memory. Of every figure the best of several rounds is
kept: what disturbs a machine only ever adds to it. A rank of one thread on a CPU goes by its processor time. The first
rank writes what it found to `FOLDER/rates.json`.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

import collie_lab as lab
from collie_lab.folder import write_json
from collie_lab.planning._work import Work
from collie_lab.planning.dry_run import full_documents
from collie_lab.planning.rates import Curve, Rates
from collie_lab.planning.speed import wire_bytes
from collie_lab.rank import die_with_parent

__all__ = ["main"]

Points = list[tuple[float, float]]
"""Sizes and seconds."""

_ROUNDS: Final = 7
_ROUND_SECONDS: Final = 0.004
#: Not measured on an idle machine yet (docs/plans.md): a guess.
_MARGIN: Final = 0.2


def main() -> None:
    """Measure."""
    die_with_parent()
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=f"file://{folder}/store",
                                rank=rank, world_size=ranks)
    rates = _measure(device, ranks)
    if not rank:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        write_json(folder / "rates.json", {"device": name, "rates": rates.to_json()})
    if ranks > 1:
        dist.destroy_process_group()


def _measure(device: torch.device, ranks: int) -> Rates:
    gpu = device.type == "cuda"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        dtypes.pop("bf16")
    largest = 2**28 if gpu else 2**24  # bytes of a tensor
    curves = {kind: _curve(_by_bytes(call, device, largest), device) for kind, call in _ELEMENTWISE.items()}
    curves["update"] = _curve(_updates(device, largest // 4), device)
    for name, dtype in dtypes.items():
        most = 8192 if gpu else 1024 if dtype == torch.float32 else 256
        curves[f"matmul {name}"] = _curve(_products(dtype, device, most), device)
        length = 4096 if gpu else 1024 if dtype == torch.float32 else 256
        for head in _HEADS:
            for kind, points in zip(("attention", "attention_backward"), _attention(dtype, device, length, head),
                                    strict=True):
                curves[f"{kind} {name} {head}"] = _curve(points, device)
    links = {kind: _curve(_messages(kind, device, ranks, largest // 4), device, floor=False)
             for kind in _MESSAGES} if ranks > 1 else {}
    if links:
        links[""] = links["all_gather"]  # of any other kind
    return Rates("calibration", _MARGIN, curves, _host(device), asynchronous=gpu, overlap=0.8 if gpu else 0.0,
                 links=links)


def _curve(points: Points, device: torch.device, *, floor: bool = True) -> Curve:
    """Where the host waits for every operation, what the smallest takes is the host's."""
    start = points[0][1] if floor and device.type == "cpu" else 0.0
    above = [(size, seconds - start) for size, seconds in points if seconds > 1.02 * start]
    kept = above or points[-1:]
    return Curve(tuple(size for size, _ in kept), tuple(seconds for _, seconds in kept))


def _seconds(call: Callable[[], object], device: torch.device, together: bool = False) -> float:
    """Of one call, in the best of some rounds; `together`: all ranks make the same number of calls."""
    clock = time.perf_counter if together else _clock(device)

    def timed(count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = clock()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - began

    timed(2)
    count = max(1, math.ceil(_ROUND_SECONDS / max(timed(2) / 2, 1e-7)))
    if together:
        most = torch.tensor(count, device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MIN)
        count = int(most)
    return min(timed(count) for _ in range(_ROUNDS)) / count


def _clock(device: torch.device) -> Callable[[], float]:
    """What else a machine does takes no processor time of a single thread."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


#: Of each kind an operation, and how many tensors it reads and writes.
_ELEMENTWISE: Final[dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]]] = {
    "pointwise": (torch.add, 3), "math": (lambda x, _: torch.nn.functional.silu(x), 2),
    "reduce": (lambda x, _: x.sum(-1), 1),
}


def _by_bytes(kind: tuple[Callable[[Tensor, Tensor], Tensor], float], device: torch.device, largest: int) -> Points:
    """The first operand has just been used; the second, every other time, is from long ago, as what was saved for a
    backward pass: in no cache."""
    call, tensors = kind
    points = Points()
    for power in range(8, int(math.log2(largest)) + 1, 2):
        x, *others = (torch.ones(2**power // 256, 64, device=device) for _ in range(1 + _others(2**power, largest)))
        seconds = itertools.cycle(itertools.chain.from_iterable((others[0], each) for each in others))
        points.append((tensors * 2**power, _seconds(functools.partial(_with_next, call, x, seconds), device)))
    return points


def _with_next(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, seconds: Iterator[Tensor]) -> Tensor:
    return call(x, next(seconds))


def _others(size: int, largest: int) -> int:
    """Tensors of so many bytes that together fill more than a cache."""
    return max(1, min(512, 8 * largest // size))


def _updates(device: torch.device, largest: int) -> Points:
    """AdamW's update of fp32 parameters: seven of their size are read or written. So many that no cache keeps them."""
    points = Points()
    for power in range(9, int(math.log2(largest)) - 2, 3):
        size = 2**power
        layers = [nn.Linear(size, 1, bias=False, device=device) for _ in range(max(1, min(256, largest // 4 // size)))]
        module = nn.ModuleList(layers)
        for layer in layers:
            layer.weight.grad = torch.ones_like(layer.weight)
        optimizer = lab.optim.build(lab.AdamW(lr=1e-3), module)
        points.append((28 * size, _seconds(optimizer.step, device) / len(layers)))
    return points


def _products(dtype: torch.dtype, device: torch.device, most: int) -> Points:
    points, size = Points(), 16
    while size <= most:
        x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        points.append((2 * size**3, _seconds(functools.partial(torch.mm, x, y.T), device)))
        size *= 2
    return points


#: Sizes of a head: of small ones the softmax takes more than the products.
_HEADS: Final = (16, 32, 64, 128)


def _attention(dtype: torch.dtype, device: torch.device, most: int, head: int) -> tuple[Points, Points]:
    """Causal: forward, and backward."""
    forward, backward, length, heads = Points(), Points(), 16, 16 if device.type == "cuda" else 4
    while length <= most:
        shape = 1, heads, length, head
        q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        call = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True)
        products = heads * length**2 * head  # FLOPs of one product of a half
        forward.append((2 * products, _seconds(call, device)))
        out = call()
        back = functools.partial(torch.autograd.grad, out, (q, k, v), torch.ones_like(out), retain_graph=True)
        backward.append((5 * products, _seconds(back, device)))
        length *= 4
    return forward, backward


_MESSAGES: Final = ("all_reduce", "all_gather", "reduce_scatter", "send")


def _messages(kind: str, device: torch.device, ranks: int, largest: int) -> Points:
    from collie_lab.parallel.collectives import _gather_into, _scatter_sum_into

    points, rank = Points(), dist.get_rank()
    for power in range(10, int(math.log2(largest)) + 1, 2):
        whole = torch.ones(2**power // 4 // ranks * ranks, device=device)
        part = torch.ones(len(whole) // ranks, device=device)
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": functools.partial(dist.all_reduce, whole),
            "all_gather": functools.partial(_gather_into, whole, part),
            "reduce_scatter": functools.partial(_scatter_sum_into, part, whole),
            "send": functools.partial(_pass_on, whole, rank, ranks),
        }
        points.append((wire_bytes(kind, whole.nbytes, ranks), _seconds(calls[kind], device, together=True)))
    return points


def _pass_on(tensor: Tensor, rank: int, ranks: int) -> None:
    """To the next rank, from the one before."""
    operations = [dist.P2POp(dist.isend, tensor, (rank + 1) % ranks),
                  dist.P2POp(dist.irecv, torch.empty_like(tensor), (rank - 1) % ranks)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.work.note(func, args, kwargs, out)
        return out


def _host(device: torch.device) -> dict[str, float]:
    """Seconds that the host takes for an operation, from a model so small that nothing else takes any."""
    from collie_lab.parallel import build_strategy
    from collie_lab.training.batch import collate
    from collie_lab.training.step import TrainingStep

    config = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
              "num_hidden_layers": 4, "vocab_size": 320}
    experiment = lab.Experiment(model=lab.Model("llama-tiny", init="random", config=config),
                                data=lab.RandomTokens(length=8))
    step = TrainingStep(experiment, device, build_strategy(experiment.parallel, device, "fp32"))
    inputs = collate(full_documents(1, 8), np.zeros(1, dtype=np.int64), device, flat=step.flat).inputs
    counted = _Count()
    with counted:
        step.model(**inputs).backward()
    counts = {phase: sum(number for operation, number in counted.work.calls.items()
                         if operation.phase == phase and operation.kind != "view") for phase in ("forward", "backward")}
    clock, seconds = _clock(device), {"forward": math.inf, "backward": math.inf, "update": math.inf}
    for _ in range(5 * _ROUNDS):
        marks = [clock()]
        for _ in _in_turn(step, inputs):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            marks.append(clock())
        for name, begin, end in zip(seconds, marks, marks[1:], strict=False):
            seconds[name] = min(seconds[name], end - begin)
    tensors = sum(1 for _ in step.model.parameters())
    return {"forward": seconds["forward"] / counts["forward"], "backward": seconds["backward"] / counts["backward"],
            "update": seconds["update"] / tensors}


def _in_turn(step: Any, inputs: dict[str, Any]) -> Iterator[None]:
    loss = step.model(**inputs)
    yield
    loss.backward()
    yield
    step.update(1)
    yield


if __name__ == "__main__":
    main()
