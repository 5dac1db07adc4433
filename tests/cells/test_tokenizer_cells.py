"""Tokenizers to be made, as cells: their fields, their forms in YAML and Python, and what `check` says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import collie_lab as lab
from collie_lab.data import model_config
from collie_lab.view._fields import facts_of, read, write

TRAIN = lab.TrainTokenizer(vocab_size=4096, special=("<|user|>", "<|end|>"))
EXTEND = lab.ExtendTokenizer(learn=100, tokens=("lobster",), rows="mean")
SCRATCH = lab.Experiment(model=lab.Model("llama-tiny", init="random", tokenizer=TRAIN))


@pytest.mark.parametrize("tokenizer", [TRAIN, EXTEND])
def test_they_go_to_yaml_and_code_and_a_form_and_back(tokenizer: lab.Cell) -> None:
    experiment = SCRATCH.with_("model.tokenizer", tokenizer)
    assert lab.Experiment.from_yaml(experiment.to_yaml()) == experiment
    assert eval(experiment.to_code(), {"lab": lab}) == experiment
    (facts,) = (facts for facts in facts_of(lab.Model) if facts.name == "tokenizer")
    assert facts.takes(tokenizer)
    assert read(facts, "Model", write(tokenizer)) == tokenizer
    assert read(facts, "Model", "folder(1)") == "folder(1)"
    with pytest.raises(lab.CellError, match="cannot be read"):
        read(facts, "Model", "TrainTokenizer(4096)")
    assert experiment.with_("model.tokenizer.min_frequency", 5).model.tokenizer == tokenizer.replace(min_frequency=5)
    with pytest.raises(lab.CellError, match=r"`model.tokenizer.learn`: there is no cell to change"):
        experiment.with_("model.tokenizer", "bytes").with_("model.tokenizer.learn", 5)


def test_the_model_has_a_trained_tokenizers_vocabulary() -> None:
    config = model_config(SCRATCH.model)
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (
        4096, 1, 2, 0)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: lab.TrainTokenizer(vocab_size=259, special=("<a>",)), "no room for all bytes and marks: at least 260"),
    (lambda: lab.TrainTokenizer(vocab_size=300, special=("<s>",)), "must be distinct"),
    (lambda: lab.ExtendTokenizer(tokens=("a", "")), "not empty"),
    (lambda: lab.ExtendTokenizer(), "nothing is new"),
])
def test_what_no_tokenizer_can_be(make: object, message: str) -> None:
    with pytest.raises(lab.CellError, match=message):
        make()  # type: ignore[operator]


def _pretrained(folder: Path, tokenizer: lab.Cell) -> lab.Experiment:
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 512, "num_attention_heads": 4}')
    (folder / "model.safetensors").touch()
    return SCRATCH.replace(model=lab.Model(folder, tokenizer=tokenizer))


def test_conflicts_are_found_before_anything_starts(tmp_path: Path) -> None:
    assert SCRATCH.check().problems == []
    trained = _pretrained(tmp_path, EXTEND)
    assert trained.check().problems == []

    def only(experiment: lab.Experiment) -> str:
        (problem,) = experiment.check().problems
        return f"{problem.level}: {problem}"

    assert only(_pretrained(tmp_path, TRAIN)).startswith("error: Model.tokenizer: trained weights know the tokens of")
    assert "vocab_size=512, but TrainTokenizer sets it" in only(SCRATCH.with_("model.config", {"vocab_size": 512}))
    for learner in (SCRATCH, trained):
        assert "RandomTokens has no text to learn from" in only(learner.replace(data=lab.RandomTokens()))
    marks = trained.with_("model.tokenizer", lab.ExtendTokenizer(special=("<a>",)))
    assert marks.replace(data=lab.RandomTokens()).check().problems == []
    assert only(SCRATCH.with_("model.tokenizer", EXTEND)).startswith("warning: ExtendTokenizer.rows: with random")
    assert "multiple: tp=2 need not divide" in only(trained.replace(parallel=lab.Parallel(tp=2)))
    assert "LoRA would leave the rows of new tokens untrained" in only(trained.replace(adapter=lab.LoRA()))
    assert trained.replace(adapter=lab.Freeze("*embed*")).check().problems == []
