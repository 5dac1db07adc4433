"""The doctor finds what is right, what is wrong, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import collie_lab as lab
from collie_lab import diagnosis

TINY = lab.Model("llama-tiny", init="random")


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


def test_mistakes_raise_before_anything_starts() -> None:
    with pytest.raises(lab.CellError, match="unknown check 'tpp'"):
        lab.doctor(TINY, checks=["tpp"])
    with pytest.raises(lab.CellError, match=r"Model\.init"):
        lab.doctor("llama-tiny")
