"""Optimizers of libraries: each against the library used directly, resumed, sharded, and refused."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from collie_lab import cells
from collie_lab.optim import build, parameter_groups
from collie_lab.optim.library import Chained, block_matrices
from collie_lab.training.checkpoint import Checkpointer
from collie_lab.training.restore import load_checkpoint
from tests.ranks import run_ranks

VOCABULARY, WIDTH, HIDDEN = 40, 32, 130
CELLS: dict[str, cells.LibraryOptimizer] = {
    "adafactor": cells.Adafactor(weight_decay=0.1, beta2_decay=-0.7, clip_threshold=1.5),
    "muon": cells.Muon(betas=(0.8, 0.95), momentum=0.9),
    "galore": cells.GaLore(weight_decay=0.1, rank=4, update_proj_gap=2),
    "apollo": cells.Apollo(weight_decay=0.1, rank=4, update_proj_gap=2, scale=2.0),
    "schedule_free": cells.ScheduleFree(lr=1e-2, weight_decay=0.1, warmup_steps=3),
    "adamw8bit": cells.AdamW8bit(lr=1e-2, weight_decay=0.1, block_size=64),
}
SCALED = {"blocks.0.*": 0.5}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gain = nn.LayerNorm(WIDTH), nn.Parameter(torch.tensor(1.0))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, scalars: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if not scalars:  # which FSDP2 cannot shard
            for block in self.blocks:
                del block.gain
                block.gain = 1.0
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, factor: float = 1.0) -> None:
    """Steps of given numbers: the data and the learning rate follow from them, as in a loop with a schedule."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    for step in range(first, last):
        ids = torch.randint(0, VOCABULARY, (8, 7), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
        (loss * factor).backward()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - 0.05 * step)
        optimizer.step()
        optimizer.zero_grad()


def same(one: nn.Module, two: nn.Module) -> None:
    for (name, left), right in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(left, right), name


def variant(kind: str) -> cells.LibraryOptimizer:
    pytest.importorskip(CELLS[kind].package)
    if kind in ("galore", "apollo"):
        pytest.importorskip("bitsandbytes")  # which both import
    return CELLS[kind]


def by_hand(kind: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The libraries as their manuals say, with the hyper-parameters of `CELLS`, decay and rates as `SCALED`."""
    def groups(names: Any, lr: float, decay: float, **more: Any) -> list[dict[str, Any]]:
        made = []
        for name, parameter in model.named_parameters():
            if names(name, parameter):
                decays = parameter.ndim == 2 and "embedding" not in name
                made.append({"params": [parameter], "lr": lr * (0.5 if name.startswith("blocks.0.") else 1.0),
                             "weight_decay": decay if decays else 0.0, **more})
        return made

    def matrix(name: str, parameter: Tensor) -> bool:
        return "blocks" in name and parameter.ndim == 2

    def rest(name: str, parameter: Tensor) -> bool:
        return not matrix(name, parameter)

    def every(name: str, parameter: Tensor) -> bool:
        return True

    if kind == "adafactor":
        return [torch.optim.Adafactor(groups(every, 1e-2, 0.1), beta2_decay=-0.7, d=1.5)]
    if kind == "muon":
        return [torch.optim.Muon(groups(matrix, 1e-3, 0.1), momentum=0.9, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(groups(rest, 1e-3, 0.1), betas=(0.8, 0.95))]
    if kind == "galore":
        low_rank = {"rank": 4, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std"}
        return [importlib.import_module("galore_torch").GaLoreAdamW(
            groups(matrix, 1e-2, 0.1, **low_rank) + groups(rest, 1e-2, 0.1), no_deprecation_warning=True)]
    if kind == "apollo":
        low_rank = {"rank": 4, "update_proj_gap": 2, "scale": 2.0, "proj_type": "std", "proj": "random",
                    "scale_type": "channel"}
        # Its seeds are places in the list: the same order as `parameter_groups` makes.
        made = {id(group["params"][0]): group
                for group in groups(matrix, 1e-2, 0.1, **low_rank) + groups(rest, 1e-2, 0.1)}
        order = parameter_groups(model, CELLS[kind].replace(lr_scale=SCALED))
        flat = [p for group in order for p in group["params"]]
        flat = [p for p in flat if "rank" in made[id(p)]] + [p for p in flat if "rank" not in made[id(p)]]
        return [importlib.import_module("apollo_torch").APOLLOAdamW([made[id(p)] for p in flat])]
    if kind == "schedule_free":
        optimizer = importlib.import_module("schedulefree").AdamWScheduleFree(
            groups(every, 1e-2, 0.1), warmup_steps=3)
        optimizer.train()
        return [optimizer]
    return [importlib.import_module("torchao.optim").AdamW8bit(groups(every, 1e-2, 0.1), block_size=64)]


@pytest.mark.parametrize("kind", CELLS)
def test_equals_the_library_bit_for_bit(kind: str) -> None:
    ours, theirs = Net(), Net()
    optimizer = build(variant(kind).replace(lr_scale=SCALED), ours)
    by = by_hand(kind, theirs)
    rates = [[float(group["lr"]) for group in one.param_groups] for one in by]
    steps(ours, optimizer, 0, 5)
    for step in range(5):
        ids = torch.randint(0, VOCABULARY, (8, 7), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(theirs(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        for one, peaks in zip(by, rates, strict=True):
            for group, peak in zip(one.param_groups, peaks, strict=True):
                rate = (0.5 if peak < max(peaks) else 1.0) * CELLS[kind].lr * (1 - 0.05 * step)
                group["lr"] = torch.tensor(rate) if kind == "adamw8bit" else rate
            with torch.compiler.set_stance("force_eager"):
                one.step()
            one.zero_grad()
    same(ours, theirs)
    if kind == "adamw8bit":
        assert any(key == "exp_avg.codes" for state in optimizer.state.values() for key in state)


@pytest.mark.parametrize("kind", CELLS)
def test_each_parameter_keeps_its_rate_and_decay(kind: str) -> None:
    model = Net()
    cell = variant(kind).replace(lr_scale=SCALED, weight_decay=0.2)
    optimizer = build(cell, model)
    wanted = {p: (group["lr"], group["weight_decay"]) for group in parameter_groups(model, cell)
              for p in group["params"]}
    got = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert got == wanted
    assert len(got) == len(list(model.parameters()))
    assert optimizer.param_groups[0]["lr"] == cell.lr


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("way", ["checkpoint", "state_dict"])
def test_resumed_equals_uninterrupted(kind: str, way: str, tmp_path: Path) -> None:
    cell = variant(kind)
    whole = Net()
    steps(whole, build(cell, whole), 0, 7)
    first = Net()
    optimizer = build(cell, first)
    steps(first, optimizer, 0, 4)
    second = Net()
    for parameter in second.parameters():
        nn.init.zeros_(parameter)
    resumed = build(cell, second)
    assert all(isinstance(value, Tensor) for state in optimizer.state.values() for value in state.values())
    if way == "checkpoint":
        with contextlib.closing(Checkpointer(tmp_path, keep=1)) as checkpoints:
            checkpoints.save(4, first, optimizer)
        assert load_checkpoint(tmp_path / "step-000004", second, resumed) == 4
    else:
        second.load_state_dict(first.state_dict())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in resumed.param_groups:
        group["initial_lr"] = cell.lr
    steps(second, resumed, 4, 7)
    same(whole, second)


@pytest.mark.parametrize("kind", CELLS)
def test_torch_schedulers_move_the_rate(kind: str) -> None:
    model = Net()
    optimizer = build(variant(kind), model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    model(torch.zeros(1, 1, dtype=torch.long)).sum().backward()
    optimizer.step()
    scheduler.step()
    before = copy.deepcopy(model)
    if kind != "schedule_free":  # whose average still moves
        optimizer.step()
        same(before, model)
    assert all(group["lr"] == 0.0 for group in optimizer.param_groups)


def test_muon_takes_the_matrices_of_blocks_alone() -> None:
    model = Net()
    optimizer = build(cells.Muon(), model)
    assert isinstance(optimizer, Chained)
    muon = {p for group in optimizer.parts[0].param_groups for p in group["params"]}
    assert muon == block_matrices(model) == {w for block in model.blocks for w in (block.up.weight, block.down.weight)}
    steps(model, optimizer, 0, 1)
    assert all(set(optimizer.state[p]) == {"momentum_buffer"} for p in muon)
    with pytest.raises(ValueError, match=r"nn\.ModuleList"):
        build(cells.Muon(), nn.Sequential(nn.Linear(3, 3)))


def test_schedule_free_evaluates_the_average() -> None:
    variant("schedule_free")
    model = Net()
    optimizer: Any = build(cells.ScheduleFree(lr=1e-2), model)
    steps(model, optimizer, 0, 3)
    training = copy.deepcopy(model)
    optimizer.eval()
    z = optimizer.state[model.head.weight]["z"]
    torch.testing.assert_close(model.head.weight.lerp(z, 0.1), training.head.weight)
    with pytest.raises(Exception, match="train mode"):
        optimizer.step()
    optimizer.train()
    torch.testing.assert_close(model.head.weight, training.head.weight)


@pytest.mark.parametrize("kind", ["adafactor", "adamw8bit"])
def test_bf16_weights_follow_fp32_ones(kind: str) -> None:
    """Two that need help with bf16: torch's eps1 of bf16 stops Adafactor; 8-bit AdamW has to round at random."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = Net(dtype)
        before = copy.deepcopy(model)
        cell = variant(kind).replace(lr=1e-2 if kind == "adafactor" else 1e-5, weight_decay=0.0)
        steps(model, build(cell, model), 0, 12, factor=1e-2)
        moved[dtype] = torch.cat([(a.float() - b.float()).flatten()
                                  for a, b in zip(model.blocks.parameters(), before.blocks.parameters(), strict=True)])
    assert torch.cosine_similarity(moved[torch.float32], moved[torch.bfloat16], dim=0) > (
        0.9 if kind == "adafactor" else 0.2)
    torch.testing.assert_close((moved[torch.float32] @ moved[torch.bfloat16]) / moved[torch.float32].square().sum(),
                               torch.tensor(1.0), atol=0.15, rtol=0)


def test_random_rounding_is_the_same_on_every_replica() -> None:
    ends = []
    for seed in (1, 2):
        model = Net(torch.bfloat16)
        optimizer = build(variant("adamw8bit"), model)
        torch.manual_seed(seed)
        steps(model, optimizer, 0, 2)
        assert torch.equal(torch.rand(()), torch.rand((), generator=torch.Generator().manual_seed(seed)))
        ends.append(model)
    same(*ends)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *args: Any) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    for kind in ("galore", "apollo", "schedule_free", "adamw8bit"):
        cell = CELLS[kind]
        with pytest.raises(ImportError, match=rf"{type(cell).__name__} needs .*pip install {cell.library}"):
            build(cell, Net())
    build(CELLS["muon"], Net())  # torch's own need nothing


def test_in_backward_is_refused() -> None:
    with pytest.raises(ValueError, match="after the backward pass"):
        build(cells.Muon(in_backward=True), Net())


@pytest.mark.ranks
def test_sharded_equals_whole_or_is_refused() -> None:
    run_ranks(_sharded, 2)


def _sharded() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for kind, cell in CELLS.items():
        model = Net(scalars=False)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if not cell.shardable:
            with pytest.raises(ValueError, match="cannot update sharded parameters"):
                build(cell, model)
            continue
        if kind == "schedule_free" and importlib.util.find_spec("schedulefree") is None:
            continue
        whole, start = Net(scalars=False), Net(scalars=False)
        steps(model, build(cell, model), 0, 4)
        steps(whole, build(cell, whole), 0, 4)
        for (name, ours), theirs, before in zip(model.named_parameters(), whole.parameters(), start.parameters(),
                                                strict=True):
            assert isinstance(ours, DTensor)
            distance = (ours.full_tensor() - theirs).norm() / (theirs - before).norm()
            # Muon orthogonalizes in bf16, and sharded products add up in another order.
            assert distance < (0.05 if kind == "muon" else 1e-5), (kind, name, float(distance))
