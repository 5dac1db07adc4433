"""A run with compiled blocks against the same one as it comes: losses, names, what it tells, how often it compiles."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from collie_lab import (
    AdamW,
    CellError,
    Experiment,
    Lomo,
    LoRA,
    Model,
    Parallel,
    Perplexity,
    QLoRA,
    RandomTokens,
    Skills,
    Training,
)
from collie_lab import check_compile as checks
from collie_lab.cells import SHAPES
from collie_lab.check import check, check_cells
from collie_lab.check_compile import compile_problems
from collie_lab.folder import RunFolder
from collie_lab.training import blocks
from collie_lab.training.blocks import wrap_blocks
from collie_lab.training.packed import PackedLayout
from tests.ranks import losses, run_here, run_ranks

CPU = torch.device("cpu")
BASE = Experiment(
    model=Model("llama-tiny", init="random", config={"num_hidden_layers": 2}),
    data=Skills(size=100, test_size=10, packing=True, max_length=96),
    optimizer=AdamW(lr=3e-3),
    training=Training(steps=5, batch_size=4, clip_grad_norm=1.0, export=False, checkpoint_every=3),
)
COMPILED = BASE.with_("training.compile", True)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are made and differentiated as always, and run without kernels of their own: in a tenth of the time."""
    monkeypatch.setattr(blocks, "BACKEND", "aot_eager")


def _events(run: RunFolder, kind: str) -> list[str]:
    lines = (run.path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event["text"] for event in map(json.loads, lines) if event["kind"] == kind]


def test_losses_and_evaluations_are_those_of_the_eager_run(tmp_path: Path) -> None:
    """With the kernels of the compiler: a document at a time, of any length."""
    alone = {"data": Skills(size=100, test_size=10, max_length=96), "evaluate": (Perplexity(limit=4, every=2),)}
    eager, compiled = (run_here(each.replace(**alone).with_("training.micro_batch_size", 1), tmp_path / name)
                       for name, each in (("eager", BASE), ("compiled", COMPILED)))
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
    assert compiled.read("result.json")["nll"] == pytest.approx(eager.read("result.json")["nll"], rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 2  # of the first length, and of any
    assert not counters["graph_break"]


@pytest.mark.usefixtures("traced")
def test_a_run_goes_on_compiled_from_an_eager_checkpoint_and_back(tmp_path: Path) -> None:
    eager, compiled = run_here(BASE, tmp_path / "eager"), run_here(COMPILED, tmp_path / "compiled")
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 8  # four pieces of a block, each for one length and for any
    assert _events(compiled, "phase").count("compiling the model") == 2  # in the first steps
    assert not _events(compiled, "warning")
    for name, experiment, before in (("there", COMPILED, eager), ("back", BASE, compiled)):
        resumed = run_here(experiment, tmp_path / name, before.checkpoints / "step-000003")
        assert losses(resumed) == pytest.approx(losses(eager)[3:], rel=1e-5)


ARMS = {
    "lomo": BASE.replace(optimizer=Lomo(lr=0.1)),  # clipped in two passes
    "lora": BASE.replace(adapter=LoRA(r=4), data=RandomTokens(length=32, documents=16)),  # a graph for the first block
    "recompute": BASE.with_("training.recompute", "full").with_("training.micro_batch_size", 2),
}
GRAPHS = {"lomo": 8, "lora": 2, "recompute": 8}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", ARMS)
def test_what_works_uncompiled_works_compiled(name: str, tmp_path: Path) -> None:
    eager = run_here(ARMS[name], tmp_path / "eager")
    compiled = run_here(ARMS[name].with_("training.compile", True), tmp_path / "compiled")
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
    assert counters["stats"]["unique_graphs"] == GRAPHS[name]
    assert not _events(compiled, "warning")


def _reset_and_listen(trainer: Any) -> None:
    """A callback: the compiler forgets all, and somebody listens to a module inside of a block."""
    mlp = trainer.model.model.layers[0].mlp
    if trainer.step == 2:
        torch.compiler.reset()
        trainer.heard = []
        mlp.register_forward_hook(lambda *_: trainer.heard.append(trainer.step))
    if trainer.step == trainer.experiment.training.steps:
        trainer.event("heard", text=str(trainer.heard))


@pytest.mark.usefixtures("traced")
def test_what_callbacks_may_do_to_a_compiled_model(tmp_path: Path) -> None:
    handlers = len(logging.getLogger("torch._dynamo.convert_frame").handlers)
    run = run_here(COMPILED.replace(callbacks=(_reset_and_listen,)), tmp_path / "run")
    assert run.read("result.json")["status"] == "ok"
    assert _events(run, "heard") == ["[3, 4, 5]"]
    assert len(logging.getLogger("torch._dynamo.convert_frame").handlers) == handlers


@pytest.mark.usefixtures("traced")
def test_padded_rows_are_one_graph_for_any_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "test", {
        "model_type": "gemma2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 320,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 16})
    padded = BASE.replace(model=Model("test", init="random"), data=Skills(size=100, test_size=10, max_length=96))
    eager, compiled = (run_here(padded.with_("training.compile", each), tmp_path / str(each)) for each in (False, True))
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
    assert counters["stats"]["unique_graphs"] <= 6  # attention over a window and over all, with a mask and without
    assert not counters["graph_break"]


def _train(folder: str, layouts: dict[str, Parallel]) -> None:
    blocks.BACKEND = "aot_eager"
    for name, cell in layouts.items():
        run_here(COMPILED.replace(parallel=cell), Path(folder) / name)


def _assert_curves_of_one_process(folder: Path, layouts: dict[str, Parallel]) -> None:
    run_ranks(_train, 2, str(folder), layouts)
    expected = losses(run_here(BASE, folder / "one"))
    for name in layouts:
        run = RunFolder(folder / name)
        assert losses(run) == pytest.approx(expected, abs=1e-5), name
        assert not _events(run, "warning"), name


@pytest.mark.ranks
def test_every_layout_gives_the_curve_of_one_process(tmp_path: Path) -> None:
    _assert_curves_of_one_process(tmp_path, {"replicas": Parallel(dp=2), "zero": Parallel(dp=2, zero=3),
                                             "tensor": Parallel(tp=2), "pipeline": Parallel(pp=2)})


@pytest.mark.ranks
def test_deepspeed_gives_the_curve_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    _assert_curves_of_one_process(tmp_path, {"replicas": Parallel(dp=2, engine="deepspeed"), "offload": Parallel(
        dp=2, engine="deepspeed", zero=2, offload="optimizer")})


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: Tensor, packed: PackedLayout) -> Tensor:
        attend = packed.attend
        return self.linear(hidden) if attend is None else self.linear(hidden) * 2


class _Blocks(nn.Module):
    _no_split_modules = ("_Block",)

    def __init__(self) -> None:
        super().__init__()
        self.block = _Block()

    def forward(self, lengths: list[int]) -> bool:
        """Whether attention is kept out of the graph."""
        hidden = torch.ones(sum(lengths), 4)
        out = self.block(hidden, packed=PackedLayout.build(np.array(lengths), CPU))
        return not torch.allclose(out, self.block.linear(hidden))


@pytest.mark.usefixtures("traced")
def test_attention_is_in_the_graph_while_documents_are_as_many_and_equal() -> None:
    model = _Blocks()
    names = [name for name, _ in model.named_parameters()]
    wrap_blocks(model, recompute=False, compiled=True)
    assert [name for name, _ in model.named_parameters()] == names
    assert [model(lengths) for lengths in ([9, 9], [7, 7], [5, 5])] == [False] * 3
    assert [model(lengths) for lengths in ([9, 4], [9, 9])] == [True] * 2
    other = _Blocks()
    wrap_blocks(other, recompute=False, compiled=True)
    assert [other(lengths) for lengths in ([9, 9], [9, 9, 9], [9, 9])] == [False, True, True]


@pytest.mark.usefixtures("traced")
def test_a_compiler_that_gives_up_is_told_of(tmp_path: Path) -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        run = run_here(COMPILED, tmp_path / "run")
    assert losses(run) == pytest.approx(losses(run_here(BASE, tmp_path / "eager")), rel=1e-5)
    warnings = _events(run, "warning")
    assert warnings
    assert all("runs uncompiled" in text and "compile=False" in text for text in warnings)


def test_a_failure_of_the_compiler_names_the_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(blocks, "BACKEND", broken)
    with pytest.raises(RuntimeError, match=r"Training\.compile: .*LlamaDecoderLayer.*no space left.*compile=False"):
        run_here(COMPILED, tmp_path / "run")


@pytest.mark.parametrize(("change", "words"), [
    ({"parallel": Parallel(dp=2, engine="deepspeed", zero=3)}, "DeepSpeed"),
    ({"parallel": Parallel(pp=2, schedule="zero_bubble")}, "zero_bubble"),
    ({"adapter": QLoRA()}, "four-bit"),
])
def test_what_cannot_be_compiled_is_refused(change: dict[str, object], words: str) -> None:
    found = [problem for problem in check_cells(COMPILED.replace(**change)).errors if problem.field == "compile"]
    assert len(found) == 1
    assert words in found[0].message
    assert "compile=False" in found[0].remedy
    assert not [each for each in check_cells(BASE.replace(**change)).errors if each.field == "compile"]


@pytest.mark.parametrize("config", [
    {"model_type": "mamba"}, {"model_type": "minimax"}, {"model_type": "qwen3_next", "text_config": None},
    {"model_type": "granitemoehybrid", "layer_types": ["attention", "mamba"]},
], ids=lambda config: config["model_type"])
def test_a_family_with_a_state_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = Model(str(tmp_path), init="random")
    problems = check_cells(COMPILED.replace(model=model)).errors
    assert [problem.field for problem in problems if problem.cell == "Training"] == ["compile"]


def test_a_hybrid_of_attention_alone_is_not(tmp_path: Path) -> None:
    assert not list(compile_problems(COMPILED, {"model_type": "granitemoehybrid", "layer_types": ["attention"] * 2}))
    assert not list(compile_problems(COMPILED, {"model_type": "llama", "text_config": None}))


def test_a_missing_compiler_is_told_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "missing_for_torch", lambda: ("a C++ compiler", "install one"))
    assert check(BASE).ok
    with pytest.raises(CellError, match=r"Training\.compile: .*C\+\+ compiler.*install one, or compile=False"):
        check(COMPILED).raise_for_errors()
