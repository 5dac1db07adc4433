"""DeepSpeed's engine gives the loss curve of one process; its checkpoints and exports are everyone's."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import collie_lab as lab
from collie_lab import AdaLomo, AdamW, Adan, Experiment, Lion, LoRA, Model, Parallel, Skills, Sophia, Training, optim
from collie_lab.folder import RunFolder
from collie_lab.parallel import build_strategy
from tests.ranks import losses, run_here, run_ranks

STEPS, HALF = 6, 3
BASE = Experiment(
    model=Model("llama-tiny", init="random"),
    # An odd number of documents, one a batch: one rank has more to answer than the other.
    data=Skills(size=100, test_size=3, packing=True, max_length=96),
    training=Training(steps=STEPS, batch_size=4, clip_grad_norm=1.0, schedule="cosine", warmup=2, export=False),
    evaluate=[lab.Perplexity(), lab.ExactMatch(batch_size=1, max_new_tokens=3, every=4)],
)
ADAMW = BASE.replace(optimizer=AdamW(lr=3e-3, weight_decay=0.1))
EXPERIMENTS = {
    "adamw": ADAMW.with_("training.export", True).with_("training.checkpoint_every", HALF),
    "lion": BASE.replace(optimizer=Lion(lr=1e-3, weight_decay=0.1)),
    "lora": BASE.replace(optimizer=AdamW(lr=1e-2), adapter=LoRA(r=4)).with_("training.export", True)
    .with_("training.checkpoint_every", HALF),
    "adan": BASE.replace(optimizer=Adan(lr=1e-3, restart_every=4)).replace(
        training=BASE.training.replace(clip_grad_norm=None, clip_grad_value=0.5)),
    "best": BASE.replace(optimizer=Lion(lr=0.02), evaluate=[lab.Perplexity(every=2), BASE.evaluate[1]],
                         callbacks=[lab.BestCheckpoint(restore=True)]).with_("training.export", True)
    .with_("training.steps", 10),  # it is best before the end
    "accumulation": ADAMW.with_("training.micro_batch_size", 1),
    "recompute": ADAMW.with_("training.recompute", "full"),
    "autocast": ADAMW.with_("training.precision", "bf16"),
    "bf16": ADAMW.with_("training.precision", "bf16").with_("training.weights", "bf16"),
}


def _zero(zero: int, offload: str | None = None) -> Parallel:
    return Parallel(dp=2, zero=zero, engine="deepspeed", offload=offload)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Arm:
    experiment: str
    parallel: Parallel
    resume: str | None = None
    """The run whose checkpoint of step `HALF` it goes on from."""
    tolerance: float = 1e-5


ARMS = {
    "adamw-0": Arm("adamw", _zero(0)),
    "adamw-1": Arm("adamw", _zero(1)),
    "adamw-2": Arm("adamw", _zero(2)),
    "adamw-3": Arm("adamw", _zero(3)),
    "adamw-2-offload": Arm("adamw", _zero(2, "optimizer")),
    "adamw-3-offload": Arm("adamw", _zero(3, "parameters")),
    "lion-2": Arm("lion", _zero(2)),
    "lora-1": Arm("lora", _zero(1)),
    "lora-3": Arm("lora", _zero(3)),
    "best-2-offload": Arm("best", _zero(2, "optimizer")),
    "best-3": Arm("best", _zero(3)),
    "adan-1": Arm("adan", _zero(1)),
    "accumulation-0": Arm("accumulation", _zero(0)),
    "accumulation-3": Arm("accumulation", _zero(3)),
    "recompute-3": Arm("recompute", _zero(3)),
    "autocast-2": Arm("autocast", _zero(2), tolerance=2e-3),
    "bf16-3": Arm("bf16", _zero(3), tolerance=2e-3),
    "one-process-to-3": Arm("adamw", _zero(3), resume="adamw"),
    "3-to-2-offload": Arm("adamw", _zero(2, "optimizer"), resume="adamw-3-offload"),
    "2-to-torch": Arm("adamw", Parallel(dp=2, zero=0), resume="adamw-2"),
    "lora-3-to-1": Arm("lora", _zero(1), resume="lora-3"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run for each experiment, in one process, and each arm, on two ranks."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    for name, experiment in EXPERIMENTS.items():
        run_here(experiment, folder / name)
    run_ranks(_train_all, 2, str(folder))
    return folder


def _train_all(folder: str) -> None:
    for name, arm in ARMS.items():
        check = functools.partial(_assert_layout, parallel=arm.parallel)
        resume = Path(folder) / arm.resume / "checkpoints" / f"step-{HALF:06d}" if arm.resume else None
        experiment = EXPERIMENTS[arm.experiment]
        run_here(experiment.replace(parallel=arm.parallel, callbacks=[*experiment.callbacks, check]),
                 Path(folder) / name, resume)
    _assert_nothing_was_compiled()
    _assert_others_are_refused()


def _assert_layout(trainer: Any, parallel: Parallel) -> None:
    """Each rank has its share of the states, and of the weights under `zero=3`."""
    if parallel.engine == "torch":
        return
    assert trainer.model.zero_optimization_stage() == parallel.zero
    trained = [p for p in trainer.model.module.parameters() if p.requires_grad]
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in trained)
    kept = sum(entries["m"].numel() for entries in trainer.optimizer.state.values())
    padding = 16 * len(trained)
    assert kept == whole if parallel.zero == 0 else kept <= whole / 2 + padding
    if parallel.zero == 3:
        assert sum(p.numel() for p in trainer.model.module.parameters()) < 0.1 * trainer._counts["parameters"]


def _assert_nothing_was_compiled() -> None:
    """The work-around in `_leave_out_shared_memory` still works: else the first start takes minutes."""
    import deepspeed

    assert deepspeed.comm.comm.cdb.shm_comm_op is None
    assert not hasattr(torch.ops.deepspeed, "inference_all_reduce_")


def _assert_others_are_refused() -> None:
    """What `check` refuses, in anyone's own loop too."""
    strategy, layer = build_strategy(_zero(2), torch.device("cpu"), "fp32"), torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="AdaLomo looks at whole tensors"):
        strategy.prepare(layer, optim.build(AdaLomo(in_backward=False), layer, lazy=True))
    with pytest.raises(TypeError, match="not with SGD"):
        strategy.prepare(layer, torch.optim.SGD(layer.parameters()))


pytestmark = pytest.mark.timeout(900)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ARMS)
def test_two_ranks_give_the_curve_of_one(name: str, runs: Path) -> None:
    expected, found = RunFolder(runs / ARMS[name].experiment), RunFolder(runs / name)
    curve = losses(expected)[HALF if ARMS[name].resume else 0:]
    tolerance = ARMS[name].tolerance
    assert losses(found) == pytest.approx(curve, abs=tolerance)
    expected_result, result = expected.read("result.json"), found.read("result.json")
    assert result["nll"] == pytest.approx(expected_result["nll"], abs=tolerance)
    assert result["exact_match"] == expected_result["exact_match"]
    assert result["parameters"] == expected_result["parameters"]


@pytest.mark.ranks
def test_the_norm_before_clipping_is_that_of_one_process(runs: Path) -> None:
    for name in ("adamw", "accumulation"):
        expected = lab.Run(runs / name).metrics["grad_norm"].tolist()
        for arm in (arm for arm in ARMS if ARMS[arm].experiment == name and not ARMS[arm].resume):
            assert lab.Run(runs / arm).metrics["grad_norm"].tolist() == pytest.approx(expected, abs=1e-5), arm


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["adamw-0", "adamw-2", "adamw-3", "adamw-3-offload", "best-2-offload", "best-3"])
def test_an_export_is_that_of_one_process(name: str, runs: Path) -> None:
    names = ARMS[name].experiment, name
    expected, found = (AutoModelForCausalLM.from_pretrained(runs / run / "model") for run in names)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, atol=1e-4, rtol=0)
    sizes = [(runs / run / "model" / "model.safetensors").stat().st_size for run in names]
    assert sizes[0] == sizes[1]
    restored = [RunFolder(runs / run).read("result.json").get("restored") for run in names]
    assert restored[0] == restored[1]
    assert (restored[0] is None) == (names[0] != "best")


@pytest.mark.ranks
def test_an_exported_adapter_is_that_of_one_process(runs: Path) -> None:
    expected = load_file(runs / "lora" / "model" / "adapter_model.safetensors")
    for name in ("lora-1", "lora-3"):
        torch.testing.assert_close(load_file(runs / name / "model" / "adapter_model.safetensors"), expected,
                                   atol=1e-5, rtol=0)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["adamw-1", "adamw-3-offload"])
def test_one_process_goes_on_from_its_checkpoint(name: str, runs: Path, tmp_path: Path) -> None:
    resumed = run_here(EXPERIMENTS["adamw"], tmp_path / "run", runs / name / "checkpoints" / f"step-{HALF:06d}")
    assert losses(resumed) == pytest.approx(losses(RunFolder(runs / "adamw"))[HALF:], abs=1e-5)


def test_offload_on_one_rank_by_the_launcher(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    experiment = ADAMW.with_("training.steps", 3).replace(parallel=Parallel(zero=1, offload="optimizer"), evaluate=[])
    assert experiment.parallel.engine == "deepspeed"
    run = experiment.launch(folder=tmp_path, show=False)
    expected = run_here(experiment.replace(parallel=Parallel()), tmp_path / "expected")
    assert run.metrics["loss"].tolist() == pytest.approx(losses(expected), abs=1e-5)
    lines = [line for stream in ("out", "err") for line in run.folder.log(0, stream).read_text().splitlines()]
    logs = "\n".join(line for line in lines if "torch/utils/_pytree.py" not in line)  # torchao's, where it is installed
    assert "[INFO]" not in logs
    assert "[WARNING]" not in logs
    assert "deprecated" not in logs


GOOD = ADAMW.replace(parallel=_zero(2))


def test_the_engine_has_no_problems_of_its_own() -> None:
    pytest.importorskip("deepspeed")
    assert repr(GOOD.check()) == "no problems"
    assert repr(GOOD.replace(parallel=Parallel(zero=3, offload="parameters")).check()) == "no problems"


@pytest.mark.parametrize(("experiment", "message"), [
    (GOOD.replace(optimizer=lab.Lomo()), "Lomo.in_backward: DeepSpeed averages gradients after"),
    (GOOD.replace(optimizer=AdaLomo(in_backward=False)), "Parallel.zero: AdaLomo looks at rows and columns"),
    (GOOD.replace(optimizer=Sophia(), parallel=_zero(0)), "Parallel.engine: Sophia's Hessian needs"),
    (GOOD.replace(optimizer=lab.Muon()), "Parallel.engine: DeepSpeed's engine steps with optimizers of collie_lab"),
    (GOOD.with_("parallel.tp", 2), "Parallel.tp: DeepSpeed's engine is for data-parallel layouts"),
    (GOOD.with_("parallel.pp", 2), "Parallel.pp: DeepSpeed's engine is for data-parallel layouts"),
    (GOOD.with_("parallel.shard", 2), "Parallel.shard: DeepSpeed's engine shards over all"),
    (GOOD.with_("parallel.sequence_parallel", True), "Parallel.sequence_parallel: DeepSpeed's engine has no tensor"),
    (GOOD.replace(parallel=_zero(0, "optimizer")), "Parallel.offload: with zero=0 the optimizer's state"),
    (GOOD.replace(parallel=_zero(2, "parameters")), "Parallel.offload: with zero=2 the weights stay whole"),
    (GOOD.replace(parallel=Parallel(dp=2, engine="torch", offload="optimizer")), "Parallel.offload: torch's engine"),
    (GOOD.replace(parallel=Parallel(dp=2, engine="torch", zero=1)), "Parallel.zero: torch's engine shards"),
    (GOOD.replace(parallel=_zero(0)).with_("training.precision", "bf16").with_("training.weights", "bf16"),
     "Training.weights: with zero=0 DeepSpeed"),
])
def test_refusals(experiment: Experiment, message: str) -> None:
    assert message in "\n".join(str(problem) for problem in experiment.check().errors)


def test_a_rounding_that_has_no_effect_is_told() -> None:
    pytest.importorskip("deepspeed")
    bf16 = GOOD.with_("training.precision", "bf16").with_("training.weights", "bf16")
    report = bf16.replace(optimizer=Lion(rounding="kahan")).check()
    assert report.ok
    assert "Lion.rounding: without effect: DeepSpeed keeps bf16 weights with an fp32 copy" in repr(report)


def test_a_missing_package_is_told_before_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert "DS_BUILD_OPS=0 pip install deepspeed" in repr(GOOD.check())
