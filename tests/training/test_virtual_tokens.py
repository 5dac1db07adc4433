"""Prompt, P-tuning and prefix: packed and padded documents as peft has each of them alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import collie_lab as lab
from collie_lab.cells import VirtualTokens
from collie_lab.data import Documents, Tokenizer
from collie_lab.folder import RunFolder, read_json
from collie_lab.training.batch import collate
from collie_lab.training.generate import generate
from collie_lab.training.model import build_model
from collie_lab.training.virtual import attach_virtual_tokens
from tests.ranks import losses, run_here, run_ranks

CPU = torch.device("cpu")
BASE = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), data=lab.Skills(size=60, test_size=10, packing=True, max_length=96),
    optimizer=lab.AdamW(lr=1e-2), training=lab.Training(steps=4, batch_size=4, export=False),
)
CELLS: dict[str, VirtualTokens] = {
    "prompt": lab.Prompt(tokens=5), "ptuning": lab.PTuning(tokens=5, hidden=16), "prefix": lab.Prefix(tokens=5),
    "projected": lab.Prefix(tokens=5, projection=True, hidden=16),
}


def _documents(lengths: list[int]) -> Documents:
    offsets, draw = np.concatenate([[0], np.cumsum(lengths)]), np.random.default_rng(0)
    learned = draw.random(offsets[-1]) < 0.7
    learned[offsets[:-1]] = False
    return Documents(draw.integers(0, 300, offsets[-1]).astype(np.int32), learned, offsets, np.array([], np.int64))


def _gradients(root: Any, loss: Tensor) -> dict[str, Tensor]:
    root.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in root.named_parameters() if parameter.requires_grad}


def _of_peft(root: Any, documents: Documents) -> Tensor:
    """The summed loss by peft's own forward, document by document."""
    total = torch.zeros(())
    for begin, end in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
        ids = torch.from_numpy(documents.tokens[begin:end].astype(np.int64))[None]
        labels = ids.masked_fill(~torch.from_numpy(documents.learned[begin:end]), -100)
        if (labels >= 0).any():  # else the mean of nothing
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            total = total + type(root).forward(root, **inputs).loss * (labels >= 0).sum()
    return total


@pytest.mark.parametrize(("family", "name"), [*(("llama", name) for name in CELLS), ("gpt2", "prompt"),
                                              ("gpt2", "prefix"), ("mistral", "prefix"), ("gpt_bigcode", "prefix"),
                                              ("falcon", "prefix")])
def test_loss_and_gradients_are_those_of_peft_on_each_document_alone(family: str, name: str, tmp_path: Path) -> None:
    shapes: dict[str, Any] = {
        "llama": lab.Model("llama-tiny", init="random", config={"num_key_value_heads": 2}),
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 320, "resid_pdrop": 0, "embd_pdrop": 0,
                 "attn_pdrop": 0, "n_positions": 64},
        "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 320, "resid_pdrop": 0, "embd_pdrop": 0,
                        "attn_pdrop": 0, "n_positions": 64, "multi_query": True},
        "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320},
        "mistral": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                    "intermediate_size": 64, "vocab_size": 320, "sliding_window": 12},
    }
    model = shapes[family]
    if isinstance(model, dict):
        from transformers import AutoConfig

        AutoConfig.for_model(family, **model).save_pretrained(tmp_path)
        model = lab.Model(tmp_path, init="random")
    documents, cell = _documents([20, 30, 25, 30, 7, 2]), CELLS[name]
    root: Any = build_model(lab.Experiment(model=model, adapter=cell), CPU).root.train()
    found = {}
    for flat in (True, False) if family != "falcon" else (False,):  # its attention takes padded rows alone
        if not flat:
            root.get_base_model().set_attn_implementation("sdpa")
        batch = collate(documents, np.arange(6), CPU, flat=flat, virtual=cell)
        assert batch.tokens == 114
        loss = root(**batch.inputs)
        found[flat] = (loss.detach(), _gradients(root, loss))
    expected = _of_peft(root, documents)
    gradients = _gradients(root, expected)
    for loss, ours in found.values():
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
        assert ours.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=2e-5 * gradient.abs().max().item(), msg=key)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_recomputation_changes_nothing(name: str) -> None:
    documents, cell = _documents([20, 12]), CELLS[name]
    gradients = []
    for recompute in ("none", "full"):
        training = lab.Training(recompute=recompute)
        root = build_model(BASE.replace(adapter=cell, training=training), CPU).root.train()
        batch = collate(documents, np.arange(2), CPU, flat=True, virtual=cell)
        gradients.append(_gradients(root, root(**batch.inputs)))
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key


@pytest.mark.parametrize("name", CELLS)
def test_an_export_gives_the_same_logits_and_answers(name: str, tmp_path: Path) -> None:
    """By `PeftModel.from_pretrained`, greedy token by token; and answers do not depend on the prompts beside them."""
    experiment = BASE.replace(adapter=CELLS[name], evaluate=(lab.Perplexity(), lab.ExactMatch(max_new_tokens=3)))
    run = run_here(experiment.with_("training.export", True).with_("optimizer.lr", 0.1), tmp_path / "run")
    assert read_json(run.path / "result.json")["trainable"] == sum(
        each.numel() for each in build_model(experiment, CPU).root.parameters() if each.requires_grad)
    build_model(BASE, CPU).causal_lm.save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), run.path / "model").eval()
    tokenizer = Tokenizer(run.path / "tokenizer")
    prompts = [np.array(tokenizer.encode([text])[0], np.int32) for text in ("ab", "a longer question")]
    answers = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.from_numpy(prompt.astype(np.int64))[None]
            assert (loaded(input_ids=ids).logits[:, -1] - plain(input_ids=ids).logits[:, -1]).abs().max() > 1e-3
            for _ in range(8):
                chosen = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].argmax(-1)
                ids = torch.cat([ids, chosen[None]], 1)
            answers.append(ids[0, len(prompt):].tolist())
        expected = [tokenizer.decode(ids[:ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids)
                    for ids in answers]
        assert generate(loaded, prompts, tokenizer, CPU, 8) == expected


def test_a_prompt_begins_as_a_text_or_as_words() -> None:
    words = build_model(BASE, CPU).causal_lm.get_input_embeddings().weight
    root: Any = build_model(BASE.replace(adapter=lab.Prompt(tokens=7)), CPU).root
    prompt = root.prompt_encoder["default"].embedding.weight
    assert all((row == words).all(1).any() for row in prompt)


def test_documents_leave_room_for_virtual_tokens(tmp_path: Path) -> None:
    data = lab.RandomTokens(length=507, documents=4)
    run_here(BASE.replace(adapter=lab.Prompt(tokens=5, text="ab"), data=data), tmp_path / "run")
    problems = BASE.replace(adapter=lab.Prompt(tokens=5), data=data.replace(max_length=508)).check().errors
    assert [problem.field for problem in problems] == ["max_length"]
    assert "beside 5 virtual tokens" in str(problems[0])


@pytest.mark.parametrize("tokens", [511, 512, 5000])
def test_virtual_tokens_that_fill_the_context_are_refused(tokens: int) -> None:
    experiment = BASE.replace(adapter=lab.Prompt(tokens=tokens), evaluate=[lab.ExactMatch()],
                              data=lab.Skills(size=20, test_size=4, max_length=64))
    (problem,) = experiment.check().errors
    assert str(problem) == f"Prompt.tokens: {tokens} leave nothing of the model's context of 512 for a document → fewer"


def test_what_virtual_tokens_cannot_do_is_refused() -> None:
    changes: dict[str, dict[str, Any]] = {
        "pp": {"parallel": lab.Parallel(pp=2)}, "tp": {"parallel": lab.Parallel(tp=2)},
        "optimizer": {"optimizer": lab.Muon()}}
    for field, change in changes.items():
        for cell in CELLS.values():
            (problem,) = BASE.replace(adapter=cell, **change).check().errors
            assert problem.field == field
    with pytest.raises(ValueError, match="takes a prefix only as a cache"):
        root: Any = build_model(BASE.replace(adapter=CELLS["prefix"]), CPU).root
        attach_virtual_tokens(root, CELLS["prefix"], flat=False, recompute=True)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_an_update_in_backward_is_the_usual_one(name: str, tmp_path: Path) -> None:
    experiment = BASE.replace(adapter=CELLS[name])
    curves = [losses(run_here(experiment.with_("optimizer.in_backward", flag), tmp_path / str(flag)))
              for flag in (True, False)]
    assert curves[0] == curves[1]


LAYOUTS = {"dp": lab.Parallel(dp=2), "zero3": lab.Parallel(dp=2, zero=3)}


def _all_curves(folder: Path) -> None:
    for name, adapter in CELLS.items():
        for layout, parallel in LAYOUTS.items():
            training = BASE.training.replace(export=layout == "zero3", micro_batch_size=1)
            evaluate = (lab.ExactMatch(max_new_tokens=3),) if layout == "zero3" else ()
            run_here(BASE.replace(adapter=adapter, parallel=parallel, training=training, evaluate=evaluate),
                     folder / f"{name}-{layout}")


@pytest.mark.ranks
def test_two_ranks_give_the_curve_of_one(tmp_path: Path) -> None:
    run_ranks(_all_curves, 2, tmp_path)
    for name, adapter in CELLS.items():
        experiment = BASE.replace(adapter=adapter, training=BASE.training.replace(export=True, checkpoint_every=2))
        one = run_here(experiment, tmp_path / f"{name}-one")
        for layout in LAYOUTS:
            two = RunFolder(tmp_path / f"{name}-{layout}")
            assert losses(two) == pytest.approx(losses(one), abs=1e-5), (name, layout)
        if name in ("ptuning", "prefix"):
            resumed = run_here(experiment, tmp_path / f"{name}-resumed", resume=next(one.checkpoints.glob("*2")))
            assert losses(resumed) == losses(one)[2:]
