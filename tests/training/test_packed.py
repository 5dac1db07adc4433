"""Packed batches against the model on each document alone: no leak, no shift, the same loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import AutoConfig, AutoModelForCausalLM

from collie_lab.cells import SHAPES, Experiment, Model, Training
from collie_lab.data import Documents
from collie_lab.training.batch import collate
from collie_lab.training.model import build_model
from collie_lab.training.probe import Path, find_path

CPU = torch.device("cpu")


def _documents(lengths: list[int], vocabulary: int = 300, learned_share: float = 0.6) -> Documents:
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    learned = rng.random(offsets[-1]) < learned_share
    learned[offsets[:-1]] = False
    learned[offsets[1:] - 1] = True
    tokens = rng.integers(0, vocabulary, offsets[-1]).astype(np.int32)
    return Documents(tokens, learned, offsets, np.zeros(0, dtype=np.int64))


def _reference(model: torch.nn.Module, documents: Documents) -> torch.Tensor:
    """Summed cross-entropy of transformers' own logits, one document at a time."""
    total = torch.zeros(())
    for index in range(len(documents)):
        part = slice(documents.offsets[index], documents.offsets[index + 1])
        tokens = torch.from_numpy(documents.tokens[part].astype(np.int64))
        labels = tokens.where(torch.from_numpy(documents.learned[part]), torch.tensor(-100))
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        total = total + F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    return total


FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 16},
    "qwen2": {"num_key_value_heads": 2},
    "gpt_neox": {},
    "gpt2": {},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 16},
    "phi3": {"pad_token_id": 0},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 4.0},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.25},
    "nemotron": {"num_key_value_heads": 2},  # its layers do not hand on what packed attention needs
    "gpt_oss": {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},  # sinks
    "recurrent_gemma": {"lru_width": 64, "num_key_value_heads": 1},  # a state, and capped logits
    "mamba": {"state_size": 8},  # no heads
}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_documents_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "vocab_size": 300, "max_position_embeddings": 128, **FAMILIES[family]}
    if family == "mamba":
        del shape["num_attention_heads"]
    if family == "gpt2":
        shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 128}
    monkeypatch.setitem(SHAPES, "test", {"model_type": family, **shape})
    model, *_ = build_model(Experiment(model=Model("test", init="random")), CPU)
    model.eval()
    documents = _documents([40, 3, 17, 64, 18, 2, 41])
    flat = model.config._attn_implementation == "collie_packed"
    padded = ("gemma2", "nemotron", "gpt_oss", "recurrent_gemma", "mamba")
    assert flat == (family not in padded)
    batch = collate(documents, np.arange(len(documents)), CPU, flat=flat)
    loss = model(**batch.inputs)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape), dtype=torch.float32,
                                             attn_implementation="eager").eval()
    plain.load_state_dict(model.state_dict())
    expected = _reference(plain, documents)
    expected.backward()
    count = int(documents.learned.sum())
    assert loss.item() / count == pytest.approx(expected.item() / count, abs=1e-5)
    assert found.keys() == {name for name, parameter in plain.named_parameters() if parameter.grad is not None}
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-4)


def test_a_document_does_not_see_its_neighbours() -> None:
    model, *_ = build_model(Experiment(model=Model("llama-tiny", init="random")), CPU)
    a, b = _documents([30, 25, 20]), _documents([30, 25, 20])  # longest first, as a batch has them
    b.tokens[30:55] = 7  # another middle document
    outputs = []
    for documents in (a, b):
        batch = collate(documents, np.arange(3), CPU, flat=True)
        inputs = {key: value for key, value in batch.inputs.items() if key != "targets"}
        outputs.append(model(**inputs).logits[0])
    same = torch.cat([torch.arange(30), torch.arange(55, 75)])
    torch.testing.assert_close(outputs[0][same], outputs[1][same], atol=1e-6, rtol=0)
    assert not torch.allclose(outputs[0][30:55], outputs[1][30:55])


def test_a_model_that_sees_what_it_is_to_predict_is_refused() -> None:
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "vocab_size": 320}
    sees = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **fields))
    with pytest.raises(ValueError, match=r'depends on later ones.*config=\{"is_decoder": True\}'):
        find_path(sees, packing=False)
    decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", is_decoder=True, **fields))
    assert find_path(decoder, packing=False) == Path(flat=False, whole_logits=True)


def test_padded_and_flat_batches_give_the_same_loss() -> None:
    model, *_ = build_model(Experiment(model=Model("llama-tiny", init="random")), CPU)
    documents = _documents([20, 30, 25])
    flat = model(**collate(documents, np.arange(3), CPU, flat=True).inputs)
    model.set_attn_implementation("sdpa")
    padded = model(**collate(documents, np.arange(3), CPU, flat=False).inputs)
    assert flat.item() == pytest.approx(padded.item(), abs=1e-4)


def test_recomputation_gives_the_same_gradients() -> None:
    gradients = []
    for recompute in ("none", "full"):
        model, *_ = build_model(Experiment(model=Model("llama-tiny", init="random"),
                                          training=Training(recompute=recompute)), CPU)
        model.train()
        model(**collate(_documents([20, 30, 25]), np.arange(3), CPU, flat=True).inputs).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)
