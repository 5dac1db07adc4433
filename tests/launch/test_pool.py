"""Warm ranks: cells of the notebook on all of them, and runs that are those of new processes."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

import collie_lab as lab
from collie_lab.launch import RankError


def pools_in_temp() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("collie-pool-*"))


@pytest.fixture(scope="module", autouse=True)
def own_temp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Other tests that run at the same time have pools too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temp")))
        yield


@pytest.fixture(scope="module")
def pool(own_temp: None) -> Iterator[lab.Pool]:
    before, mark = pools_in_temp(), uuid.uuid4().hex
    with lab.Pool(2, env={toy.MARK: mark}, grace=1.0) as made:
        yield made
    toy.assert_gone(mark, seconds=1.0)
    assert pools_in_temp() <= before


def experiment(**fields: Any) -> lab.Experiment:
    return lab.Experiment(**{"model": lab.Model("llama-tiny", init="random"), "parallel": lab.Parallel(dp=2),
                             "training": lab.Training(steps=3, batch_size=8), **fields})


def test_what_ranks_print_comes_with_their_number(pool: lab.Pool, capsys: pytest.CaptureFixture[str]) -> None:
    pool.run("import sys\nprint('half', end=' ')\nprint('a line')\nprint('\\r10%\\r20%', file=sys.stderr)\nrank + 40")
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == ["[rank 0] 40", "[rank 0] half a line", "[rank 1] 41", "[rank 1] half a line"]
    assert sorted(err.splitlines()) == ["[rank 0] 20%", "[rank 1] 20%"]


def test_names_last_and_travel_both_ways(pool: lab.Pool) -> None:
    factor = 3
    pool.push(scale=lambda value: factor * value)
    pool.run("mine = torch.full((2,), float(rank))\ndist.all_reduce(mine)\nscaled = scale(rank)")
    assert lab.pull("scaled", rank=None) == [0, 3]
    assert lab.pull("{'sum': mine}")["sum"].tolist() == [1.0, 1.0]
    pool.run("from torch.distributed.tensor import distribute_tensor, Shard, init_device_mesh\n"
             "pieces = distribute_tensor(torch.arange(4.0), init_device_mesh('cpu', (2,)), [Shard(0)])")
    assert pool.pull("pieces").tolist() == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(lab.CellError, match="they are 0 to 1"):
        pool.pull("scaled", rank=2)


def test_an_exception_has_its_rank_and_line(pool: lab.Pool) -> None:
    with pytest.raises(RankError) as caught:
        pool.run("kept = 1\nif rank == 1:\n    raise KeyError('gone')  # this line is shown")
    assert caught.value.rank == 1
    assert "rank 1: KeyError: 'gone'" in str(caught.value)
    assert "raise KeyError('gone')  # this line is shown" in caught.value.traceback
    assert "cell.py" not in caught.value.traceback
    assert pool.pull("kept") == 1  # nobody waited for it: the ranks live on
    with pytest.raises(RankError, match="the same on rank 1"):
        pool.run("1 / 0")


def test_ranks_that_wait_in_vain_are_ended(pool: lab.Pool) -> None:
    with pytest.raises(RankError) as caught:
        pool.run("if rank == 1:\n    raise ValueError('out')\ndist.barrier()")
    assert caught.value.rank == 1
    assert "did not heed" in caught.value.others[0]
    assert not pool.alive
    with pytest.raises(RankError, match="NameError"):
        pool.run("kept")  # new ranks


def test_a_crash_is_named(pool: lab.Pool) -> None:
    with pytest.raises(RankError, match=r"rank 1: segmentation fault \(SIGSEGV\)"):
        pool.run("import os\nif rank == 1:\n    os.kill(os.getpid(), 11)\ndist.barrier()")


def meddles(trainer: Any) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.set_grad_enabled(trainer.step < 3)
    torch.backends.fp32_precision = "ieee"  # beside it torch refuses to tell the older setting


def test_warm_runs_are_those_of_new_processes(pool: lab.Pool, tmp_path: Path) -> None:
    """Other layouts, optimizers, an adapter and checkpoints in between leave no trace: losses are equal bit for bit."""
    first = experiment(training=lab.Training(steps=3, batch_size=8, micro_batch_size=2, checkpoint_every=2))
    chain = [first, first.replace(parallel=lab.Parallel(tp=2), optimizer=lab.Adan()),
             first.replace(parallel=lab.Parallel(dp=2, zero=3), optimizer=lab.AdaLomo(accumulate="hold")),
             first.replace(parallel=lab.Parallel(pp=2), optimizer=lab.Lion()),
             first.replace(adapter=lab.LoRA(r=2)), first.replace(callbacks=(meddles,)), first]
    runs = [exp.launch(pool=pool, folder=tmp_path, show=False) for exp in chain]
    cold = first.launch(folder=tmp_path, show=False)
    losses = [run.metrics["loss"].tolist() for run in (runs[0], runs[-1], cold)]
    assert losses[0] == losses[1] == losses[2]
    assert cold.summary["peak_bytes"] == pytest.approx(runs[-1].summary["peak_bytes"], rel=0.01)
    assert pool.alive
    assert [run.status for run in runs] == ["ok"] * 7
    assert not any(run.alive for run in runs)
    assert runs[0].folder.read("status.json")["exit_codes"] == {"0": 0, "1": 0}


def test_a_warm_run_stops_and_is_watched(pool: lab.Pool, tmp_path: Path) -> None:
    run = experiment(training=lab.Training(steps=100_000)).launch(pool=pool, folder=tmp_path, wait=False, show=False)
    with pytest.raises(lab.CellError, match="still busy"):
        pool.run("1")
    with pytest.raises(lab.CellError, match="still busy"):
        experiment().launch(pool=pool, folder=tmp_path, show=False)
    toy.wait_until(lambda: run.steps > 2)
    assert all("in run" in text for text in run.stacks().values())
    run.stop()
    assert run.wait(timeout=60) == "stopped"
    assert run.result["steps"] == run.steps
    assert pool.alive


def breaks(trainer: Any) -> None:
    if trainer.rank == 1 and trainer.step == 2:
        raise RuntimeError("in step 2")


def test_a_failed_run_ends_the_ranks_and_the_next_has_new_ones(pool: lab.Pool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 1: RuntimeError: in step 2") as caught:
        experiment(callbacks=(breaks,)).launch(pool=pool, folder=tmp_path, show=False)
    assert "in breaks" in caught.value.traceback
    assert "lend" not in caught.value.traceback
    toy.wait_until(lambda: not pool.alive)
    run = experiment().launch(pool=pool, folder=tmp_path, show=False)
    assert run.status == "ok"
    assert "new" not in run.logs()

    run = experiment(training=lab.Training(steps=100_000)).launch(pool=pool, folder=tmp_path, wait=False, show=False)
    toy.wait_until(lambda: run.steps > 1)
    run.kill()
    assert (run.status, run.detail) == ("stopped", "killed on request")
    toy.wait_until(lambda: not pool.alive)


@pytest.mark.parametrize(("fields", "options", "words"), [
    ({"parallel": lab.Parallel(dp=4)}, {}, "the layout has 4 ranks, the pool 2"),
    ({}, {"detach": True}, "launch.detach"),
    ({}, {"env": {"A": "1"}}, "launch.env"),
    ({}, {"max_restarts": 1}, "launch.max_restarts"),
])
def test_what_a_pool_cannot_do(pool: lab.Pool, tmp_path: Path, fields: Any, options: Any, words: str) -> None:
    with pytest.raises(lab.CellError, match=words):
        experiment(**fields).launch(pool=pool, folder=tmp_path / "runs", show=False, **options)
    assert not (tmp_path / "runs").exists()


def test_a_pool_needs_ranks() -> None:
    for wrong in (0, "2", 1.5):
        with pytest.raises(lab.CellError, match=r"Pool\.nproc"):
            lab.Pool(wrong)  # type: ignore[arg-type]


def test_the_magic(capsys: pytest.CaptureFixture[str]) -> None:
    from IPython.core.error import UsageError
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.testing.globalipapp import start_ipython  # noqa: F401  (the import alone makes no shell)

    shell = InteractiveShell()
    shell.run_line_magic("load_ext", "collie_lab")
    before = pools_in_temp()
    shell.run_cell_magic("ranks", "-n 1", "print('there', world_size)")
    assert capsys.readouterr().out == "[rank 0] there 1\n"
    assert lab.pull("rank") == 0
    with pytest.raises(UsageError):
        shell.run_cell_magic("ranks", "--no-such-option", "1")
    shell.magics_manager.registry["_RanksMagics"]._own.close()
    assert pools_in_temp() == before


def test_a_pool_that_is_forgotten_ends(mark: str) -> None:
    lab.Pool(1, env={toy.MARK: mark})
    toy.assert_gone(mark, seconds=5.0)


def test_a_pool_ends_with_its_process(mark: str, tmp_path: Path) -> None:
    """However that ends; here without a word."""
    before, child = pools_in_temp(), os.fork()
    if child == 0:
        pool = lab.Pool(1, env={toy.MARK: mark})
        (tmp_path / "made").touch()
        time.sleep(100)
        pool.close()
    toy.wait_until((tmp_path / "made").exists)
    os.kill(child, 9)
    os.waitpid(child, 0)
    toy.assert_gone(mark)
    assert pools_in_temp() == before
