"""Merging an adapter, training on from one, and one upon another."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import collie_lab as lab
from collie_lab.cells import AddedAdapter
from collie_lab.training.model import build_model
from tests.ranks import run_here

CPU = torch.device("cpu")
IDS = torch.arange(40).reshape(2, 20)
BASE = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), data=lab.Skills(size=60, test_size=10, packing=True, max_length=96),
    optimizer=lab.AdamW(lr=1e-2), training=lab.Training(steps=3, batch_size=4),
)
CELLS: dict[str, AddedAdapter] = {
    "dora": lab.LoRA(r=2, dora=True), "ia3": lab.IA3(), "oft": lab.OFT(block_size=4),
    "prompt": lab.Prompt(tokens=3), "prefix": lab.Prefix(tokens=3),
}
pytestmark = pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_model(BASE, CPU).causal_lm.save_pretrained(folder)
    return folder


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -20:]
    return logits


@pytest.mark.parametrize("name", CELLS)
def test_a_run_begins_where_an_exported_adapter_ended(name: str, base: Path, tmp_path: Path) -> None:
    run = run_here(BASE.replace(adapter=CELLS[name]), tmp_path / "run")
    plain = AutoModelForCausalLM.from_pretrained(base)
    reference = _logits(peft.PeftModel.from_pretrained(copy.deepcopy(plain), run.path / "model"))
    assert (reference - _logits(plain)).abs().max() > 1e-4
    again = BASE.replace(adapter=CELLS[name].replace(load=run.path / "model"))
    assert again.check().ok
    torch.testing.assert_close(_logits(build_model(again, CPU).root), reference, atol=1e-5, rtol=1e-5)


def test_lora_on_experts_is_exported_and_merged(tmp_path: Path) -> None:
    """peft wraps what holds them twice, once for each of its two tensors."""
    fields = {"model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "num_local_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    random = BASE.replace(model=lab.Model(tmp_path, init="random", tokenizer="bytes"))
    build_model(random, CPU).causal_lm.save_pretrained(tmp_path / "base")
    experiment = random.replace(model=lab.Model(tmp_path / "base", tokenizer="bytes"), adapter=lab.LoRA(r=4))
    run = run_here(experiment, tmp_path / "run")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = _logits(plain)
    trained = _logits(peft.PeftModel.from_pretrained(plain, run.path / "model"))
    assert (trained - before).abs().max() > 1e-3
    again = build_model(experiment.replace(adapter=lab.LoRA(r=4, load=run.path / "model")), CPU).root
    merged = AutoModelForCausalLM.from_pretrained(lab.merge(run.path / "model", tmp_path / "merged"))
    for model in (again, merged):
        torch.testing.assert_close(_logits(model), trained, atol=1e-5, rtol=1e-5)


def test_a_merged_adapter_is_a_model_for_the_next_one(base: Path, tmp_path: Path) -> None:
    first = run_here(BASE.replace(model=lab.Model(base, tokenizer="bytes"), adapter=lab.LoRA(r=2)), tmp_path / "run")
    merged = lab.merge(first.path / "model", tmp_path / "merged")  # the base is the one that the adapter names
    reference = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first.path / "model")
    torch.testing.assert_close(_logits(AutoModelForCausalLM.from_pretrained(merged)), _logits(reference),
                               atol=2e-5, rtol=1e-5)
    second = BASE.replace(model=lab.Model(merged), adapter=CELLS["ia3"])
    assert second.check().ok
    torch.testing.assert_close(_logits(build_model(second, CPU).root), _logits(reference), atol=2e-5, rtol=1e-5)


def test_what_cannot_be_merged_is_refused(base: Path, tmp_path: Path) -> None:
    run = run_here(BASE.replace(adapter=CELLS["prompt"]), tmp_path / "prompt")
    with pytest.raises(lab.CellError, match=r"merge\.adapter: Prompt changes no weights"):
        lab.merge(run.path / "model", tmp_path / "merged", base)
    with pytest.raises(lab.CellError, match=r"merge\.adapter: .* is no peft folder"):
        lab.merge(base, tmp_path / "merged")
    run = run_here(BASE.replace(adapter=CELLS["ia3"]), tmp_path / "ia3")
    with pytest.raises(lab.CellError, match=r"merge\.base: the adapter names no model"):
        lab.merge(run.path / "model", tmp_path / "merged")
    with pytest.raises(lab.CellError, match=r"merge\.target: .* exists"):
        lab.merge(run.path / "model", tmp_path, base)


def test_another_adapter_than_the_folder_holds_is_refused(tmp_path: Path) -> None:
    run = run_here(BASE.replace(adapter=lab.LoRA(r=2)), tmp_path / "run")
    folder = run.path / "model"
    for cell, message in (
        (lab.LoRA(r=4, load=folder), "LoRA.r: "), (lab.IA3(load=folder), "peft_type='LORA', which is 'IA3' here"),
        (lab.LoRA(r=2, load="absent"), "LoRA.load: absent is no peft folder"),
        (lab.PTuning(load=folder), "PTuning.load: an exported PTuning cannot be trained on"),
        (lab.LoRA(r=2, init="pissa", load=folder), "LoRA.init: without effect beside load"),
        (lab.LoRA(r=2, targets=("q_proj",), load=folder), "adapts more than these: base_model.model.model.layers.0."),
    ):
        assert message in repr(BASE.replace(adapter=cell).check())
    (folder / "adapter_model.safetensors").rename(folder / "elsewhere")
    assert "LoRA.load: " in repr(BASE.replace(adapter=lab.LoRA(r=2, load=folder)).check())
    (folder / "elsewhere").rename(folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds another adapter"):
        build_model(BASE.replace(adapter=lab.LoRA(r=4, load=folder)), CPU)
