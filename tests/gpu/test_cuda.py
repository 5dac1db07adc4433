"""What only a GPU can show: the CUDA paths against the CPU's, memory, a launch from a kernel that uses CUDA."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import collie_lab as lab
from collie_lab.data import Documents
from collie_lab.folder import RunFolder
from collie_lab.launch import Run
from collie_lab.training.batch import collate
from collie_lab.training.model import build_model
from collie_lab.training.trainer import Trainer
from tests.ranks import losses, run_here

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

BASE = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), data=lab.Skills(size=100, test_size=20, packing=True, max_length=96),
    optimizer=lab.AdamW(lr=3e-3), evaluate=[lab.Perplexity(), lab.ExactMatch(limit=8, max_new_tokens=4)],
    training=lab.Training(steps=10, batch_size=8, micro_batch_size=4, clip_grad_norm=1.0, checkpoint_every=5),
)
ARMS = {
    "adamw": BASE, "sgd": BASE.replace(optimizer=lab.SGD(lr=0.1)), "lora": BASE.replace(adapter=lab.LoRA(r=4)),
    "lomo": BASE.replace(optimizer=lab.Lomo(lr=0.1), training=lab.Training(steps=10, batch_size=8)),
    "adalomo": BASE.replace(optimizer=lab.AdaLomo(lr=1e-2), training=lab.Training(steps=10, batch_size=8)),
    "sophia": BASE.replace(optimizer=lab.Sophia(lr=1e-3, hessian_every=4)),
    "clipped in two passes": BASE.replace(
        optimizer=lab.Lion(lr=1e-3, in_backward=True),
        training=lab.Training(steps=10, batch_size=8, clip_grad_norm=0.5)),
    "recompute": BASE.with_("training.recompute", "full"),
    "compiled": BASE.with_("training.compile", True),
    "compiled, recompute": BASE.replace(training=BASE.training.replace(compile=True, recompute="full")),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights from a CPU as a transformers folder: a GPU draws others."""
    folder = tmp_path_factory.mktemp("weights")
    build_model(BASE, torch.device("cpu")).causal_lm.save_pretrained(folder)
    return folder


def _on_gpu(experiment: lab.Experiment, folder: Path, cpu: RunFolder) -> RunFolder:
    """Train on the GPU with the data that the CPU run has prepared."""
    run = RunFolder(folder)
    for name in ("data", "tokenizer", "launch.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(cpu.path / name)
    run.checkpoints.mkdir()
    Trainer(experiment, run, torch.device("cuda", 0)).run()
    return run


@pytest.mark.parametrize("arm", ARMS)
def test_the_gpu_gives_the_curve_of_the_cpu(arm: str, weights: Path, tmp_path: Path) -> None:
    experiment = ARMS[arm].replace(model=lab.Model(weights, tokenizer="bytes"))
    cpu = run_here(experiment, tmp_path / "cpu")
    gpu = _on_gpu(experiment, tmp_path / "gpu", cpu)
    assert losses(gpu) == pytest.approx(losses(cpu), abs=1e-3)
    result = gpu.read("result.json")
    assert result["perplexity"] == pytest.approx(cpu.read("result.json")["perplexity"], rel=1e-3)
    assert result["peak_bytes"] > 0


def test_bf16_packed_attention_equals_each_document_alone() -> None:
    device = torch.device("cuda", 0)
    model, *_ = build_model(BASE, device)
    lengths = [40, 3, 64, 17]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.random.default_rng(0).integers(0, 300, offsets[-1]).astype(np.int32)
    learned = np.ones(len(tokens), dtype=np.bool_)
    learned[offsets[:-1]] = False
    documents = Documents(tokens, learned, offsets, np.zeros(0, dtype=np.int64))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        together = model(**collate(documents, np.arange(4), device, flat=True).inputs)
        alone = sum(model(**collate(documents, np.array([index]), device, flat=True).inputs) for index in range(4))
    assert together.item() == pytest.approx(alone.item(), rel=2e-3)


def test_random_weights_are_those_of_the_seed_and_their_spread_that_of_the_family() -> None:
    device = torch.device("cuda", 0)
    one, two = (build_model(BASE, device).causal_lm.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = build_model(BASE.with_("training.seed", 1), device).causal_lm.state_dict()
    matrices = [name for name, values in one.items() if values.ndim == 2]
    assert not any(torch.equal(one[name], other[name]) for name in matrices)
    assert all(one[name].std().item() == pytest.approx(0.02, rel=0.05) for name in matrices)
    state = torch.cuda.get_rng_state(device)
    torch.cuda.manual_seed(1)  # as the training does before: drawing weights leaves the generator alone
    assert torch.equal(torch.cuda.get_rng_state(device), state)


def test_lomo_frees_its_gradients(tmp_path: Path) -> None:
    big = BASE.replace(model=lab.Model("llama-5m", init="random"), training=lab.Training(steps=4, batch_size=2),
                       evaluate=[])
    peaks = {}
    for name, optimizer in (("sgd", lab.SGD(lr=0.01)), ("lomo", lab.Lomo(lr=0.01))):
        cpu = run_here(big.replace(optimizer=optimizer), tmp_path / f"{name}-cpu")
        peaks[name] = _on_gpu(big.replace(optimizer=optimizer), tmp_path / name, cpu).read("result.json")["peak_bytes"]
    assert peaks["lomo"] < peaks["sgd"]


def test_no_synchronisation_within_a_step(tmp_path: Path) -> None:
    """The loop must queue a whole step without waiting for the GPU: torch raises where something waits."""
    modes: list[str] = []

    def strict(trainer: Trainer) -> None:
        torch.cuda.set_sync_debug_mode("error" if trainer.step < 9 else "default")
        modes.append(str(torch.cuda.get_sync_debug_mode()))

    experiment = BASE.replace(callbacks=(strict,), training=lab.Training(steps=10, batch_size=8), evaluate=[])
    cpu = run_here(BASE.replace(training=experiment.training, evaluate=[]), tmp_path / "cpu")
    try:
        _on_gpu(experiment, tmp_path / "gpu", cpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(modes) == 10


def test_a_kernel_that_has_used_cuda_can_launch() -> None:
    """Launcher acceptance test 5."""
    torch.ones(1, device="cuda")
    run = BASE.replace(training=lab.Training(steps=2, batch_size=4), evaluate=[]).launch(show=False)
    assert run.status == "ok"
    records = (run.folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(records[-1])["memory_allocated"] > 0
    assert run.folder.read("env.json")["gpu"]


def test_a_profile_tells_kernels_and_who_launches_them(tmp_path: Path) -> None:
    experiment = BASE.replace(evaluate=[], training=lab.Training(steps=4, batch_size=8))
    cpu = run_here(experiment, tmp_path / "cpu")
    table = Run(_on_gpu(experiment.replace(callbacks=[lab.Profile(first=3, steps=2)]), tmp_path / "gpu", cpu)).profile
    kernels, operators = table[table["kernel"]], table[~table["kernel"]]
    assert (kernels["device"] > 0).all()
    assert {"aten::mm", "aten::embedding"} <= set(operators["operator"])
    # Some kernels have no operator: Triton's, which the optimizer starts itself.
    assert 0 < operators["device"].sum() <= kernels["device"].sum() * 1.001
