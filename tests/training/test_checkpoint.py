"""Checkpoints: written behind the training's back, whole or not there, and read by any layout."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessExitedException

from collie_lab.cells import AdaLomo, AdamW, Parallel
from collie_lab.folder import RunFolder, checkpoints_in, read_json
from collie_lab.optim import RuleOptimizer, build
from collie_lab.parallel import build_strategy
from collie_lab.training._share import choose_share
from collie_lab.training.checkpoint import Checkpointer, Written
from collie_lab.training.restore import load_checkpoint
from tests.ranks import run_ranks
from tests.training.layouts import LAYOUTS, lay_out, step, tiny, whole

OPTIMIZERS = {"adamw": AdamW(lr=1e-2), "adalomo": AdaLomo(lr=1e-2, in_backward=False)}


def trained(optimizer: str = "adamw", layout: str = "one", steps: int = 2) -> tuple[nn.Module, RuleOptimizer]:
    model = lay_out(tiny(), layout)
    made = build(OPTIMIZERS[optimizer], model, record_norm=True)
    assert isinstance(made, RuleOptimizer)
    for _ in range(steps):
        step(model, made)
    return model, made


def save(folder: Path, at: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int = 3) -> Path:
    with contextlib.closing(Checkpointer(folder, keep=keep)) as checkpoints:
        checkpoints.save(at, model, optimizer)
        checkpoints.finish()
    return folder / f"step-{at:06d}"


def content(model: nn.Module, optimizer: RuleOptimizer) -> dict[str, Tensor]:
    """Weights and states by name, whole."""
    found = {name: whole(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found |= {f"{name}|{key}": whole(value) for key, value in optimizer.state[parameter].items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# --- any layout to any other ------------------------------------------------------------------------


def _from_one_to_layouts_and_back(folder: str, layouts: list[str]) -> None:
    """Load what one process has written; find it equal; write it again."""
    for layout in layouts:
        for kind in OPTIMIZERS:
            model, optimizer = trained(kind, layout, steps=0)
            path = Path(folder, kind, "step-000002")
            assert load_checkpoint(path, model, optimizer) == 2
            reference, other = trained(kind, steps=0)
            load_checkpoint(path, reference, other)
            expected, mine = content(reference, other), content(model, optimizer)
            assert_equal({name: expected[name] for name in mine}, mine)
            assert optimizer.norm is not None
            save(Path(folder, kind, layout), 2, model, optimizer)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 4])
def test_one_process_to_a_layout_and_back(ranks: int, tmp_path: Path) -> None:
    layouts = [layout for layout, size in LAYOUTS.items() if size == ranks]
    expected = {}
    for kind in OPTIMIZERS:
        model, optimizer = trained(kind)
        expected[kind] = content(model, optimizer)
        save(tmp_path / kind, 2, model, optimizer)
    run_ranks(_two_ranks if ranks == 2 else _four_ranks, ranks, str(tmp_path), layouts)
    for layout in layouts:
        for kind, wanted in expected.items():
            model, optimizer = trained(kind, steps=0)
            load_checkpoint(tmp_path / kind / layout / "step-000002", model, optimizer)
            assert_equal(wanted, content(model, optimizer))


def _two_ranks(folder: str, layouts: list[str]) -> None:
    _from_one_to_layouts_and_back(folder, layouts)
    _two_layouts_of_one_name()


def _four_ranks(folder: str, layouts: list[str]) -> None:
    _from_one_to_layouts_and_back(folder, layouts)
    _between_layouts(str(Path(folder, "between")))


def _between_layouts(folder: str) -> None:
    """Written by pipeline stages, read under tensor parallelism with FSDP2; refused where it does not fit."""
    model, optimizer = trained("adamw", "pipeline x zero3")
    mine = content(model, optimizer)
    path = save(Path(folder), 2, model, optimizer)
    _each_piece_is_written_once(model)
    other, made = trained("adamw", "tp x zero3", steps=0)
    load_checkpoint(path, other, made)
    theirs = content(other, made)
    assert_equal(mine, {name: theirs[name] for name in mine})
    _a_missing_name_raises_on_all_ranks(path)


def _each_piece_is_written_once(model: nn.Module) -> None:
    state = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    items = choose_share(state, dist.group.WORLD)
    everyone: list[list[tuple[str, object]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, [(item.index.fqn, item.index.offset) for item in items])
    pieces = [piece for theirs in everyone for piece in theirs]
    assert len(set(pieces)) == len(pieces) == 2 * len(list(tiny().parameters()))  # cut in two each
    assert max(map(len, everyone)) < len(pieces) / 2


def _a_missing_name_raises_on_all_ranks(path: Path) -> None:
    """One rank alone has a name that is not in the file; nobody loads anything."""
    model, optimizer = trained("adamw", "one", steps=0)
    if dist.get_rank() == 1:
        model.register_parameter("more", nn.Parameter(torch.zeros(1)))
    before = content(model, optimizer)
    with pytest.raises(ValueError, match=r"has no 'model.more'"):
        load_checkpoint(path, model, optimizer)
    assert_equal(before, content(model, optimizer))


def _two_layouts_of_one_name() -> None:
    """A tied weight that one stage keeps whole and another cuts: the first one's way is written."""
    weight = torch.arange(6.0)
    cut = lay_out(tiny(), "zero3")
    piece = next(parameter for parameter in cut.parameters() if isinstance(parameter, DTensor)).detach()
    state = {"weight": weight if dist.get_rank() == 0 else piece}
    items = choose_share(state, dist.group.WORLD)
    assert [item.index.fqn for item in items] == (["weight"] if dist.get_rank() == 0 else [])


@pytest.mark.parametrize(("saved", "layout", "seed", "restored"), [
    ({"dp": 1}, {"dp": 1}, 5, True), ({"dp": 1}, {"dp": 2}, 5, False),
])
def test_random_state_is_restored_in_the_same_layout_and_seeded_in_another(
        saved: dict[str, int], layout: dict[str, int], seed: int, restored: bool, tmp_path: Path) -> None:
    model, optimizer = trained()
    with contextlib.closing(Checkpointer(tmp_path, keep=1, layout=saved)) as checkpoints:
        torch.manual_seed(77)
        checkpoints.save(2, model, optimizer)
        expected = torch.rand(3)
    draws = []
    for number in (seed, seed, seed + 1):
        load_checkpoint(tmp_path / "step-000002", model, optimizer, layout=layout, seed=number)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2]) is restored
    assert torch.equal(draws[0], expected) is restored


# --- in the background ------------------------------------------------------------------------------


@contextlib.contextmanager
def held_writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writers wait until the event is set."""
    go, write = threading.Event(), FileSystemWriter.write_data

    def wait(*args: object, **kwargs: object) -> object:
        assert go.wait(60)
        return write(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(FileSystemWriter, "write_data", wait)
    try:
        yield go
    finally:
        go.set()


def test_weights_may_change_as_soon_as_save_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    expected = content(model, optimizer)
    told: list[Written] = []
    with held_writer(monkeypatch) as go, contextlib.closing(
            Checkpointer(tmp_path, keep=2, on_written=told.append)) as checkpoints:
        checkpoints.save(2, model, optimizer)
        step(model, optimizer)
        checkpoints.poll()
        assert told == []
        assert checkpoints_in(tmp_path) == []
        go.set()
        checkpoints.finish()
        assert [(one.step, one.path) for one in told] == [(2, tmp_path / "step-000002")]
    assert not torch.equal(expected["model.norm.weight"], content(model, optimizer)["model.norm.weight"])
    load_checkpoint(tmp_path / "step-000002", model, optimizer)
    assert_equal(expected, content(model, optimizer))


def test_one_write_at_a_time_and_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    active, most = [0], [0]
    write = FileSystemWriter.write_data

    def count(*args: object, **kwargs: object) -> object:
        active[0] += 1
        most[0] = max(most[0], active[0])
        try:
            return write(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            active[0] -= 1

    monkeypatch.setattr(FileSystemWriter, "write_data", count)
    with contextlib.closing(Checkpointer(tmp_path, keep=2, identity={"seed": 3}, layout={"dp": 1})) as checkpoints:
        for at in (8, 9, 10, 10, 11):
            checkpoints.save(at, model, optimizer)
    assert most == [1]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000010", "step-000011"]
    assert read_json(tmp_path / "step-000011" / "state.json") == {
        "step": 11, "world_size": 1, "layout": {"dp": 1}, "identity": {"seed": 3}}
    for at in (12, 13, 14):
        save(tmp_path, at, model, optimizer, keep=4)
    assert [path.name for path in checkpoints_in(tmp_path)] == [f"step-{at:06d}" for at in (11, 12, 13, 14)]
    # A run that was resumed further back keeps what it writes.
    assert save(tmp_path, 5, model, optimizer, keep=1).is_dir()


def test_a_disk_that_fails_raises_in_the_loop(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = tmp_path / "checkpoints"
    with contextlib.closing(Checkpointer(folder, keep=1)) as checkpoints:
        folder.rmdir()
        folder.touch()  # no folder: nothing can be written into it
        checkpoints.save(2, model, optimizer)
        with pytest.raises(RuntimeError, match=r"checkpoint of step 2 could not be written to .*checkpoints"):
            checkpoints.finish()


def test_a_file_that_is_held_open_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS the folder of a deleted file that is open stays until it is closed."""
    model, optimizer = trained()

    def held(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    with contextlib.closing(Checkpointer(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(2, model, optimizer)
        checkpoints.finish()
        with monkeypatch.context() as patch:
            patch.setattr(os, "rmdir", held)
            checkpoints.save(3, model, optimizer)
            checkpoints.finish()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-000003"]
    save(tmp_path, 4, model, optimizer, keep=1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000004"]


def _two_runs(folder: str) -> None:
    def groups() -> int:
        return len(dist.distributed_c10d._world.pg_map)

    counts = []
    for run in "ab":
        build_strategy(Parallel(dp=2, zero=3), torch.device("cpu"), "fp32")
        Checkpointer(Path(folder) / run, keep=1).close()
        counts.append(groups())
    assert counts[0] == counts[1]


@pytest.mark.ranks
def test_runs_of_a_pool_share_their_groups(tmp_path: Path) -> None:
    run_ranks(_two_runs, 2, str(tmp_path))


# --- killed -----------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from tests.training.test_checkpoint import save, trained
model, optimizer = trained()
save(Path(sys.argv[1]), 2, model, optimizer)
FileSystemWriter.finish = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
save(Path(sys.argv[1]), 3, model, optimizer)
"""


def test_killed_in_the_middle_the_checkpoint_before_still_loads(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(run.checkpoints)], cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    before = run.checkpoints / "step-000002"
    assert len(list(run.checkpoints.iterdir())) == 2  # the other has all its tensors, and no name
    assert checkpoints_in(run.checkpoints) == [before]
    assert run.latest_checkpoint() == before
    model, optimizer = trained(steps=0)
    assert load_checkpoint(before, model, optimizer) == 2
    assert_equal(content(*trained()), content(model, optimizer))
    save(run.checkpoints, 4, model, optimizer)  # who goes on cleans up
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["step-000002", "step-000004"]


def _one_rank_dies(folder: str) -> None:
    model, optimizer = trained("adamw", "zero3")
    save(Path(folder), 2, model, optimizer)
    if dist.get_rank() == 1:
        FileSystemWriter.write_data = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    save(Path(folder), 3, model, optimizer)


@pytest.mark.ranks
def test_a_rank_killed_in_the_middle(tmp_path: Path) -> None:
    with pytest.raises((ProcessExitedException, RuntimeError)):
        run_ranks(_one_rank_dies, 2, str(tmp_path))
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-000002"]
    model, optimizer = trained(steps=0)
    assert load_checkpoint(tmp_path / "step-000002", model, optimizer) == 2


# --- refused ----------------------------------------------------------------------------------------


def _cut_short(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 100)


@pytest.mark.parametrize(("damage", "fields", "reason"), [
    (_cut_short, {}, "cut short"),
    (lambda path: (path / "state.json").unlink(), {}, "no state.json"),
    (lambda path: (path / ".metadata").unlink(), {}, "metadata"),
    (lambda path: None, {"num_hidden_layers": 1}, r"the model has no 'model.model.layers.1"),
    (lambda path: None, {"num_hidden_layers": 3}, r"has no 'model.model.layers.2"),
    (lambda path: None, {"vocab_size": 40}, r"is \(320, 64\) in .*, and \(40, 64\) here"),
])
def test_what_does_not_fit_is_refused_before_anything_changes(
        damage: object, fields: dict[str, int], reason: str, tmp_path: Path) -> None:
    path = save(tmp_path, 2, *trained())
    damage(path)  # type: ignore[operator]
    model = tiny(**fields)
    optimizer = build(OPTIMIZERS["adamw"], model)
    assert isinstance(optimizer, RuleOptimizer)
    before, state = content(model, optimizer), torch.get_rng_state()
    with pytest.raises((ValueError, OSError), match=reason):
        load_checkpoint(path, model, optimizer)
    assert_equal(before, content(model, optimizer))
    assert torch.equal(state, torch.get_rng_state())
