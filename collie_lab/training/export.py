"""The trained model as a transformers folder that `from_pretrained` loads (an adapter: a peft folder).

From any layout, and no rank holds the whole model: tensors are gathered one by one, and the lowest rank that has a
name writes it, so that each pipeline stage writes its own files. What transformers changes between a file and a
module (fused experts, say) is undone block by block.
"""

from __future__ import annotations

import copy
import itertools
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from collie_lab.data import Tokenizer
from collie_lab.folder import RunFolder, write_json
from collie_lab.parallel import Strategy
from collie_lab.training.adapter_state import adapter_state

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["export_model"]

Gather = Callable[[Tensor], Tensor]

# The largest file. A rank holds no more of the whole than that and one block.
_FILE_BYTES = 4 * 10**9


def export_model(model: PreTrainedModel | PeftModel, tokenizer: Tokenizer, folder: RunFolder, strategy: Strategy
                 ) -> None:
    """Write `model` and the run's tokenizer to `<run>/model`; on all ranks together, each has its part of the names.

    `model` is a transformers model, or peft's wrapper of one. The ranks of a DTensor's mesh must have the same names
    in the same order, for they gather together. The folder is there, whole, when this returns on any rank.
    """
    target, partial = folder.path / "model", folder.path / ".model.partial"
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _set_special_tokens(model, tokenizer)
    _barrier()
    if isinstance(model, PreTrainedModel):
        _write_model(model, partial, rank, strategy.gather)
    else:
        _write_adapter(model, partial, rank, strategy.gather)
    if rank == 0:
        shutil.copytree(tokenizer.folder, partial, dirs_exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    _barrier()


def _set_special_tokens(model: Any, tokenizer: Tokenizer) -> None:
    if model.generation_config is not None:  # else it would stop at another vocabulary's token
        model.generation_config.update(bos_token_id=next(iter(tokenizer.prefix), None), eos_token_id=tokenizer.eos_id,
                                       pad_token_id=tokenizer.pad_id)


def _write_adapter(model: PeftModel, folder: Path, rank: int, gather: Gather) -> None:
    """What is trained, gathered on rank 0: it is small. peft finds the adapter of the layers that a rank has."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    writers = _writers(trained)
    mine = {name: whole for name, tensor in trained.items() for whole in [gather(tensor)] if writers[name] == rank}
    config = copy.copy(model.peft_config[model.active_adapter])
    parts = _on_rank_0(adapter_state(model, config, mine))
    if rank == 0:
        model.create_or_update_model_card(str(folder))
        config.inference_mode = True
        config.save_pretrained(str(folder))
        whole = {name: tensor.contiguous() for part in parts for name, tensor in part.items()}
        save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _write_model(model: PreTrainedModel, folder: Path, rank: int, gather: Gather) -> None:
    """Every rank's files of weights; rank 0: their index and the configuration."""
    tensors = _kept(model)
    writers = _writers(tensors)
    # Tied weights: a source may be on another rank than the copy that is made of it when the model is loaded.
    tied = {name for name, source in model.all_tied_weights_keys.items() if source in writers}
    files = _Files(folder, rank)
    names = [name for name in tensors if name not in tied]
    for _, block in itertools.groupby(names, _block_of):
        whole = {name: gather(tensors[name]) for name in block}
        files.add(revert_weight_conversion(model, {name: tensor for name, tensor in whole.items()
                                                   if writers[name] == rank}))
    files.flush()
    parts = [part for written in _on_rank_0(files.written) for part in written]
    if rank == 0:
        model.save_pretrained(folder, state_dict={})  # the configuration alone; it removes files with the final names
        _name_files(folder, parts)


def _kept(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a file keeps of a module: parameters and buffers, each under its first name."""
    ignored = model._keys_to_ignore_on_save or ()
    seen: set[int] = set()
    kept = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in ignored and id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor
    return kept


def _block_of(name: str) -> str:
    """The block that a name belongs to, `model.layers.3`; outside of blocks itself."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name


class _Files:
    """Collects tensors and writes them to files of limited size, under names that no other rank uses.

    Attributes:
        written: of every file its name, and the bytes of each of its tensors.
    """

    def __init__(self, folder: Path, rank: int):
        self._folder, self._rank = folder, rank
        self._held: dict[str, Tensor] = {}
        self.written: list[tuple[str, dict[str, int]]] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if sum(held.nbytes for held in self._held.values()) + tensor.nbytes > _FILE_BYTES:
                self.flush()
            self._held[name] = tensor.contiguous()

    def flush(self) -> None:
        if self._held:
            file = f"rank-{self._rank:05d}-{len(self.written):05d}.safetensors"
            save_file(self._held, self._folder / file, metadata={"format": "pt"})
            self.written.append((file, {name: tensor.nbytes for name, tensor in self._held.items()}))
            self._held = {}


def _name_files(folder: Path, parts: list[tuple[str, dict[str, int]]]) -> None:
    """The names by which transformers finds files, and where there are several the index of what is in which."""
    if len(parts) == 1:
        (folder / parts[0][0]).rename(folder / "model.safetensors")
        return
    index: dict[str, str] = {}
    for number, (file, tensors) in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        (folder / file).rename(folder / name)
        index |= dict.fromkeys(tensors, name)
    total = sum(size for _, tensors in parts for size in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _writers(names: Iterable[str]) -> dict[str, int]:
    """For every name of any rank the lowest rank that has it."""
    mine = list(names)
    everyone = [mine]
    if dist.is_initialized():
        everyone = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
    writers: dict[str, int] = {}
    for rank, theirs in enumerate(everyone):
        for name in theirs:
            writers.setdefault(name, rank)
    return writers


def _on_rank_0(value: Any) -> list[Any]:
    """Every rank's value, in order; on the others nothing."""
    if not dist.is_initialized():
        return [value]
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, everyone)
    return everyone or []


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
