"""transformers' Trainer as a study runs it: the losses of our loop, and a clear word on what it cannot do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import collie_lab as lab
from collie_lab.data import prepare
from collie_lab.folder import RunFolder
from collie_lab.study import peer
from collie_lab.study._peer_trainer import arguments
from tests.ranks import losses, run_here, run_ranks

#: Of a loss: both compute in fp32, in another order of sums, and clip by a norm to which others add a little.
WITHIN = 1e-5


def _experiment(**cells: Any) -> lab.Experiment:
    training = {"steps": 4, "batch_size": 8, "micro_batch_size": 2, "clip_grad_norm": 0.5, "schedule": "linear",
                "warmup": 1, "export": False, **cells.pop("training", {})}
    return lab.Experiment(**{
        "model": lab.Model("llama-tiny", init="random"), "data": lab.Skills(size=100, test_size=4, max_length=64),
        "optimizer": lab.AdamW(lr=3e-3, weight_decay=0.1), "training": lab.Training(**training), **cells})


def _prepared(experiment: lab.Experiment, path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.checkpoints.mkdir(parents=True)
    prepare(experiment, folder)
    return folder


def _compare(ours: RunFolder, theirs: RunFolder) -> None:
    assert losses(theirs) == pytest.approx(losses(ours), rel=WITHIN)
    for key in ("status", "steps", "world_size", "parameters", "trainable"):
        assert theirs.read("result.json")[key] == ours.read("result.json")[key]
    columns = ["step", "lr", "tokens"]
    pairs = zip(lab.Run(ours).metrics[columns].to_numpy(), lab.Run(theirs).metrics[columns].to_numpy(), strict=True)
    assert all(one == pytest.approx(two) for one, two in pairs)


@pytest.mark.parametrize("packing", [False, True])
def test_losses_are_those_of_our_loop(packing: bool, tmp_path: Path) -> None:
    experiment = _experiment(data=lab.Skills(size=100, test_size=4, max_length=64, packing=packing))
    theirs = _prepared(experiment, tmp_path / "theirs")
    peer.run(experiment, theirs, torch.device("cpu"))
    _compare(run_here(experiment, tmp_path / "ours"), theirs)
    peak = theirs.read("result.json")["peak_bytes"]
    assert peak is None or peak > 4 * 119_616 * 4  # weights, gradients and two states, in fp32


def _on_ranks(experiment: lab.Experiment, ours: Path, theirs: Path) -> None:
    rank = str(torch.distributed.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    run_here(experiment, ours)
    if rank == "0":
        _prepared(experiment, theirs)
    torch.distributed.barrier()
    peer.run(experiment, RunFolder(theirs), torch.device("cpu"))


@pytest.mark.ranks
@pytest.mark.parametrize("layout", [{}, {"zero": 3, "engine": "deepspeed"}], ids=["replicated", "ZeRO-3"])
def test_losses_on_two_ranks(layout: dict[str, Any], tmp_path: Path) -> None:
    if layout:
        pytest.importorskip("deepspeed")
    model = tmp_path / "model"  # saved weights: DeepSpeed would draw its own
    fields = {key: value for key, value in lab.SHAPES["llama-tiny"].items() if key != "model_type"}
    LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(model)
    experiment = _experiment(model=lab.Model(model, tokenizer="bytes"), parallel=lab.Parallel(dp=2, **layout))
    run_ranks(_on_ranks, 2, experiment, tmp_path / "ours", tmp_path / "theirs")
    _compare(RunFolder(tmp_path / "ours"), RunFolder(tmp_path / "theirs"))


def test_the_compiler_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # which the Trainer's settings change
    found = [arguments(_experiment(training={"compile": each}), RunFolder(tmp_path), torch.device("cpu")).torch_compile
             for each in (False, True)]
    assert found == [False, True]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    experiment = _experiment(optimizer=lab.AdamW(lr=1e30), training={"warmup": 0, "schedule": "constant", "steps": 9})
    folder = _prepared(experiment, tmp_path / "theirs")
    peer.run(experiment, folder, torch.device("cpu"))
    result = folder.read("result.json")
    assert result["status"] == "diverged"
    assert result["steps"] < 9
    assert "the loss of step" in result["detail"]


def test_the_stop_flag_is_heeded(tmp_path: Path) -> None:
    experiment = _experiment()
    folder = _prepared(experiment, tmp_path / "theirs")
    folder.stop_flag.touch()
    peer.run(experiment, folder, torch.device("cpu"))
    assert folder.read("result.json")["status"] == "stopped"
    assert folder.read("result.json")["steps"] == 1


@pytest.mark.parametrize(("cells", "field"), [
    ({"parallel": lab.Parallel(tp=2)}, "tp"), ({"parallel": lab.Parallel(pp=2)}, "pp"),
    ({"parallel": lab.Parallel(dp=2, zero=3)}, "zero"), ({"optimizer": lab.Lion()}, "optimizer"),
    ({"parallel": lab.Parallel(dp=2, zero=3, offload="optimizer")}, "offload"),
    ({"optimizer": lab.AdamW(in_backward=True)}, "in_backward"), ({"adapter": lab.LoRA()}, "adapter"),
    ({"optimizer": lab.AdamW(lr_scale={"*embed*": 0.1})}, "lr_scale"), ({"evaluate": (lab.Perplexity(),)}, "evaluate"),
    ({"training": {"export": True}}, "export"), ({"training": {"checkpoint_every": 2}}, "checkpoint_every"),
    ({"training": {"weights": "bf16", "precision": "bf16"}}, "weights"),
    ({"training": {"compile": True}, "parallel": lab.Parallel(dp=2, engine="deepspeed")}, "compile"),
    ({"training": {"precision": "bf16"}, "parallel": lab.Parallel(dp=2, zero=3, engine="deepspeed")}, "weights"),
])
def test_what_it_cannot_do_is_refused(cells: dict[str, Any], field: str) -> None:
    with pytest.raises(lab.CellError) as raised:
        peer.check(_experiment(**cells))
    assert [problem.field for problem in raised.value.problems] == [field]


def test_a_study_checks_its_runner() -> None:
    grid = {"name": "peer", "base": {"model": "llama-tiny", "training": {"export": False}},
            "product": {"program": {"Trainer": {"runner": "transformers", "parallel": {"tp": 2}}}}}
    study = lab.Study(grid)
    assert ["Parallel.tp" for problem in study.check().errors if problem.field == "tp"] == ["Parallel.tp"]
    assert study.arms[0].module == peer.MODULE
