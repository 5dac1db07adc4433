"""The evaluations on real models and text, against published and hand-made references."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from collie_lab import AdamW, ExactMatch, Experiment, Model, Perplexity, Skills, Text, Training
from collie_lab.cells import Parallel
from collie_lab.data import Documents, Tokenizer, read_documents, save_tokenizer
from collie_lab.data.prepare import tokenize
from collie_lab.parallel import Strategy
from collie_lab.training.evaluate import evaluate
from collie_lab.training.generate import generate
from collie_lab.training.model import build_model
from tests.ranks import run_here

CPU = torch.device("cpu")


def test_stories260k_has_its_known_likelihood(shared: Path, tmp_path: Path) -> None:
    """1.505 nats a token on the first 10,240 tokens of the validation text, in windows of 256 after <s>."""
    cell = Model(shared / "models/stories260k")
    tokenizer = save_tokenizer(cell, tmp_path)
    text = Text(shared / "data/tinystories/val.txt", holdout=0)
    windows, _ = tokenize(read_documents(text, "all"), tokenizer, 257, "split")
    first = Documents(windows.tokens[: 40 * 257], windows.learned[: 40 * 257], windows.offsets[:41], np.zeros(0, int))
    assert first.targets.sum() == 10_240
    model, *_ = build_model(Experiment(model=cell), CPU)
    found = evaluate(Perplexity(), model, first, tokenizer, Strategy(Parallel(), CPU, "fp32"), flat=True)
    assert found["nll"] == pytest.approx(1.505, abs=5e-4)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    half = evaluate(Perplexity(limit=20, name="half"), model, first, tokenizer, Strategy(Parallel(), CPU, "fp32"),
                    flat=True)
    assert half["half_nll"] == pytest.approx(1.505, abs=0.1)


def test_bits_per_byte_are_those_of_transformers(shared: Path, tmp_path: Path) -> None:
    cell = Model(shared / "models/stories260k")
    texts = ["Once upon a time, there was a thère 🐶. " * 3, "She said:\n\"No.\"", "日本"]
    tokenizer = save_tokenizer(cell, tmp_path)
    documents, _ = tokenize(read_documents(Text(texts), "all"), tokenizer, 32, "split", measured=True)
    reference, nats = AutoModelForCausalLM.from_pretrained(cell.source), 0.0
    own = AutoTokenizer.from_pretrained(cell.source)
    for text in texts:
        ids = [*own(text, add_special_tokens=False)["input_ids"], 2]
        for start in range(0, len(ids), 31):
            window = torch.tensor([[1, *ids[start : start + 31]]])
            with torch.no_grad():
                nats += float(reference(window, labels=window).loss) * (window.shape[1] - 1)
    model, *_ = build_model(Experiment(model=cell), CPU)
    found = evaluate(Perplexity(), model, documents, tokenizer, Strategy(Parallel(), CPU, "fp32"), flat=True)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len("".join(texts).encode()), rel=1e-5)


def test_stories260k_tells_its_known_story(shared: Path, tmp_path: Path) -> None:
    cell = Model(str(shared / "models/stories260k"))
    tokenizer = save_tokenizer(cell, tmp_path)
    model, *_ = build_model(Experiment(model=cell), CPU)
    model.eval()
    opening = tokenizer.encode(["Once upon a time, there"])[0]
    prompts = [np.array(tokenizer.prefix), np.array(tokenizer.prefix + opening)]
    with torch.no_grad():
        first, second = generate(model, prompts, tokenizer, CPU, 40)
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert first.startswith(story)
    assert ("Once upon a time, there" + " " + second.strip()).startswith(story)  # padding on the left changes nothing


def test_exact_match_counts_every_document_once(tmp_path: Path) -> None:
    cell = Model("llama-tiny", init="random")
    tokenizer = save_tokenizer(cell, tmp_path)
    model, *_ = build_model(Experiment(model=cell), CPU)
    prompts = [tokenizer.prefix + tokenizer.encode([text])[0] for text in ("copy ab\n", "add 1 and 2\n", "x\n")]
    answers = generate(model.eval(), [np.array(prompt) for prompt in prompts], tokenizer, CPU, 8)
    offsets = np.concatenate([[0], np.cumsum([len(prompt) + 1 for prompt in prompts])])
    tokens = np.array([token for prompt in prompts for token in [*prompt, 0]], dtype=np.int32)
    documents = Documents(tokens, np.ones(len(tokens), dtype=np.bool_), offsets,
                          np.array([len(prompt) for prompt in prompts]), (answers[0], "no", answers[2]))
    alone = Strategy(Parallel(), CPU, "fp32")
    found = evaluate(ExactMatch(max_new_tokens=8, batch_size=2), model, documents, tokenizer, alone, flat=True)
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert found["exact_match_se"] == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))
    half = ExactMatch(max_new_tokens=8, score=lambda answer, reference: 0.5)
    assert evaluate(half, model, documents, tokenizer, alone, flat=True)["exact_match"] == 0.5


def test_exported_model_gives_the_same_logits(tmp_path: Path) -> None:
    experiment = Experiment(model=Model("llama-tiny", init="random"), data=Skills(size=40, test_size=10),
                            optimizer=AdamW(lr=1e-3), training=Training(steps=2, batch_size=4))
    models = []
    run = run_here(experiment.replace(callbacks=(lambda trainer: models.append(trainer.model),)), tmp_path / "run")
    loaded = AutoModelForCausalLM.from_pretrained(run.path / "model").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = models[0].eval()(input_ids=ids, position_ids=ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=0)
    assert Tokenizer(run.path / "model").encode(["a"]) == Tokenizer(run.path / "tokenizer").encode(["a"])
