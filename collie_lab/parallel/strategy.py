"""Strategies: what a layout does to the model, its gradients and their norm. One face for the loop.

Losses arrive here as sums over tokens, scaled so that the mean over the data-parallel ranks is right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from typing_extensions import override

from collie_lab.cells import Optimizer, Parallel, RuleCell
from collie_lab.optim import RuleOptimizer
from collie_lab.parallel.mesh import Place, build_mesh
from collie_lab.parallel.pipeline import Pipeline, loss_rank
from collie_lab.parallel.sharding import average, average_all, shard, unsharded
from collie_lab.parallel.tensor import TensorParallel

__all__ = ["Strategy", "TorchStrategy", "build_strategy"]


class Strategy:
    """How one rank trains its part of the model: here, one process that has all of it.

    Attributes:
        cell: the layout.
        place: this rank's coordinates in it.
        tensor: what cuts matrices over ranks, if anything does.
        pipeline: what trains this rank's layers, if others have other layers; known when the model is laid out.
        counts: whether what this rank finds (a loss, a score) counts; tensor-parallel ranks all find the same.
        trained: names of all trained parameters, where other ranks have some of them; known when the model is laid out.
    """

    tensor: TensorParallel | None = None
    pipeline: Pipeline | None = None
    trained: tuple[str, ...] = ()

    def __init__(self, cell: Parallel, device: torch.device, precision: str):
        self.cell, self.device, self.precision = cell, device, precision
        self.place = Place.of(dist.get_rank(), cell) if dist.is_initialized() else Place()
        self.counts = self.place.tp == 0

    def lay_out(self, causal_lm: PreTrainedModel, root: nn.Module, dtype: torch.dtype) -> None:
        """Cut the model for this rank, in place, while its weights are on meta. `root` is what the loop calls, `dtype`
        the type that its weights will have."""

    def wrap(self, root: nn.Module, in_backward: bool) -> nn.Module:
        """The model as the loop calls it, when its weights are there."""
        return root

    def compute(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass: autocast where the weights are kept in fp32."""
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def micro_batch(self, model: nn.Module, exchange: bool) -> contextlib.AbstractContextManager[Any]:
        """The context of one micro-batch; gradients are exchanged only where it says so."""
        return contextlib.nullcontext()

    @property
    def stages(self) -> dict[str, Any]:
        """What clipping is to know of a pipeline: its ranks, and which parameters another of them counts."""
        return {}

    def held(self, cell: Optimizer) -> Optimizer:
        """The optimizer as this layout can run it."""
        return cell

    def optimizer_options(self, max_norm: float | None) -> dict[str, Any]:
        """What `optim.build` is to know of the layout: who averages gradients, and who clips them by their norm."""
        return {"max_norm": max_norm, "record_norm": True, **self.stages}

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """The model as the loop calls it, once its optimizer exists: for engines that take both."""
        return model

    def backward(self, loss: Tensor, last: bool) -> None:
        """The gradient of a micro-batch; `last`: the update comes next."""
        loss.backward()

    def exchange(self, model: nn.Module) -> None:
        """After a step's last backward pass: average what nothing has averaged yet."""

    def update(self, optimizer: RuleOptimizer) -> Tensor | None:
        """Clip, step and free the gradients; the norm before clipping (0-d), None where it was never whole."""
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return optimizer.norm

    def counted(self, values: Tensor) -> Tensor:
        """The values, or zeros on a rank that only repeats what another found."""
        return values if self.counts else torch.zeros_like(values)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if dist.is_initialized():
            dist.all_reduce(values)
        return values

    def most(self, count: int) -> int:
        """The largest count of any rank."""
        found = torch.tensor(count, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    @property
    def multiple(self) -> int:
        """What the number of tokens of a micro-batch must be a multiple of."""
        return self.cell.tp if self.cell.sequence_parallel else 1

    @contextlib.contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """The context in which every data-parallel rank may call the model a different number of times."""
        yield

    def gather(self, tensor: Tensor) -> Tensor:
        """A parameter or buffer whole, in the host's memory; all ranks that hold a piece of it together."""
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()

    def snapshot(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Model and optimizer as checkpoints keep them: parameters whole or DTensors, with a state for each."""
        return model, optimizer

    def load(self, read: Callable[[nn.Module, torch.optim.Optimizer], int], model: nn.Module,
             optimizer: torch.optim.Optimizer) -> int:
        """What `read` returns, which puts a checkpoint into a model and an optimizer as `snapshot` gives them."""
        return read(model, optimizer)


class TorchStrategy(Strategy):
    """Data, tensor and pipeline parallelism of torch on one device mesh."""

    def __init__(self, cell: Parallel, device: torch.device, precision: str):
        super().__init__(cell, device, precision)
        self._mesh = build_mesh(cell, device.type)
        self._reshard = cell.zero == 3 and cell.pp == 1  # a pipeline's next micro-batch wants the weights again
        self._replicas = self._mesh["dp"].get_group() if cell.dp > 1 and not cell.zero else None
        self._by_hand = False
        if cell.tp > 1:
            self.tensor = TensorParallel(self._mesh["tp"], cell.sequence_parallel)
        self.counts = self.place.tp == 0 and self.place.pp == loss_rank(cell.schedule, cell.pp)

    @property
    def _sharded(self) -> bool:
        return self.cell.zero > 0 and self.cell.dp > 1

    @override
    def lay_out(self, causal_lm: PreTrainedModel, root: nn.Module, dtype: torch.dtype) -> None:
        if self.cell.pp > 1:
            self.trained = tuple(name for name, parameter in root.named_parameters() if parameter.requires_grad)
            # What blocks hand on: under autocast with fp32 weights that is fp32.
            hidden = torch.bfloat16 if self._sharded and self.precision == "bf16" else dtype
            self.pipeline = Pipeline(causal_lm, self._mesh["pp"].get_group(), self.cell.schedule, self.device, hidden,
                                     self.tensor)
        if self.tensor is not None:
            self.tensor.cut(causal_lm)
        if self._sharded:
            names = self._mesh.mesh_dim_names or ()
            mesh = self._mesh["replicate", "shard"] if "shard" in names else self._mesh["dp"]
            shard(root, mesh, self.precision, reshard=self._reshard)

    @property
    @override
    def stages(self) -> dict[str, Any]:
        if self.pipeline is None:
            return {}
        return {"stages": self._mesh["pp"].get_group(), "copies": self.pipeline.copies}

    @override
    def held(self, cell: Optimizer) -> Optimizer:
        """In a pipeline an update waits for the last micro-batch: held gradients are an update after the backward pass.
        """
        if self.pipeline is None or not isinstance(cell, RuleCell) or not cell.in_backward:
            return cell
        return cell.replace(in_backward=False, accumulate=None)

    @override
    def wrap(self, root: nn.Module, in_backward: bool) -> nn.Module:
        """Replicas are averaged by torch's DDP, in buckets during backward, where it can do it.

        It knows nothing of pieces of tensors. And under an optimizer in backward there is no time for buckets, and
        its reduction would come after the update, so that replicas would drift apart unseen: each gradient is
        averaged in its hook.
        """
        if self._replicas is None or (in_backward and self.pipeline is None):
            return root
        if self.cell.tp * self.cell.pp > 1:
            self._by_hand = True
            return root
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(root, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False)

    @override
    def compute(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._sharded else super().compute()  # FSDP2 casts by its own policy

    @override
    def micro_batch(self, model: nn.Module, exchange: bool) -> contextlib.AbstractContextManager[Any]:
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(exchange)
        if exchange or not isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()

    @override
    def optimizer_options(self, max_norm: float | None) -> dict[str, Any]:
        options = super().optimizer_options(max_norm)
        if (group := self._replicas) is not None and not self._by_hand:
            options["reduce"] = lambda gradient: average(gradient, group)
        return options

    @override
    def exchange(self, model: nn.Module) -> None:
        if self.pipeline is not None:
            self.pipeline.sync_tied()
        if self._by_hand and self._replicas is not None:
            average_all(model.parameters(), self._replicas)

    @override
    @contextlib.contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        with contextlib.ExitStack() as contexts:
            if self._sharded:
                contexts.enter_context(unsharded(model, reshard=self._reshard))
            if self.tensor is not None:
                contexts.enter_context(self.tensor.unspread())
            yield


def build_strategy(cell: Parallel, device: torch.device, precision: str) -> Strategy:
    """The strategy of a layout; the process group exists already where there are several ranks."""
    if cell.engine == "deepspeed":
        from collie_lab.parallel.deepspeed import DeepSpeed

        return DeepSpeed(cell, device, precision)
    if cell.world_size == 1:
        return Strategy(cell, device, precision)
    return TorchStrategy(cell, device, precision)
