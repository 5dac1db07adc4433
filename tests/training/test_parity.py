"""Every layout gives the loss curve of one process; a resumed run that of an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest

from collie_lab import (
    SGD,
    AdaLomo,
    AdamW,
    Adan,
    Experiment,
    Lion,
    Lomo,
    LoRA,
    Model,
    Parallel,
    Perplexity,
    Skills,
    Sophia,
    Training,
)
from collie_lab.folder import RunFolder
from tests.ranks import losses, run_here, run_ranks

STEPS = 6
BASE = Experiment(
    model=Model("llama-tiny", init="random"),
    data=Skills(size=200, test_size=20, packing=True, max_length=96),
    training=Training(steps=STEPS, batch_size=4, clip_grad_norm=1.0, schedule="cosine", warmup=2, export=False),
    evaluate=[Perplexity(limit=8)],
)
ADAMW = BASE.replace(optimizer=AdamW(lr=3e-3, weight_decay=0.1))
ARMS = {
    "adamw": ADAMW,
    "sgd": BASE.replace(optimizer=SGD(lr=0.1, momentum=0.9)),
    "lomo": BASE.replace(optimizer=Lomo(lr=0.1, weight_decay=0.01)),  # clipped in two passes
    "adalomo": BASE.replace(optimizer=AdaLomo(lr=0.02, weight_decay=0.1)).with_("training.clip_grad_norm", None),
    "sophia": BASE.replace(optimizer=Sophia(lr=3e-4, hessian_every=4, in_backward=True, clip_by="previous_norm")),
    "adan": BASE.replace(optimizer=Adan(lr=5e-3, restart_every=4)),
    "held": BASE.replace(optimizer=AdamW(lr=3e-3, weight_decay=0.1, in_backward=True, accumulate="hold")).replace(
        training=BASE.training.replace(clip_grad_norm=None, clip_grad_value=0.05, micro_batch_size=1)),
    "lion": BASE.replace(optimizer=Lion(lr=2e-4, weight_decay=0.1)),  # the sign of what is nearly nothing may differ
    "lora": BASE.replace(optimizer=AdamW(lr=5e-3), adapter=LoRA(r=4)),
    "accumulation": ADAMW.with_("training.micro_batch_size", 1),
    "recompute": ADAMW.with_("training.recompute", "full"),
    "scaled": ADAMW.with_("optimizer.lr_scale", {"*.layers.0.*": 0.3, "model.norm*": 0.5}),  # each on one stage alone
}


# Some layouts try everything; the others the arms that differ in what they ask of a layout.
FEW = ("adamw", "adalomo", "lomo", "lora")
LAYOUTS = {
    "dp2": Parallel(dp=2),
    "dp2 zero2": Parallel(dp=2, zero=2),
    "dp2 zero3": Parallel(dp=2, zero=3),
    "tp2": Parallel(tp=2),
    "tp2 sequence": Parallel(tp=2, sequence_parallel=True),
    "hybrid 2x2": Parallel(dp=4, zero=3, shard=2),
    "tp2 dp2": Parallel(tp=2, dp=2),
    "tp2 dp2 zero3": Parallel(tp=2, dp=2, zero=3),
    "pp2 gpipe": Parallel(pp=2, schedule="gpipe"),
    "pp2 1f1b": Parallel(pp=2),
    "pp2 interleaved": Parallel(pp=2, schedule="interleaved"),
    "pp2 zero bubble": Parallel(pp=2, schedule="zero_bubble"),
    "pp2 tp2": Parallel(pp=2, tp=2),
    "pp2 tp2 sequence": Parallel(pp=2, tp=2, sequence_parallel=True),
    "pp2 dp2": Parallel(pp=2, dp=2),
    "pp2 dp2 zero3": Parallel(pp=2, dp=2, zero=3),
    "pp2 dp2 tp2": Parallel(pp=2, dp=2, tp=2),
}


# Layouts that share their processes, whose start takes longer than a layout does.
GROUPS = {
    "data": ["dp2", "dp2 zero2", "dp2 zero3"],
    "tensor": ["tp2", "tp2 sequence"],
    "pipeline": ["pp2 gpipe", "pp2 1f1b", "pp2 interleaved", "pp2 zero bubble"],
    "tensor and data": ["hybrid 2x2", "tp2 dp2", "tp2 dp2 zero3"],
    "pipeline and others": ["pp2 tp2", "pp2 tp2 sequence", "pp2 dp2", "pp2 dp2 zero3"],
    "all": ["pp2 dp2 tp2"],
}


#: They cut every stage again: of four layers.
DEEP = ("pp2 interleaved", "pp2 zero bubble")


def _arms(layout: str) -> list[str]:
    if layout == "pp2 1f1b":
        return [*FEW, "adan", "held", "recompute", "scaled"]
    return [name for name in ARMS if layout in ("dp2", "dp2 zero3", "tp2") or name in FEW]


def _experiment(name: str, layout: str) -> Experiment:
    return ARMS[name].with_("model.config", {"num_hidden_layers": 4} if layout in DEEP else {})


def _train_all(folder: str, group: str) -> None:
    for layout in GROUPS[group]:
        for name in _arms(layout):
            run_here(_experiment(name, layout).replace(parallel=LAYOUTS[layout]), Path(folder) / layout / name)


def _held_out(run: RunFolder) -> list[float]:
    result = run.read("result.json")
    return [result["nll"], result["bits_per_byte"] / result["nll"]]  # the latter follows from what was counted


Curves = dict[tuple[str, bool], tuple[list[float], list[float]]]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Curves:
    """The losses and the held-out figures of every arm, and of a deep model's, by name and depth."""
    folder = tmp_path_factory.mktemp("one")
    layouts = [("", name) for name in ARMS] + [(DEEP[0], name) for name in _arms(DEEP[0])]
    runs = {(name, layout in DEEP): run_here(_experiment(name, layout), folder / f"{layout} {name}")
            for layout, name in layouts}
    return {key: (losses(run), _held_out(run)) for key, run in runs.items()}


@pytest.mark.ranks
@pytest.mark.parametrize("group", GROUPS)
def test_every_layout_gives_the_curve_of_one_process(
        group: str, one_process: Curves, tmp_path: Path) -> None:
    run_ranks(_train_all, LAYOUTS[GROUPS[group][0]].world_size, str(tmp_path), group)
    for layout in GROUPS[group]:
        for name in _arms(layout):
            run = RunFolder(tmp_path / layout / name)
            expected, held_out = one_process[name, layout in DEEP]
            found = losses(run)
            assert len(found) == STEPS
            assert found == pytest.approx(expected, abs=1e-5), (layout, name)
            assert _held_out(run) == pytest.approx(held_out, abs=1e-5), (layout, name)


def test_accumulation_and_recomputation_change_nothing(one_process: Curves) -> None:
    plain = one_process["adamw", False][0]
    assert one_process["accumulation", False][0] == pytest.approx(plain, abs=1e-5)
    assert one_process["recompute", False][0] == pytest.approx(plain, abs=1e-6)
