"""The language-model loss, in chunks of tokens: the full logits never exist, let alone in fp32.

Per chunk the logits are made, the loss and its gradient are taken, and only the gradients with respect to
the hidden states and the head's weight are kept; the backward pass has nothing left to do but to scale them
(the fused linear cross-entropy of Liger Kernel, arXiv 2410.10989, in plain torch).

Shapes: N predicted tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import PreTrainedModel

from collie_lab.parallel.tensor import TensorParallel, local_piece

__all__ = ["TokenLoss", "attach_loss", "attach_whole_loss", "linear_loss"]

TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""fp32 logits [N, V] and labels [N] to losses [N]."""

Objective = Literal["train", "likelihood", "drawn", "scores"]

_SMALLEST_CHUNK = 1024


def linear_loss(hidden_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, labels_N: Tensor,
                token_loss: TokenLoss | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum over tokens of the loss of `hidden @ weight.T + bias` against the labels; cross-entropy by default.

    With `group`, weight and bias are this rank's rows of a vocabulary that its ranks share equally, and the gradient of
    the hidden states is this rank's share of it.
    """
    result: Tensor = _LinearLoss.apply(hidden_NC, weight_VC, bias_V, labels_N, token_loss, group)
    return result


def attach_loss(model: PreTrainedModel, token_loss: TokenLoss | None = None,
                tensor: TensorParallel | None = None) -> None:
    """Teach a causal LM of transformers to return its summed loss: `model(..., targets=(index, labels))`.

    `index` [N] are the places of the flattened batch whose next token is predicted, `labels` [N] those
    tokens. `objective`: `train` takes `token_loss`, `likelihood` cross-entropy whatever that is, and `drawn`
    the cross-entropy of labels that the model itself draws, for which `labels` [N] holds the chances in [0, 1).
    `scores` is no loss: it gives each label's log-likelihood and whether it is the likeliest, 1 or 0, as one tensor
    [2, N].
    Called without `targets`, the model is as before. Being its own `forward`, the loss runs inside every wrapper's
    hooks (FSDP2, DDP, peft). `tensor` is what cut the model into pieces, if anything did.
    """
    original = model.forward
    transform = _logit_transform(model)

    def transformed(loss: TokenLoss | None) -> TokenLoss | None:
        if transform is None:
            return loss
        plain = loss or _cross_entropy
        return lambda logits, labels: plain(transform(logits), labels)

    losses = {"train": transformed(token_loss), "likelihood": transformed(None), "drawn": transformed(_drawn)}

    @functools.wraps(original)
    def forward(*args: Any, targets: tuple[Tensor, Tensor] | None = None, objective: Objective = "train",
                **kwargs: Any) -> Any:
        if targets is None:
            return original(*args, **kwargs)
        index, labels = targets
        hidden = model.base_model(*args, **kwargs)[0]
        head = model.get_output_embeddings()
        if head.weight is None:  # another stage of a pipeline has it, and the loss
            return hidden.new_zeros((2, len(labels)) if objective == "scores" else ())
        weight, bias, group = head.weight, head.bias, None
        if tensor is not None:
            hidden, weight, bias = tensor.whole_tokens(hidden), local_piece(weight), _local_bias(bias)
            group = tensor.group if tensor.cuts_vocabulary else None
        hidden_NC = hidden.flatten(0, 1).index_select(0, index)
        if objective == "scores":
            return _linear_scores(hidden_NC, weight, bias, labels, transform, group)
        return linear_loss(hidden_NC, weight, bias, labels, losses[objective], group)

    model.forward = forward


def attach_whole_loss(model: PreTrainedModel, token_loss: TokenLoss | None = None) -> None:
    """As `attach_loss`, for models whose logits only their own `forward` can make: it holds them whole."""
    original = model.forward
    losses = {"train": token_loss or _cross_entropy, "likelihood": _cross_entropy, "drawn": _drawn}

    @functools.wraps(original)
    def forward(*args: Any, targets: tuple[Tensor, Tensor] | None = None, objective: Objective = "train",
                **kwargs: Any) -> Any:
        if targets is None:
            return original(*args, **kwargs)
        index, labels = targets
        logits = original(*args, **kwargs).logits.flatten(0, 1).index_select(0, index).float()
        if objective == "scores":
            return _scores(logits, labels, None)
        return losses[objective](logits, labels).sum()

    model.forward = forward


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, labels_N: Tensor,
                token_loss: TokenLoss | None, group: dist.ProcessGroup | None) -> Tensor:
        device = hidden_NC.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VC.dtype
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), device=hidden_NC.device)
        d_hidden = torch.empty_like(hidden_NC) if need_hidden else None
        # fp32: a sum of many chunks would lose digits in bf16.
        d_weight = torch.zeros_like(weight_VC, dtype=torch.float32) if need_weight else None
        d_bias = torch.zeros_like(bias_V, dtype=torch.float32) if need_bias and bias_V is not None else None
        with torch.autocast(device, enabled=False):
            weight = weight_VC.to(compute)
            bias = None if bias_V is None else bias_V.to(compute)
            for begin, end in _chunks(len(labels_N), *weight.shape):
                hidden = hidden_NC[begin:end].to(compute)
                logits = F.linear(hidden, weight, bias).float()
                labels, differentiate = labels_N[begin:end], any(ctx.needs_input_grad[:3])
                if group is None:
                    loss, d_logits = _loss_and_gradient(logits, labels, token_loss, differentiate)
                elif token_loss is None:
                    loss, d_logits = _shared_loss_and_gradient(logits, labels, differentiate, group)
                else:  # any function wants a token's whole logits; those of a chunk are few
                    loss, d_whole = _loss_and_gradient(_gathered(logits, group), labels, token_loss, differentiate)
                    d_logits = None if d_whole is None else d_whole.chunk(group.size(), 1)[group.rank()]
                total += loss
                if d_logits is None:
                    continue
                d_logits = d_logits.to(compute)
                if d_hidden is not None:
                    d_hidden[begin:end] = d_logits @ weight
                if d_weight is not None:
                    _add_product(d_weight, d_logits, hidden)
                if d_bias is not None:
                    d_bias += d_logits.float().sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight_VC.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        scale, (weight_dtype, bias_dtype) = gradients[0], ctx.dtypes
        return (
            None if d_hidden is None else d_hidden.mul_(scale),
            None if d_weight is None else d_weight.mul_(scale).to(weight_dtype),
            None if d_bias is None else d_bias.mul_(scale).to(bias_dtype),
            None, None, None,
        )


def _chunks(tokens: int, vocabulary: int, hidden: int) -> list[tuple[int, int]]:
    """Chunks whose logits are about as large as all hidden states, or a small number of tokens."""
    size = max(_SMALLEST_CHUNK, math.ceil(tokens / math.ceil(vocabulary / hidden)))
    return [(begin, min(begin + size, tokens)) for begin in range(0, tokens, size)]


def _add_product(d_weight: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    if d_logits.dtype == d_weight.dtype:
        d_weight.addmm_(d_logits.T, hidden)
    else:
        d_weight += d_logits.T @ hidden


def _loss_and_gradient(logits: Tensor, labels: Tensor, token_loss: TokenLoss | None,
                       differentiate: bool) -> tuple[Tensor, Tensor | None]:
    """Summed loss and its gradient with respect to the logits [N, V]; the logits' memory is reused."""
    if token_loss is not None:
        with torch.set_grad_enabled(differentiate):
            logits.requires_grad_(differentiate)
            losses = token_loss(logits, labels)
            if losses.shape != labels.shape:
                raise ValueError(f"Training.loss gave shape {tuple(losses.shape)} for {len(labels)} tokens: it must "
                                 "give one loss a token, e.g. cross_entropy(..., reduction='none')")
            loss = losses.sum()
        return loss.detach(), torch.autograd.grad(loss, logits)[0] if differentiate else None
    log_sum = torch.logsumexp(logits, dim=1)
    chosen = logits.gather(1, labels[:, None])
    loss = log_sum.sum() - chosen.sum()
    if not differentiate:
        return loss, None
    probabilities = logits.sub_(log_sum[:, None]).exp_()
    return loss, probabilities.scatter_add_(1, labels[:, None], torch.full_like(chosen, -1.0))


def _shared_loss_and_gradient(logits: Tensor, labels: Tensor, differentiate: bool, group: dist.ProcessGroup
                              ) -> tuple[Tensor, Tensor | None]:
    """As `_loss_and_gradient` for cross-entropy, where each rank has the logits [N, V/ranks] of its rows only.

    Three numbers a token travel: the largest logit, the sum of the exponentials and the logit of the label
    (Shoeybi et al., arXiv 1909.08053, section 3).
    """
    rows = logits.shape[1]
    largest = logits.max(dim=1).values
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    places, here = _places(labels, rows, group)
    logits.sub_(largest[:, None])
    chosen = logits.gather(1, places)[:, 0] * here
    exponentials = logits.exp_()
    sums = torch.stack([exponentials.sum(1), chosen])
    dist.all_reduce(sums, group=group)
    loss = (sums[0].log() - sums[1]).sum()
    if not differentiate:
        return loss, None
    probabilities = exponentials.div_(sums[0][:, None])
    return loss, probabilities.scatter_add_(1, places, -here[:, None].to(probabilities.dtype))


@torch.no_grad()
def _linear_scores(hidden_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, labels_N: Tensor,
                   transform: Callable[[Tensor], Tensor] | None, group: dist.ProcessGroup | None) -> Tensor:
    """The log-likelihood of every label and whether it is the likeliest, [2, N]; the logits in chunks, in fp32."""
    device = hidden_NC.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VC.dtype
    found = []
    with torch.autocast(device, enabled=False):
        weight, bias = weight_VC.to(compute), None if bias_V is None else bias_V.to(compute)
        for begin, end in _chunks(len(labels_N), *weight.shape):
            logits = F.linear(hidden_NC[begin:end].to(compute), weight, bias).float()
            found.append(_scores(transform(logits) if transform else logits, labels_N[begin:end], group))
    return torch.cat(found, 1)


def _scores(logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """As `_linear_scores`, of the logits [N, V], or [N, V/ranks] of this rank's rows of the vocabulary."""
    largest = logits.max(dim=1).values
    if group is None:
        chosen = logits.gather(1, labels[:, None])[:, 0]
        return torch.stack([chosen - torch.logsumexp(logits, dim=1), (chosen >= largest).float()])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    places, here = _places(labels, logits.shape[1], group)
    sums = torch.stack([(logits - largest[:, None]).exp().sum(1), (logits.gather(1, places)[:, 0] - largest) * here])
    dist.all_reduce(sums, group=group)
    return torch.stack([sums[1] - sums[0].log(), (sums[1] >= 0).float()])


def _places(labels: Tensor, rows: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The labels' places [N, 1] among this rank's rows of the vocabulary, and which of them are there."""
    places = labels - group.rank() * rows
    here = (places >= 0) & (places < rows)
    return places.masked_fill(~here, 0)[:, None], here


def _gathered(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    pieces = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(pieces, logits.contiguous(), group=group)
    return torch.cat(pieces, 1)


def _local_bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else local_piece(bias)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _drawn(logits_NV: Tensor, chances_N: Tensor) -> Tensor:
    """Cross-entropy of labels drawn from the logits: those at which the summed probability passes the chance."""
    with torch.no_grad():
        summed = torch.softmax(logits_NV, dim=1).cumsum(1)
        labels = torch.searchsorted(summed, chances_N[:, None] * summed[:, -1:], right=True)
        labels = labels[:, 0].clamp(max=logits_NV.shape[1] - 1)
    return _cross_entropy(logits_NV, labels)


def _logit_transform(model: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
    """What some families do to their logits after the head: Gemma caps, Granite divides, Cohere multiplies."""
    config = model.config.get_text_config()
    if cap := getattr(config, "final_logit_softcapping", None):
        return lambda logits: cap * torch.tanh(logits / cap)
    if divisor := getattr(config, "logits_scaling", None):
        return lambda logits: logits / divisor
    if factor := getattr(config, "logit_scale", None):
        return lambda logits: logits * factor
    return None
