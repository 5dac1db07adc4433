"""The size that is shown before a launch is the one that a run has."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest
import torch

import collie_lab as lab
from collie_lab import optim
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
    assert (size.parameters, size.trainable) == (built.parameters, built.trainable)
    assert size.weight_bytes == sum(parameter.nbytes for parameter in built.root.parameters())
    optimizer = optim.build(experiment.optimizer, built.root)
    states = [value for entries in optimizer.state.values() for key, value in entries.items()
              if key not in ("step", "start")]
    assert size.state_bytes == sum(state.nbytes for state in states)


def test_a_process_of_its_own_tells_it_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(BASE.to_yaml()))
    main()
    assert Size(**json.loads(capsys.readouterr().out.strip())) == measure_size(BASE)
    with pytest.raises(lab.CellError, match=r"LoRA: Target modules .*nothing.* not found"):
        BASE.replace(adapter=lab.LoRA(targets=("nothing",))).size()
