"""The chunked loss against torch's cross-entropy on full logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from collie_lab.data import Documents
from collie_lab.training import loss as module
from collie_lab.training.batch import collate
from collie_lab.training.loss import _drawn, linear_loss


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("custom", [False, True])
def test_value_and_gradients(bias: bool, custom: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALLEST_CHUNK", 7)  # several chunks, the last one ragged
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16, dtype=torch.float64), torch.randn(40, 16, dtype=torch.float64)
    offset = torch.randn(40, dtype=torch.float64) if bias else None
    labels = torch.randint(0, 40, (50,))
    token_loss = (lambda logits, labels: F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)) \
        if custom else None

    def gradients(total: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(total * 0.5, [x for x in (h, w, o) if x is not None]))

    h, w = hidden.float().requires_grad_(), weight.float().requires_grad_()
    o = None if offset is None else offset.float().requires_grad_()
    value = linear_loss(h, w, o, labels, token_loss)
    found = gradients(value)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    o = None if offset is None else offset.requires_grad_()
    expected = F.cross_entropy(F.linear(h, w, o), labels, reduction="sum", label_smoothing=0.1 if custom else 0.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, two in zip(found, gradients(expected), strict=True):
        torch.testing.assert_close(one, two.float(), atol=1e-5, rtol=1e-5)


def test_a_custom_loss_must_give_one_loss_a_token() -> None:
    with pytest.raises(ValueError, match="one loss a token"):
        linear_loss(torch.randn(5, 8), torch.randn(12, 8), None, torch.randint(0, 12, (5,)), F.cross_entropy)


def test_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(12, 8)
    linear_loss(hidden, weight, None, torch.randint(0, 12, (5,))).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_a_bias_may_be_all_that_is_trained() -> None:
    hidden, weight, bias = torch.randn(5, 8), torch.randn(12, 8), torch.zeros(12, requires_grad=True)
    labels = torch.randint(0, 12, (5,))
    linear_loss(hidden, weight, bias, labels).backward()
    expected = torch.softmax(hidden @ weight.T, -1).sum(0) - F.one_hot(labels, 12).sum(0)
    torch.testing.assert_close(bias.grad, expected)


def test_no_full_logits_are_held() -> None:
    """The largest allocation is a chunk of logits, not tokens × vocabulary."""
    tokens, hidden_size, vocabulary = 8192, 32, 4096
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        linear_loss(hidden, weight, None, labels).backward()
    sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(sizes) <= 1024 * vocabulary * 4


def test_drawn_labels_follow_the_models_own_probabilities() -> None:
    """Sophia's Hessian needs labels from the model: their frequencies are the softmax of the logits."""
    torch.manual_seed(0)
    logits = torch.randn(1, 7) * 2
    chances = torch.linspace(0, 1, 10_001)[:-1]  # all chances, once
    repeated = logits.expand(len(chances), -1)
    losses = _drawn(repeated, chances)
    by_label = -torch.log_softmax(logits, 1)[0]
    drawn = (losses[:, None] - by_label).abs().argmin(1)
    frequencies = torch.bincount(drawn, minlength=7) / len(chances)
    torch.testing.assert_close(frequencies, torch.softmax(logits, 1)[0], atol=2e-4, rtol=0)
    torch.testing.assert_close(losses, by_label[drawn])


def test_chances_belong_to_documents_not_to_batches() -> None:
    offsets = np.array([0, 5, 9, 16])
    documents = Documents(np.arange(16, dtype=np.int32), np.ones(16, dtype=np.bool_), offsets, np.zeros(0, np.int64))
    device = torch.device("cpu")
    alone = {index: collate(documents, np.array([index]), device, flat=True, draw=(3, 1)).inputs["targets"][1]
             for index in range(3)}
    together = collate(documents, np.array([1, 0, 2]), device, flat=True, draw=(3, 1)).inputs["targets"][1]
    assert torch.equal(together, torch.cat([alone[2], alone[0], alone[1]]))  # longest first
    assert not torch.equal(alone[0], collate(documents, np.array([0]), device, flat=True,
                                             draw=(3, 2)).inputs["targets"][1])
