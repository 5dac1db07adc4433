"""A model is believed only after a try: two documents in one batch against each of them alone.

Families differ in ways that no attribute tells: attention that keeps a state or sinks, arguments that a layer
does not pass on, logits that are capped at the end. A difference is found here, before training, not in a paper.
"""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import PreTrainedModel

from collie_lab.data import Documents
from collie_lab.training.batch import collate
from collie_lab.training.loss import attach_whole_loss
from collie_lab.training.packed import ATTENTION

__all__ = ["ModelWarning", "choose_path", "probe"]

_LENGTHS = (48, 31)
_TOLERANCE = 1e-3  # of the logits, in their standard deviations
_LOSS_TOLERANCE = 2e-5  # a soft cap far above small logits moves the loss by little


class ModelWarning(UserWarning):
    """A model needs a slower way than most."""


@torch.no_grad()
def probe(model: PreTrainedModel) -> Tensor:
    """Logits [T, V] of two short documents, each alone, by the model's own `forward` and eager attention."""
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    with contextlib.suppress(ValueError):  # a model without another attention than its own
        model.set_attn_implementation("eager")
    documents = _documents(model)
    ids = torch.from_numpy(documents.tokens.astype(np.int64)).to(model.device)
    logits = [model(input_ids=part[None], use_cache=False).logits[0].float() for part in ids.split(_LENGTHS)]
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
    model.train(was_training)
    return torch.cat(logits)


def choose_path(model: PreTrainedModel, reference: Tensor, packing: bool) -> None:
    """Leave the model on the fastest way to its loss that is right.

    Flat batches with attention by document; else padded rows with the model's own attention; else whole
    logits too. What had to be given up is said in a warning.

    Raises:
        ValueError: none of them gives the reference.
    """
    if model.config._attn_implementation == ATTENTION:
        if _is_right(model, reference, flat=True):
            return
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    family = model.config.model_type
    if not _is_right(model, reference, flat=False):
        attach_whole_loss(model)
        if not _is_right(model, reference, flat=False):
            raise ValueError(f"{family}: the loss of a batch differs from that of its documents alone; "
                             "this model family cannot be trained here yet")
        warnings.warn(f"{family} makes its logits in a way of its own: the loss holds them whole", ModelWarning, 2)
    if packing:
        warnings.warn(f"{family} does not keep packed documents apart: a sequence's documents go into rows of their "
                      "own, padded", ModelWarning, 2)


@torch.no_grad()
def _is_right(model: PreTrainedModel, reference_TV: Tensor, *, flat: bool) -> bool:
    """Whether a batch of both documents gives the reference's logits, and their mean cross-entropy as its loss."""
    was_training = model.training
    model.eval()
    documents = _documents(model)
    inputs = collate(documents, np.arange(len(documents)), model.device, flat=flat).inputs
    try:
        loss = float(model(**inputs, objective="likelihood")) / len(inputs["targets"][1])
        logits = model(**{name: value for name, value in inputs.items() if name != "targets"}).logits.float()
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # e.g. a model without the arguments of a flat batch
    finally:
        model.train(was_training)
    logits_TV = logits[0] if flat else torch.cat([row[:length] for row, length in zip(logits, _LENGTHS, strict=True)])
    labels = torch.from_numpy(documents.tokens.astype(np.int64)).to(model.device)
    expected = sum(F.cross_entropy(part[:-1], ids[1:], reduction="sum").item() for part, ids in zip(
        reference_TV.split(_LENGTHS), labels.split(_LENGTHS), strict=True))
    same_logits = (logits_TV - reference_TV).abs().max() <= _TOLERANCE * reference_TV.std()
    same_loss = abs(loss - expected / len(inputs["targets"][1])) <= _LOSS_TOLERANCE
    return bool(same_logits) and same_loss


def _documents(model: PreTrainedModel) -> Documents:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    offsets = np.concatenate([[0], np.cumsum(_LENGTHS)])
    tokens = np.random.default_rng(0).integers(0, vocabulary, offsets[-1]).astype(np.int32)
    learned = np.ones(len(tokens), dtype=np.bool_)
    learned[offsets[:-1]] = False
    return Documents(tokens, learned, offsets, np.zeros(0, dtype=np.int64))
