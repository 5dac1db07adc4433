"""What torch.compile cannot do, or needs; part of `collie_lab.check`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from collie_lab.cells import Experiment, Problem, QLoRA
from collie_lab.compiler import missing_for_torch
from collie_lab.data.hub import text_fields

__all__ = ["compile_problems", "compiler_problems"]

#: Fields by which configurations of transformers tell of a state that goes from token to token.
_STATES: Final = ("state_size", "ssm_state_size", "mamba_d_state", "lru_width", "conv_kernel", "linear_conv_kernel_dim",
                  "chunk_size", "attention_hidden_size")
#: Families whose attention is such a loop; nothing else in their configurations tells.
_LOOPS: Final = ("minimax",)
_LEAVE_OUT: Final = "compile=False"


def compile_problems(experiment: Experiment, config: Mapping[str, Any]) -> Iterator[Problem]:
    """What cannot be compiled; `config` is the model's."""
    if not experiment.training.compile:
        return
    config, parallel = text_fields(config), experiment.parallel
    family = config.get("model_type", "")
    if _keeps_a_state(family, config):
        yield Problem("Training", "compile", f"the family {family} keeps a state from token to "
                      "token, in loops that torch.compile unrolls: minutes for every length of a row", _LEAVE_OUT)
    if parallel.engine == "deepspeed" and parallel.zero == 3:
        yield Problem("Training", "compile", "with zero=3 DeepSpeed gathers weights in hooks inside of a block, which "
                      "are no graph: torch.compile gives up in the first step",
                      f'{_LEAVE_OUT}, zero=2, or engine="torch", where zero=3 can be compiled')
    if parallel.pp > 1 and parallel.schedule == "zero_bubble":
        yield Problem("Training", "compile", "zero_bubble computes the gradients of weights apart, layer by layer, "
                      "which takes a compiled block to pieces again", f'{_LEAVE_OUT}, or schedule="interleaved"')
    if isinstance(experiment.adapter, QLoRA):
        yield Problem("Training", "compile", "four-bit layers of bitsandbytes have not been tried under torch.compile",
                      f"{_LEAVE_OUT}, or LoRA")


def compiler_problems(experiment: Experiment) -> Iterator[Problem]:
    """What torch.compile would miss on this machine."""
    if experiment.training.compile and (missing := missing_for_torch()):
        yield Problem("Training", "compile", f"torch.compile needs {missing[0]}, which this machine does not have",
                      f"{missing[1]}, or {_LEAVE_OUT}")


def _keeps_a_state(family: str, config: Mapping[str, Any]) -> bool:
    if layers := config.get("layer_types"):  # of hybrids, which may have attention alone
        return not all("attention" in layer and "linear" not in layer for layer in layers)
    known = _configuration(family)
    return family in _LOOPS or any(config.get(name) or hasattr(known, name) for name in _STATES)


def _configuration(family: str) -> Any:
    """A family's class, whose defaults a file may leave out; None for a family that transformers does not know."""
    from transformers import CONFIG_MAPPING

    if family not in CONFIG_MAPPING:
        return None
    return CONFIG_MAPPING[family]
