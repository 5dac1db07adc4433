"""The trained model as a transformers folder that `from_pretrained` loads (an adapter: a peft folder)."""

from __future__ import annotations

import shutil

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel

from collie_lab.data import Tokenizer
from collie_lab.folder import RunFolder

__all__ = ["export_model"]


def export_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: RunFolder) -> None:
    """Write `model` and the run's tokenizer to `<run>/model`; on all ranks together, rank 0 writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    target, partial = folder.path / "model", folder.path / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if model.generation_config is not None:  # else it would stop at another vocabulary's token
        model.generation_config.update(bos_token_id=next(iter(tokenizer.prefix), None), eos_token_id=tokenizer.eos_id,
                                       pad_token_id=tokenizer.pad_id)
    model.save_pretrained(partial, state_dict=state)
    shutil.copytree(tokenizer.folder, partial, dirs_exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
