"""QLoRA: the numbers of transformers, bitsandbytes and peft put together by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import collie_lab as lab
from collie_lab.training.model import build_model
from collie_lab.training.size import measure_size
from tests.ranks import losses, run_here

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
IDS = torch.arange(40).reshape(2, 20)
BASE = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), data=lab.Skills(size=60, test_size=10, packing=True, max_length=96),
    optimizer=lab.AdamW(lr=1e-2), training=lab.Training(steps=4, batch_size=4, checkpoint_every=2),
)


@pytest.mark.parametrize("double", [True, False])
def test_logits_gradients_and_bytes_are_those_of_the_libraries(double: bool, tmp_path: Path) -> None:
    build_model(BASE, CPU).causal_lm.save_pretrained(tmp_path)
    experiment = BASE.replace(model=lab.Model(tmp_path, tokenizer="bytes"), adapter=lab.QLoRA(r=2, double=double))
    root: Any = build_model(experiment, CPU).root.train()
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32))
    reference = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=16, target_modules="all-linear",
                                                          task_type="CAUSAL_LM")).train()
    expected = dict(reference.named_parameters())
    assert {name: (each.shape, each.dtype, each.requires_grad) for name, each in root.named_parameters()} == {
        name: (each.shape, each.dtype, each.requires_grad) for name, each in expected.items()}
    with torch.no_grad():
        for name, parameter in root.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(expected[name].normal_(std=0.1))
    outputs = [model(input_ids=IDS, labels=IDS) for model in (root, reference)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    for name, parameter in root.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)
    kept = sum(each.nbytes + sum(part.nbytes for part in _scales(each)) for each in expected.values())
    assert measure_size(experiment).weight_bytes == kept


def _scales(weight: Any) -> list[torch.Tensor]:
    state = getattr(weight, "quant_state", None)
    if state is None:
        return []
    return [state.absmax] if state.state2 is None else [state.absmax, state.state2.absmax]


def test_it_resumes_and_is_exported_for_the_model_as_it_was(tmp_path: Path) -> None:
    experiment = BASE.replace(adapter=lab.QLoRA(r=2))
    whole = run_here(experiment, tmp_path / "whole")
    resumed = run_here(experiment, tmp_path / "resumed", resume=next(whole.checkpoints.glob("*2")))
    assert losses(resumed) == losses(whole)[2:]
    assert losses(whole)[-1] < losses(whole)[0]
    build_model(BASE, CPU).causal_lm.save_pretrained(tmp_path / "base")
    merged = lab.merge(whole.path / "model", tmp_path / "merged", tmp_path / "base")
    assert AutoModelForCausalLM.from_pretrained(merged).num_parameters() == build_model(BASE, CPU).size.parameters


@pytest.mark.parametrize(("change", "field"), [
    ({"parallel": lab.Parallel(dp=2, zero=2)}, "zero"), ({"parallel": lab.Parallel(tp=2)}, "tp"),
    ({"adapter": lab.QLoRA(init="pissa")}, "init"), ({"adapter": lab.QLoRA(dora=True)}, "dora"),
])
def test_what_it_cannot_do_is_refused(change: dict[str, Any], field: str) -> None:
    (problem,) = BASE.replace(**{"adapter": lab.QLoRA(), **change}).check().errors
    assert problem.field == field
