"""The doctor finds what is right, what is wrong, and what cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import collie_lab as lab
from collie_lab import diagnosis, machine

TINY = lab.Model("llama-tiny", init="random")


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, lab.Pool]]:
    """Warm ranks by their number, whose start takes longer than all that they do here."""
    made: dict[int, lab.Pool] = {}
    yield made
    for pool in made.values():
        pool.close()


@pytest.fixture(autouse=True)
def _shared(pools: dict[int, lab.Pool], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every doctor has the same ranks, and ends all that it takes, which is put off."""
    used: list[lab.Pool] = []

    def pool(ranks: int) -> lab.Pool:
        if ranks not in pools:
            pools[ranks] = lab.Pool(ranks)
        used.append(pools[ranks])
        return pools[ranks]

    with monkeypatch.context() as patch:
        patch.setattr(diagnosis, "Pool", pool)
        patch.setattr(lab.Pool, "close", lambda pool: used.remove(pool))
        yield
    assert not used


@pytest.mark.ranks
def test_the_doctor_passes_what_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = lab.doctor(TINY, checks=["packing", "resume", "export", "tp", "pp_interleaved"], folder=tmp_path / "runs")
    assert found.ok, found
    assert list(found.table["result"]) == ["ok", "ok", "ok", "ok", "skipped"]
    assert found.table["difference"][1] == 0  # bit for bit
    assert "4 pipeline stages, but the model has 2 layers" in found.findings[-1].reason
    assert "s left" in capsys.readouterr().out
    assert "<td" in found._repr_html_()


@pytest.mark.ranks
def test_the_doctor_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def differs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        import os

        return F.cross_entropy(logits, labels, reduction="none") * (1 + 1e-3 * int(os.environ["WORLD_SIZE"]))

    base = diagnosis._base(TINY, 2)
    monkeypatch.setattr(diagnosis, "_base", lambda model, ranks: base.replace(
        training=base.training.replace(loss=differs)))
    found = lab.doctor(TINY, checks=["dp"], folder=tmp_path / "runs")
    assert not found.ok
    assert found.findings[0].result == "wrong"
    assert found.findings[0].difference > 1e-4


def test_the_tolerance_is_that_of_the_visible_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.setattr(machine, "_DRIVER", tmp_path)
    for visible, tolerance in (("0", 1e-4), ("", 1e-5)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert diagnosis._Launcher(tmp_path).tolerance == tolerance


def test_mistakes_raise_before_anything_starts() -> None:
    with pytest.raises(lab.CellError, match="unknown check 'tpp'"):
        lab.doctor(TINY, checks=["tpp"])
    with pytest.raises(lab.CellError, match=r"Model\.init"):
        lab.doctor("llama-tiny")
