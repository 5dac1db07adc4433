"""The count of live tensor bytes, storage by storage, while a step runs on fake tensors."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch._meta_registrations import _create_grouped_mm_output_tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from typing_extensions import override

from collie_lab.planning._roles import Role, Roles
from collie_lab.planning._scratch import scratch
from collie_lab.planning._work import Work

__all__ = ["Event", "Ledger"]

#: Namespaces of operators that only move data between ranks.
_COLLECTIVES: Final = frozenset({"c10d", "_c10d_functional", "c10d_functional", "fsdp"})
_aten: Final = torch.ops.aten
#: What begins the gradient of an indexed tensor, and what then adds to it: out of place for fake tensors alone.
_ZEROS: Final = frozenset({_aten.new_zeros.default, _aten.zeros.default, _aten.zeros_like.default})
_IN_PLACE: Final = {
    _aten.scatter_add.default: _aten.scatter_add_.default, _aten.index_add.default: _aten.index_add_.default,
    _aten.index_put.default: _aten.index_put_.default, _aten.scatter.src: _aten.scatter_.src,
    _aten.scatter.value: _aten.scatter_.value,
}


class Event(NamedTuple):
    """Bytes that a storage takes from now on (a free storage takes 0)."""

    storage: int
    bytes: int


class Ledger(Roles, TorchDispatchMode):
    """Notes every storage that appears, grows, shrinks or goes. Entered inside a `FakeTensorMode`.

    Attributes:
        events: what happened, in order.
        roles: what each storage was made for; `mark` corrects it.
        work: what the operators do.
        on_gpu: what lies in the host's memory does not count.
        moments: where in `events` a moment begins, and its name.
    """

    def __init__(self, round_to: int = 1):
        """Sizes are rounded up to multiples of `round_to` bytes, as an allocator would."""
        super().__init__()
        self.events: list[Event] = []
        self.roles: dict[int, Role] = {}
        self.work = Work()
        self.moments: list[tuple[int, str]] = [(0, "the model")]
        self._round = round_to
        self.on_gpu = round_to > 1
        self._paused = 0
        self._held: dict[int, tuple[int, int]] = {}  # by address: the number of the storage, and its bytes
        self._count = 0
        self._sum: tuple[int, Event] | None = None  # of gradients, and the number of the first
        self._zeros = 0  # the address of the storage that the last operator filled with zeros

    def begin(self, moment: str) -> None:
        """From here on it is another moment of the step."""
        self.moments.append((len(self.events), moment))

    def watch(self, layers: Iterable[nn.Module]) -> None:
        """Begin a moment with the forward and one with the backward pass of every layer."""
        watched = list(layers)
        for index, layer in enumerate(watched):
            layer.register_forward_pre_hook(lambda *_, index=index: self.begin(f"layer {index}"))
            layer.register_forward_hook(functools.partial(self._leave, index, len(watched)))

    def _leave(self, index: int, layers: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.begin(f"backward of layer {index}"))
        if index == layers - 1:
            self.begin("loss")

    def take(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, if it is a new one, or has another size now."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.device.type == "meta":  # a shape for torch's pipeline stages, say, which some versions keep
            return
        storage = local.untyped_storage()
        size, key = self._rounded(storage.nbytes()), storage._cdata
        number, before = self._held.get(key, (0, -1))
        if before < 0:
            self._count += 1
            number = self._count
            self.roles[number] = self._role_now()
            weakref.finalize(storage, self._drop, key)
        if number and size != before:
            self._held[key] = number, size
            self._note(Event(number, size))

    def ignore(self, tensor: Tensor) -> None:
        """Never count a tensor's storage; what was counted of it goes."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._held:
            self._drop(storage._cdata)
        else:
            weakref.finalize(storage, self._drop, storage._cdata)
        self._held[storage._cdata] = 0, storage.nbytes()

    def mark(self, tensor: Tensor, role: Role) -> None:
        """Say what a tensor's storage is for after all."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if (held := self._held.get(local.untyped_storage()._cdata)) is not None:
            self.roles[held[0]] = role

    def mark_gradient(self, parameter: Tensor) -> None:
        """A hook of parameters."""
        if parameter.grad is not None:
            self.mark(parameter.grad, "gradients")

    def scratch(self, size: int) -> None:
        """Bytes that an operator takes and gives back while it runs."""
        self._count += 1
        self.roles[self._count] = "temporaries"
        self._note(Event(self._count, self._rounded(size)))
        self._note(Event(self._count, 0))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it nothing is counted: what torch computes of shapes alone, say."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._run(func, args, kwargs or {})
        self._zeros = out.untyped_storage()._cdata if func in _ZEROS and isinstance(out, FakeTensor) else 0
        if self._paused:
            return out
        self.work.note(func, args, kwargs, out, loss=self.role == "loss")
        if func is torch.ops.aten.add.Tensor and isinstance(out, FakeTensor) and _in_backward():
            self._take_sum(out, args[0])
            return out
        with self.as_role("communication") if func.namespace in _COLLECTIVES else contextlib.nullcontext():
            for value in tree_iter(out):
                if isinstance(value, (FakeTensor, DTensor)):  # of a DTensor's own operators only the result is seen
                    self.take(value)
        if size := scratch(func, args, on_gpu=self.on_gpu):
            self.scratch(size)
        return out

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # Products of experts: torch makes them in every type, and its fake ones in bf16 alone.
            return _create_grouped_mm_output_tensor(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("offs"),
                                                    kwargs.get("out_dtype") or args[0].dtype)
        if func in _IN_PLACE and self._zeros and _in_backward() and self._zeros == args[0].untyped_storage()._cdata:
            func = _IN_PLACE[func]
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:  # an optimizer that scales by a norm reads it; it takes no memory
            if func is torch.ops.aten._local_scalar_dense.default and self.work.phase == "optimizer":
                return 1.0
            raise

    def _drop(self, key: int) -> None:
        number, _ = self._held.pop(key, (0, 0))
        if number:
            self._note(Event(number, 0))

    def _take_sum(self, out: Tensor, first: Tensor) -> None:
        """Autograd adds gradients up in place where nobody else holds the first of them, but fake ones never. So the
        sum waits for what happens next: where the first goes, it takes its place."""
        self.take(out)
        number, _ = self._held.get(first.untyped_storage()._cdata, (0, 0))
        self._sum = number, self.events.pop()

    def _note(self, event: Event) -> None:
        waiting, self._sum = self._sum, None
        if waiting is None:
            self.events.append(event)
        else:
            first, made = waiting
            self.events += [event, made] if event == Event(first, 0) else [made, event]

    def _rounded(self, size: int) -> int:
        return -(-size // self._round) * self._round

    def _role_now(self) -> Role:
        """In a backward pass only what is computed again is an activation."""
        if self.role == "activations" and _in_backward():
            return "temporaries"
        return self.role


def _in_backward() -> bool:
    """Whether a backward pass is under way, and nothing is computed again: that alone records a graph."""
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
