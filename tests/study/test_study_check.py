"""What a study's check says is what each of its arms says."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import collie_lab as lab
from collie_lab.data.records import Corpus

DATA = {"kind": "instructions", "source": [{"prompt": "a", "completion": "b"}]}


def study_of(results: Path, methods: dict[str, Any], **data: Any) -> lab.Study:
    base = {"model": "llama-tiny", "data": {**DATA, **data}, "training": {"steps": 2, "batch_size": 2}}
    return lab.Study({"name": "toy", "base": base, "product": {"method": methods}}, results=results)


@pytest.mark.parametrize(("method", "data", "message"), [
    ({"adapter": {"kind": "prompt", "tokens": 20}}, {"max_length": 512}, "512 tokens do not fit"),
    ({"optimizer": {"kind": "muon"}, "adapter": {"kind": "freeze", "train": ["*norm*"]}}, {}, "names none"),
    ({"training.compile": True}, {}, "torch.compile needs a compiler"),
])
def test_no_arm_is_spared_for_the_data_that_it_shares(
        method: dict[str, Any], data: dict[str, Any], message: str, tmp_path: Path) -> None:
    study = study_of(tmp_path, {"AdamW": {}, "Other": method}, **data)
    with mock.patch("collie_lab.check_compile.missing_for_torch", return_value=("a compiler", "install one")):
        first, other = (arm.experiment.check() for arm in study.arms)
        report = study.check()
    assert first.ok
    assert message in repr(other)
    assert [(each.cell, each.field) for each in report.errors] == [(each.cell, each.field) for each in other.errors]
    assert message in repr(report)
    assert "(Other)" in repr(report)


def test_records_are_read_once_and_every_arm_is_named(tmp_path: Path) -> None:
    study = study_of(tmp_path, {"AdamW": {}, "Lion": {"optimizer": {"kind": "lion"}}}, source=[{"prompt": "a"}])
    with mock.patch.object(Corpus, "read_all", autospec=True, side_effect=Corpus.read_all) as read:
        problem, = study.check().errors
    assert read.call_count == 1
    assert problem.message.endswith("(AdamW; Lion)")
