"""Rows of new tokens: against means by hand, one layout against another, and through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from collie_lab import AdamW, Experiment, ExtendTokenizer, Freeze, Model, Parallel, Text, Training, TrainTokenizer
from collie_lab.data import Extension
from collie_lab.folder import read_json
from collie_lab.parallel import build_strategy
from collie_lab.training.model import build_model
from collie_lab.training.probe import ModelWarning
from tests.ranks import run_here, run_ranks

CPU = torch.device("cpu")
# Two rows that are for no token, three new tokens, and rows up to a multiple of 4.
EXTENSION = Extension(first=62, pieces=((1, 2, 3), (), (61, 5)), rows_before=64, rows=68)
STORIES = Text([f"One day, Lily number {n} went to the zebra park." for n in range(40)], max_length=64)
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                         "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}


def _saved(folder: Path, family: str = "llama", **fields: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **fields))
    model.save_pretrained(folder)
    return model


def _built(folder: Path, parallel: Parallel | None = None) -> PreTrainedModel:
    strategy = None if parallel is None else build_strategy(parallel, CPU, "fp32")
    return build_model(Experiment(model=Model(folder), data=STORIES), CPU, strategy, EXTENSION).causal_lm


def _extended(old: torch.Tensor) -> torch.Tensor:
    """By hand."""
    mean = old[:62].mean(0)
    rows = [old[:62], old[[1, 2, 3]].mean(0)[None], mean[None], old[[61, 5]].mean(0)[None], mean.expand(3, -1)]
    return torch.cat(rows)


@pytest.mark.filterwarnings("ignore:transformers has to convert")
@pytest.mark.parametrize(("family", "fields"), [
    ("llama", {"tie_word_embeddings": True}), ("llama", {}), ("mixtral", {"num_local_experts": 2}),
])
def test_new_rows_are_means_of_old_ones(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    old = _saved(tmp_path, family, **fields)
    new = _built(tmp_path)
    assert new.config.vocab_size == 68
    inputs, head = new.get_input_embeddings().weight, new.get_output_embeddings().weight
    assert (inputs is head) == bool(fields.get("tie_word_embeddings"))
    torch.testing.assert_close(inputs, _extended(old.get_input_embeddings().weight), atol=1e-7, rtol=0)
    torch.testing.assert_close(head, _extended(old.get_output_embeddings().weight), atol=1e-7, rtol=0)
    ids = torch.arange(20)[None]
    with torch.no_grad():  # of old tokens nothing changes
        before, after = (model.eval()(input_ids=ids, position_ids=ids, use_cache=False).logits for model in (old, new))
    torch.testing.assert_close(after[..., :62], before[..., :62], atol=1e-5, rtol=0)


def test_a_checkpoint_of_another_size_is_an_error(tmp_path: Path) -> None:
    _saved(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.vocab_size = 60
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another shape than its configuration says: model.embed_tokens.weight \(64"):
        build_model(Experiment(model=Model(tmp_path)), CPU, None, Extension(60, ((1,),), 60, 61))


def _compare(folder: Path) -> None:
    expected = dict(_built(folder).named_parameters(remove_duplicate=False))
    for parallel in (Parallel(dp=2, zero=3), Parallel(tp=2), Parallel(pp=2)):
        model, strategy = _built(folder, parallel), build_strategy(parallel, CPU, "fp32")
        for name, parameter in model.named_parameters():
            assert torch.equal(strategy.gather(parameter), expected[name]), (parallel, name)


@pytest.mark.ranks
def test_every_layout_has_the_rows_of_one_process(tmp_path: Path) -> None:
    _saved(tmp_path)
    run_ranks(_compare, 2, tmp_path)


def test_frozen_new_rows_are_spoken_of(tmp_path: Path) -> None:
    _saved(tmp_path)
    with pytest.warns(ModelWarning, match="rows of new tokens stay"):
        build_model(Experiment(model=Model(tmp_path), adapter=Freeze("*norm*")), CPU, None, EXTENSION)


@pytest.mark.parametrize("kind", ["trained", "extended"])
def test_the_exported_model_has_tokenizer_and_rows(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   shared: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = Model("llama-tiny", init="random", tokenizer=TrainTokenizer(vocab_size=300)) if kind == "trained" \
        else Model(shared / "models/stories260k", tokenizer=ExtendTokenizer(learn=8, special=("<|user|>",), multiple=8))
    trained = []
    run = run_here(Experiment(model=model, data=STORIES, optimizer=AdamW(lr=1e-3), training=Training(steps=2),
                              callbacks=(lambda trainer: trained.append(trainer.model),)), tmp_path / "run")
    loaded, tokenizer = (auto.from_pretrained(run.path / "model") for auto in (AutoModelForCausalLM, AutoTokenizer))
    rows = 300 if kind == "trained" else 528
    assert loaded.config.vocab_size == loaded.get_input_embeddings().num_embeddings == rows
    if kind == "trained":
        config = loaded.config
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    ids = tokenizer(STORIES.source[0], return_tensors="pt")["input_ids"]
    documents = read_json(run.path / "data/index.json")["summary"]["Text, train"]["documents"]
    assert documents == 38
    assert ids.max() >= (259 if kind == "trained" else 512)  # learned tokens are used
    with torch.no_grad():
        positions = torch.arange(ids.shape[1])[None]
        expected = trained[0].eval()(input_ids=ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(loaded.eval()(ids).logits, expected, atol=1e-5, rtol=0)
