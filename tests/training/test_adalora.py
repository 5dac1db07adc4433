"""AdaLoRA: the losses and ranks of peft's own recipe, resumed, and exported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

import collie_lab as lab
from collie_lab.data import Documents
from collie_lab.folder import RunFolder, read_json
from collie_lab.training.model import build_model
from tests.ranks import losses, run_here

CPU = torch.device("cpu")
ADAPTER = lab.AdaLoRA(init_r=4, target_r=2, alpha=16, warmup=0.2, final=0.3)
BASE = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), data=lab.Skills(size=4, test_size=2), adapter=ADAPTER,
    optimizer=lab.AdamW(lr=1e-2), training=lab.Training(steps=12, batch_size=4, checkpoint_every=5),
)


def _rows(run: RunFolder) -> dict[str, Any]:
    """All documents as one padded batch."""
    documents = Documents.load(run.path / "data" / "train")
    spans = [slice(*documents.offsets[index : index + 2]) for index in range(4)]
    ids = [torch.from_numpy(documents.tokens[span].astype("int64")) for span in spans]
    labels = [row.masked_fill(~torch.from_numpy(documents.learned[span]), -100)
              for row, span in zip(ids, spans, strict=True)]
    return {"input_ids": pad_sequence(ids, batch_first=True), "labels": pad_sequence(labels, True, -100),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)}


def test_the_run_is_that_of_peft_by_hand(tmp_path: Path) -> None:
    run = run_here(BASE, tmp_path / "run")
    build_model(BASE.replace(adapter=None), CPU).causal_lm.save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    reference: Any = peft.get_peft_model(copy.deepcopy(plain), peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=16, total_step=12, tinit=2, tfinal=3, target_modules="all-linear",
        task_type="CAUSAL_LM"))
    first = dict(build_model(BASE, CPU).root.named_parameters())
    trained = {name: each for name, each in reference.named_parameters() if each.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(first[name])
    optimizer, expected = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0), []
    for step in range(1, 13):
        loss = reference(**_rows(run)).loss
        loss.backward()
        optimizer.step()
        reference.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses(run) == pytest.approx(expected, abs=1e-4)
    saved = read_json(run.path / "model" / "adapter_config.json")["rank_pattern"]
    pattern = reference.active_peft_config.rank_pattern
    assert saved == {name.replace(".default", ""): kept for name, kept in pattern.items()}
    assert sum(map(sum, saved.values())) == 2 * len(saved)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), run.path / "model").eval()
    with torch.no_grad():
        ids = torch.arange(20)[None]
        after = loaded(input_ids=ids).logits
        torch.testing.assert_close(after, reference.eval()(input_ids=ids).logits, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(loaded.merge_and_unload()(input_ids=ids).logits, after, atol=2e-5, rtol=1e-5)


def test_it_resumes_before_and_after_the_last_choice(tmp_path: Path) -> None:
    whole = run_here(BASE, tmp_path / "whole")
    for step in (5, 10):
        resumed = run_here(BASE, tmp_path / f"from-{step}", resume=next(whole.checkpoints.glob(f"*{step}")))
        assert losses(resumed) == losses(whole)[step:]
        assert read_json(resumed.path / "model" / "adapter_config.json")["rank_pattern"] == read_json(
            whole.path / "model" / "adapter_config.json")["rank_pattern"]


@pytest.mark.parametrize(("change", "field"), [
    ({"parallel": lab.Parallel(dp=2, zero=3)}, "zero"), ({"parallel": lab.Parallel(pp=2)}, "pp"),
    ({"parallel": lab.Parallel(tp=2)}, "tp"), ({"optimizer": lab.Lomo()}, "in_backward"),
    ({"adapter": lab.AdaLoRA(init_r=4, target_r=4)}, "target_r"),
    ({"adapter": lab.AdaLoRA(warmup=0.5, final=0.5)}, "final"),
    ({"optimizer": lab.Muon()}, "optimizer"), ({"training": lab.Training(steps=5, batch_size=4)}, "steps"),
])
def test_what_it_cannot_do_is_refused(change: dict[str, Any], field: str) -> None:
    (problem,) = BASE.replace(**change).check().errors
    assert problem.field == field
