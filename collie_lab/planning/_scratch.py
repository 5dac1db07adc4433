"""Memory that single operators take inside beside their results, where no dispatch sees it."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["scratch"]

_aten: Final = torch.ops.aten
#: What gloo does in a tensor of its own.
_COPIED_BY_GLOO: Final = frozenset({torch.ops.c10d._allgather_base_.default,
                                    torch.ops.c10d._reduce_scatter_base_.default})
#: The tensors that operators copy first where they are not contiguous, by their places among the arguments.
_MADE_CONTIGUOUS: Final = {
    _aten.embedding_dense_backward.default: (0,), _aten.native_layer_norm.default: (0,),
    _aten.native_layer_norm_backward.default: (0, 1), _aten._softmax.default: (0,),
    _aten._softmax_backward_data.default: (0, 1), _aten._log_softmax.default: (0,),
    _aten._log_softmax_backward_data.default: (0, 1), _aten.nll_loss_forward.default: (0,), _aten.tril.default: (0,),
    _aten.triu.default: (0,), _aten.index_select.default: (0,),
}


def scratch(operator: Any, args: Any, *, on_gpu: bool) -> int:
    """Bytes that an operator takes and gives back while it runs, all of them beside its result."""
    if operator is _aten.logsumexp.default:
        logits, dims = args[:2]  # exp(x - max), whole, and the maxima
        width = math.prod(logits.shape[dim] for dim in dims) if dims and logits.ndim else logits.numel()
        return int(logits.nbytes + logits.nbytes // max(1, width))
    if operator is _aten._safe_softmax.default:
        scores, dim = args[:2]  # which scores are -inf, and in which rows all are
        return int(scores.numel() + scores.numel() // scores.shape[dim])
    copied = _copied(*[args[at] for at in _MADE_CONTIGUOUS.get(operator, ())])
    return copied if on_gpu else copied + _on_cpu(operator, args)


def _on_cpu(operator: Any, args: Any) -> int:
    if operator in _COPIED_BY_GLOO:
        return max(int(tensor.nbytes) for tensor in args[:2])
    if operator is _aten.native_layer_norm_backward.default and any(args[7][1:]):
        # Every thread adds up the gradients of weight and bias.
        return int(2 * torch.get_num_threads() * math.prod(args[2]) * args[0].itemsize)
    if operator is _aten._scaled_dot_product_flash_attention_for_cpu.default:
        rows, columns = _attention_block(args[0], args[1])
        reduced = 0 if args[0].dtype == torch.float32 else rows * columns * args[0].itemsize
        # For every thread, in fp32: scores, their maxima and sums, what they weigh; and scores in the inputs' type.
        return int(torch.get_num_threads() * (4 * rows * (columns + 2 + args[0].shape[3]) + reduced))
    if operator is _aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        gradient, queries, keys = args[:3]
        rows, columns = _attention_block(queries, keys)
        # For every thread, in fp32: scores, their gradient, and a sum for each row.
        return torch.get_num_threads() * 4 * rows * (2 * columns + 1) + _copied(gradient.transpose(1, 2))
    return 0


def _copied(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors if not tensor.is_contiguous())


def _attention_block(queries: Tensor, keys: Tensor) -> tuple[int, int]:
    """How many rows and columns of scores a thread of torch's flash attention for CPUs has at once."""
    length = queries.shape[2]
    return min(length, 256 if length >= 768 else 64 if length >= 192 else 32), min(keys.shape[2], 512)
