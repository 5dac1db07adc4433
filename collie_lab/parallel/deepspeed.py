"""DeepSpeed's ZeRO 0 to 3 and offload, behind the same face as torch's layouts.

The optimizer is ours, and steps after the backward pass. From `zero=1` on DeepSpeed hands it flat pieces: every rank
updates its part of one long vector (Rajbhandari et al., arXiv 1910.02054), which is the same for rules that treat
every element alike. DeepSpeed is imported when a strategy is made, and not before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from typing_extensions import override

from collie_lab.cells import Parallel
from collie_lab.optim import Rule, RuleOptimizer
from collie_lab.parallel.snapshot import keep, make_snapshot
from collie_lab.parallel.strategy import Strategy

__all__ = ["DeepSpeed", "start_deepspeed"]

# What an optimizer counts, beside the states that have the shape of the weights.
_COUNTS = ("step", "start")


class DeepSpeed(Strategy):
    """The engine of DeepSpeed around a model and one of our optimizers.

    Raises:
        ImportError: deepspeed is not installed.
        TypeError, ValueError: from `prepare`: an optimizer that is not ours, or does not treat every element alike.
    """

    def __init__(self, cell: Parallel, device: torch.device, precision: str):
        super().__init__(cell, device, precision)
        self._max_norm: float | None = None
        self._bf16_weights = False
        self._engine: Any = None
        self._deepspeed = start_deepspeed(device)

    @property
    def _flat(self) -> bool:
        """Whether the optimizer is given flat pieces instead of the parameters."""
        return self.cell.zero > 0

    @override
    def wrap(self, model: nn.Module, in_backward: bool) -> nn.Module:
        return model  # `prepare` wraps it, together with the optimizer

    @override
    def compute(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._bf16_weights else super().compute()

    @override
    def optimizer_options(self, max_norm: float | None) -> dict[str, Any]:
        if not self._flat:
            return super().optimizer_options(max_norm)
        self._max_norm = max_norm  # DeepSpeed knows the norm over all pieces, and clips by it
        return {"lazy": True}

    @override
    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        if not isinstance(optimizer, RuleOptimizer):
            raise TypeError("DeepSpeed's engine steps with optimizers of collie_lab, "
                            f"not with {type(optimizer).__name__}")
        if self._flat and type(optimizer.rule).apply is not Rule.apply:
            raise ValueError(f"{type(optimizer.rule).__name__} looks at whole tensors, and DeepSpeed hands out flat "
                             'pieces of them: an element-wise rule, or engine="torch"')
        self._bf16_weights = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
        engine, *_ = self._deepspeed.initialize(model=model, optimizer=optimizer, config=self._config(model))
        self._engine = engine
        if self._flat:
            for piece, group in self._pieces():
                optimizer.adopt(piece, group)
            if self.cell.zero < 3:
                # Else it would link the states after the update of the first group, when the others have none.
                engine.optimizer._lazy_init_hp_params_optimizer_state()
        wrapped: nn.Module = engine
        return wrapped

    def _config(self, model: nn.Module) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.cell.zero}
        if self.cell.zero == 3:
            # Smaller parameters stay whole on every rank. The buckets would be of 2 GB by default, however small the
            # model. Both as transformers chooses them.
            hidden = getattr(getattr(model, "config", None), "hidden_size", None) or 0
            zero["stage3_param_persistence_threshold"] = 10 * hidden
            if hidden:
                zero["reduce_bucket_size"] = hidden * hidden
                zero["stage3_prefetch_bucket_size"] = int(0.9 * hidden * hidden)
        pin = self.device.type == "cuda"
        if self.cell.offload is not None:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
        if self.cell.offload == "parameters":
            zero["offload_param"] = {"device": "cpu", "pin_memory": pin}
        return {
            # Micro-batches are ours: the loss comes scaled, and `backward` says which is the last of a step. Two
            # says that there may be several; one would have offload take the last one's norm for the whole's.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,  # ours
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": self._max_norm or 0.0,  # left out, it would be 1
            "bf16": {"enabled": self._bf16_weights},
            # No module is named: gradients are then reduced in fp32, as everywhere here.
            "torch_autocast": {"enabled": self.precision == "bf16" and not self._bf16_weights, "dtype": "bfloat16",
                               "lower_precision_safe_modules": []},
        }

    # --- a step -----------------------------------------------------------------------------------

    @override
    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    @override
    def update(self, optimizer: RuleOptimizer) -> Tensor | None:
        self._engine.step()
        if not self._flat:
            return optimizer.norm
        norm = self._engine.get_global_grad_norm()
        return norm if norm is None else torch.as_tensor(norm)

    # --- the whole model --------------------------------------------------------------------------

    @override
    @contextlib.contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """Under `zero=3`, gather everything once, and take off the hooks that would give it back block by block."""
        if self.cell.zero < 3:
            yield
            return
        offload = self._engine.optimizer.parameter_offload
        offload.partition_all_parameters()
        offload._remove_module_hooks()
        try:
            with self._deepspeed.zero.GatheredParameters(list(model.parameters())):
                yield
        finally:
            offload.setup_zero_stage3_hooks()

    @override
    def gather(self, tensor: Tensor) -> Tensor:
        with self._deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().to("cpu", copy=True)  # a copy: it is a view of one long vector

    # --- checkpoints ------------------------------------------------------------------------------

    @override
    def snapshot(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        if not self._flat:
            return model, optimizer
        assert isinstance(optimizer, RuleOptimizer)
        mesh = init_device_mesh("cpu", (self.cell.dp,), mesh_dim_names=("dp",))
        trained = _trained(model)
        shapes = {name: (getattr(p, "ds_shape", p.shape), p.dtype) for name, p in trained.items()}
        snapshot, states = make_snapshot(shapes, optimizer, mesh)
        counts = next(optimizer.state[piece] for piece, _ in self._pieces())
        for name, target in snapshot.named_parameters():
            weight = self._get(trained[name], None)
            keep(target.data, weight)
            for key, value in states.state[target].items():
                if key in _COUNTS:
                    value.copy_(counts[key])
                else:
                    keep(value, weight if key == "master" else self._get(trained[name], key))
        return snapshot, states

    @override
    def load(self, read: Callable[[nn.Module, torch.optim.Optimizer], int], model: nn.Module,
             optimizer: torch.optim.Optimizer) -> int:
        snapshot, states = self.snapshot(model, optimizer)
        step = read(snapshot, states)
        if self._flat:
            self._restore(snapshot, states, model, optimizer)
        return step

    def _restore(self, snapshot: nn.Module, states: torch.optim.Optimizer, model: nn.Module,
                 optimizer: torch.optim.Optimizer) -> None:
        trained = _trained(model)
        for name, source in snapshot.named_parameters():
            entries = states.state[source]
            self._set(trained[name], entries.get("master", source.data))
            for key, value in entries.items():
                if key not in (*_COUNTS, "master"):
                    self._deepspeed.utils.safe_set_full_optimizer_state(trained[name], _whole(value), key)
        for piece, _ in self._pieces():  # counts are the same for all that is updated together
            for key in _COUNTS:
                optimizer.state[piece][key].copy_(torch.stack([s[key] for s in states.state.values()]).max())

    def _get(self, parameter: Tensor, key: str | None) -> Tensor:
        """The whole weight, or one of its states, in fp32 on the host."""
        utils = self._deepspeed.utils
        value: Tensor = utils.safe_get_full_fp32_param(parameter) if key is None \
            else utils.safe_get_full_optimizer_state(parameter, key)
        return value.reshape(getattr(parameter, "ds_shape", parameter.shape)).cpu()

    def _set(self, parameter: Tensor, source: Tensor) -> None:
        """Both copies of a weight: that which is updated, and that which computes."""
        value = _whole(source)
        self._deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(value)

    def _pieces(self) -> list[tuple[Tensor, int]]:
        """What the optimizer updates on this rank, each with its parameter group."""
        zero = self._engine.optimizer
        if self.cell.zero == 3:
            return [(piece, zero.sub_group_to_group_id[at]) for at, piece in
                    enumerate(zero.fp32_partitioned_groups_flat)]
        return [(piece, group) for group, piece in enumerate(zero.single_partition_of_fp32_groups)]


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _whole(value: Tensor) -> Tensor:
    assert isinstance(value, DTensor)
    return value.full_tensor().float()


def start_deepspeed(device: torch.device) -> Any:
    """The module, quiet, on the process group that is there (one of one rank, where there is none)."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    # It would ask MPI for what it does not find here.
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.setdefault("RANK", rank)
    os.environ.setdefault("WORLD_SIZE", world_size)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0) if device.type == "cuda" else rank)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # it calls them
    if device.type == "cpu":
        _leave_out_shared_memory(deepspeed)
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    return deepspeed


def _leave_out_shared_memory(deepspeed: Any) -> None:
    """Keep DeepSpeed from compiling its all-reduce over shared memory, one to five minutes at the first start.

    There is no option for it: the table of what can be compiled is private to DeepSpeed.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
