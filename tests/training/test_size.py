"""The size that is shown before a launch is the one that a run has."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import collie_lab as lab
from collie_lab import optim
from collie_lab.optim.library import block_matrices
from collie_lab.size import Size
from collie_lab.training.model import build_model
from collie_lab.training.size import main, measure_size

CPU = torch.device("cpu")
BASE = lab.Experiment(model=lab.Model("llama-tiny", init="random"))


@pytest.mark.parametrize("change", [
    {}, {"adapter": lab.LoRA(r=2)}, {"adapter": lab.Prefix(tokens=3)}, {"adapter": lab.Freeze("*norm*")},
    {"optimizer": lab.AdaLomo()}, {"optimizer": lab.Adan(), "adapter": lab.IA3()},
    {"training": lab.Training(weights="bf16", precision="bf16")},
    {"training": lab.Training(weights="bf16", precision="bf16"), "optimizer": lab.Lion(rounding="kahan")},
])
def test_it_is_that_of_the_model_and_optimizer_of_a_run(change: dict[str, Any]) -> None:
    experiment = BASE.replace(**change)
    built, size = build_model(experiment, CPU), measure_size(experiment)
    assert built.size == size  # which a run tells as it starts
    assert size.parameters == sum(parameter.numel() for parameter in built.root.parameters())
    assert size.trainable == sum(each.numel() for each in built.root.parameters() if each.requires_grad)
    assert size.weight_bytes == sum(parameter.nbytes for parameter in built.root.parameters())
    trained = {parameter for parameter in built.root.parameters() if parameter.requires_grad}
    assert size.matrices == sum(matrix.numel() for matrix in block_matrices(built.root) & trained)
    optimizer = optim.build(experiment.optimizer, built.root)
    states = [value for entries in optimizer.state.values() for key, value in entries.items()
              if key not in ("step", "start")]
    assert size.state_bytes == sum(state.nbytes for state in states)


def test_a_process_of_its_own_tells_it_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(BASE.to_yaml()))
    main()
    assert Size(**json.loads(capsys.readouterr().out.strip())) == measure_size(BASE)
    with pytest.raises(lab.CellError, match=r"^LoRA\.targets: LlamaForCausalLM has no layer 'nothing'; "):
        BASE.replace(adapter=lab.LoRA(targets=("nothing",))).size()


@pytest.mark.parametrize(("learn", "rows"), [(0, 516), (13, 532)])
def test_rows_of_new_tokens_count(learn: int, rows: int, shared: Path) -> None:
    """Of the five, one is there already; the vocabulary of 512 becomes a multiple of four."""
    cell = lab.ExtendTokenizer(tokens=("<a>", "<b>", "<c>", "e"), special=("<d>",), learn=learn, multiple=4)
    plain = lab.Experiment(model=lab.Model(shared / "models" / "stories260k"))
    more = measure_size(plain.with_("model.tokenizer", cell)).parameters - measure_size(plain).parameters
    assert more == (rows - 512) * 64  # embedding and head are tied


@pytest.mark.parametrize(("pattern", "reason"), [
    ("*norm*", "Freeze.train: Muon is for the matrices of blocks, and *norm* names none"),
    ("*o_proj*", ""), ("*nothing*", "no parameter of LlamaForCausalLM matches"),
])
def test_what_freeze_leaves_to_muon_is_asked_before_a_run(pattern: str, reason: str, monkeypatch: pytest.MonkeyPatch
                                                          ) -> None:
    def here(command: Any, *, input: str, **_: Any) -> subprocess.CompletedProcess[str]:
        out = io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        with contextlib.redirect_stdout(out):
            main()
        return subprocess.CompletedProcess(command, 0, out.getvalue(), "")

    monkeypatch.setattr(subprocess, "run", here)
    report = BASE.replace(adapter=lab.Freeze(pattern), optimizer=lab.Muon()).check()
    assert report.ok == (not reason)
    assert reason in str(report)
