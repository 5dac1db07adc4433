"""A model family is believed only after a try: two documents in one batch against each of them alone, and what is
predicted of a token whatever comes after it.

Families differ in ways that no attribute tells: attention that keeps a state or sinks, arguments that a layer
does not pass on, logits that are capped at the end. A difference is found here, before training, not in a paper. What
is tried is a miniature: a few layers of the family, with every option of its configuration and random weights.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import PreTrainedModel

from collie_lab.data import Documents
from collie_lab.training.batch import collate
from collie_lab.training.loss import attach_loss, attach_whole_loss
from collie_lab.training.packed import ATTENTION, supports_packed_attention

__all__ = ["ModelWarning", "Path", "find_path", "model_warnings"]

_VOCABULARY = 512
_LENGTHS = (48, 31)
_TOLERANCE = 1e-3  # of the logits, in their standard deviations
_LOSS_TOLERANCE = 2e-5  # a soft cap far above small logits moves the loss by little


class ModelWarning(UserWarning):
    """A model needs a slower way than most."""


@contextlib.contextmanager
def model_warnings(tell: Callable[[str], None]) -> Iterator[None]:
    """Within it, the texts of such warnings are gathered, and told at its end; others are given then as they came."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ModelWarning)
            yield
    finally:
        for warning in caught:
            if issubclass(warning.category, ModelWarning):
                tell(str(warning.message))
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class Path(NamedTuple):
    """The fastest way to a model's loss that is right."""

    flat: bool
    """All documents of a micro-batch in one row, attention by document; else padded rows."""
    whole_logits: bool
    """The loss needs the model's own logits, whole."""


def find_path(model: PreTrainedModel, packing: bool) -> Path:
    """Try the ways, fastest first. What has to be given up is said in a warning.

    Raises:
        ValueError: none of them is right, or the model sees the tokens that it is to predict.
    """
    family = model.config.model_type
    path = _first_right(model)
    gc.collect()  # the miniature refers to itself; its memory must not count as the model's
    if path is None:
        raise ValueError(f"{family}: the loss of a batch differs from that of its documents alone; "
                         "this model family cannot be trained here yet")
    if path.whole_logits:
        warnings.warn(f"{family} makes its logits in a way of its own: the loss holds them whole", ModelWarning, 2)
    if packing and not path.flat:
        warnings.warn(f"{family} does not keep packed documents apart: a sequence's documents go into rows of their "
                      "own, padded", ModelWarning, 2)
    return path


def _first_right(model: PreTrainedModel) -> Path | None:
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        small = _miniature(model)
    if not _is_causal(small):
        is_switch = getattr(model.config, "is_decoder", None) is False
        remedy = ': Model(..., config={"is_decoder": True})' if is_switch else ""
        raise ValueError(f"{model.config.model_type}: what is predicted of a token depends on later ones; this is no "
                         f"causal language model{remedy}")
    reference, plain, attention = _reference(small), small.forward, small.config._attn_implementation
    attach_loss(small)
    if supports_packed_attention(small):
        small.set_attn_implementation(ATTENTION)
        if _is_right(small, reference, flat=True):
            return Path(flat=True, whole_logits=False)
        small.set_attn_implementation(attention)
    if _is_right(small, reference, flat=False):
        return Path(flat=False, whole_logits=False)
    small.forward = plain
    attach_whole_loss(small)
    return Path(flat=False, whole_logits=True) if _is_right(small, reference, flat=False) else None


def _miniature(model: PreTrainedModel) -> PreTrainedModel:
    """A small model of the same class and options: few layers, of every kind there is, and few heads."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    layers, kinds = text.num_hidden_layers, getattr(text, "layer_types", None) or []
    few = max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])
    if few < layers:
        for name, value in vars(text).items():
            if isinstance(value, list) and len(value) == layers:
                setattr(text, name, value[:few])
        text.num_hidden_layers = few
    _shrink(text)
    try:
        small = type(model)._from_config(config, dtype=torch.float32, attn_implementation=None)
    except Exception:  # a configuration with fields that depend on each other: its own sizes then
        config = copy.deepcopy(model.config)
        small = type(model)._from_config(config, dtype=torch.float32, attn_implementation=None)
    with torch.no_grad():  # far enough from zero that caps and divisors show
        small.get_output_embeddings().weight.mul_(4)
    return small


def _shrink(text: Any) -> None:
    """Fewer heads of the same size, where there are any, and a smaller vocabulary."""
    if heads := getattr(text, "num_attention_heads", None):  # a state space has none
        width = text.hidden_size // heads
        keys = getattr(text, "num_key_value_heads", None)
        text.num_attention_heads = small = min(heads, 4)
        if keys:
            text.num_key_value_heads = small if keys == heads else min(keys, 2) if small % min(keys, 2) == 0 else 1
        text.hidden_size = small * width
    text.vocab_size = min(text.vocab_size, _VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, 0)


@torch.no_grad()
def _is_causal(model: PreTrainedModel) -> bool:
    """Whether the first half of a document has the same logits whatever the second."""
    model.eval()
    ids = torch.from_numpy(_documents(model).tokens[:_LENGTHS[0]].astype(np.int64))
    half, vocabulary = len(ids) // 2, model.get_input_embeddings().weight.shape[0]
    other = torch.cat([ids[:half], (ids[half:] + 1) % vocabulary])
    first, second = (model(input_ids=each[None], use_cache=False).logits[0, :half].float() for each in (ids, other))
    return bool((first - second).abs().max() <= _TOLERANCE * first.std())


@torch.no_grad()
def _reference(model: PreTrainedModel) -> Tensor:
    """Logits [T, V] of two short documents, each alone, by the model's own `forward` and eager attention."""
    attention = model.config._attn_implementation
    model.eval()
    with contextlib.suppress(ValueError):  # a model without another attention than its own
        model.set_attn_implementation("eager")
    documents = _documents(model)
    ids = torch.from_numpy(documents.tokens.astype(np.int64))
    logits = [model(input_ids=part[None], use_cache=False).logits[0].float() for part in ids.split(_LENGTHS)]
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
    return torch.cat(logits)


@torch.no_grad()
def _is_right(model: PreTrainedModel, reference_TV: Tensor, *, flat: bool) -> bool:
    """Whether a batch of both documents gives the reference's logits, and their mean cross-entropy as its loss."""
    documents = _documents(model)
    inputs = collate(documents, np.arange(len(documents)), model.device, flat=flat).inputs
    try:
        loss = float(model(**inputs, objective="likelihood")) / len(inputs["targets"][1])
        logits = model(**{name: value for name, value in inputs.items() if name != "targets"}).logits.float()
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # e.g. a model without the arguments of a flat batch
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
