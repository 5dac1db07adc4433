"""Layouts that cannot be: an error with its remedy, before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

import collie_lab as lab

TINY = lab.Model("llama-tiny", init="random", config={"num_hidden_layers": 4})  # 4 heads


def _experiment(parallel: lab.Parallel, **cells: Any) -> lab.Experiment:
    cells.setdefault("training", lab.Training(batch_size=8))
    return lab.Experiment(**{"model": TINY, **cells}, parallel=parallel)



ERRORS = [
    (lambda: _experiment(lab.Parallel(tp=3)), "Parallel.tp: 3 ranks cannot share num_attention_heads=4 equally"),
    (lambda: _experiment(lab.Parallel(tp=8)), "Parallel.tp: 8 ranks cannot share num_attention_heads=4 equally"),
    (lambda: _experiment(lab.Parallel(tp=2), optimizer=lab.Adafactor()), "Parallel.tp: Adafactor cannot update pieces"),
    (lambda: _experiment(lab.Parallel(pp=8)), "Parallel.pp: 8 pipeline stages, but the model has 4 layers"),
    (lambda: _experiment(lab.Parallel(pp=4, schedule="interleaved")), "8 pipeline stages, but the model has 4 layers"),
    (lambda: _experiment(lab.Parallel(pp=4, dp=4)), "2 micro-batches cannot fill 4 pipeline stages → "
     "Training(batch_size=...) of at least 16"),
    (lambda: _experiment(lab.Parallel(pp=2, schedule="interleaved"), training=lab.Training(batch_size=9)),
     "Parallel.micro_batches: schedule='interleaved' deals micro-batches in equal rounds of at least pp=2, which 9 "),
    (lambda: _experiment(lab.Parallel(pp=2, micro_batches=3)), "Parallel.micro_batches: 3 does not divide the 8"),
    (lambda: _experiment(lab.Parallel(pp=2, micro_batches=4), training=lab.Training(batch_size=8, micro_batch_size=1)),
     "4 micro-batches of 8 sequences are not of Training.micro_batch_size=1 → give one of the two"),
    (lambda: _experiment(lab.Parallel(pp=2, dp=2, zero=2, schedule="zero_bubble")), "Parallel.schedule: zero_bubble"),
    (lambda: _experiment(lab.Parallel(pp=2), optimizer=lab.Lomo()), "Lomo.accumulate: in a pipeline nothing can"),
    (lambda: _experiment(lab.Parallel(dp=4, shard=3)), "Parallel: shard=3 does not divide dp=4"),
]
WARNINGS = [
    (lab.Parallel(zero=3), "Parallel.zero: nothing to shard on one data-parallel rank"),
    (lab.Parallel(dp=2, sequence_parallel=True), "Parallel.sequence_parallel: without effect"),
    (lab.Parallel(dp=2, shard=2), "Parallel.shard: without effect"),
    (lab.Parallel(dp=2, schedule="gpipe"), "Parallel.schedule: without effect"),
    (lab.Parallel(pp=2, dp=2, zero=3), "Parallel.zero: in a pipeline weights stay gathered"),
]


@pytest.mark.parametrize(("make", "text"), ERRORS)
def test_a_layout_that_cannot_be_is_an_error(make: Any, text: str) -> None:
    with pytest.raises(lab.CellError) as caught:
        make().check().raise_for_errors()
    assert text in str(caught.value)


@pytest.mark.parametrize(("cell", "text"), WARNINGS)
def test_an_option_without_effect_warns(cell: lab.Parallel, text: str) -> None:
    report = _experiment(cell).check()
    assert report.ok, report
    assert any(text in str(problem) for problem in report.warnings), report


def test_a_family_without_plans_says_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lab.cells.SHAPES, "gpt2-test", {
        "model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 320, "n_positions": 512})
    model = lab.Model("gpt2-test", init="random")
    for cell, kind in ((lab.Parallel(tp=2), "tensor-parallel"), (lab.Parallel(pp=2), "pipeline")):
        report = _experiment(cell, model=model).check()
        assert f"no {kind} plan for the family gpt2 →" in str(report.errors[0])
        assert "dp and zero work" in str(report.errors[0])
    assert _experiment(lab.Parallel(dp=2, zero=3), model=model).check().ok


def test_layouts_that_fit_have_no_problems() -> None:
    for cell in (lab.Parallel(tp=2), lab.Parallel(pp=2), lab.Parallel(dp=2, tp=2, zero=3),
                 lab.Parallel(dp=4, zero=2, shard=2), lab.Parallel(pp=2, tp=2, dp=2),
                 lab.Parallel(tp=2, sequence_parallel=True)):
        assert not _experiment(cell).check().problems


def test_micro_batches_of_a_pipeline_fill_its_stages() -> None:
    cell = lab.Parallel(pp=2, dp=2)
    assert cell.micro_batch_size(32, None) == 2  # 16 sequences a rank in 8 micro-batches
    assert cell.micro_batch_size(32, 4) == 4
    assert lab.Parallel(pp=2, micro_batches=4).micro_batch_size(32, None) == 8
    assert lab.Parallel(dp=2).micro_batch_size(32, None) == 16


def test_an_engine_that_nobody_has_set_is_chosen_anew() -> None:
    cell = lab.Parallel(dp=2, zero=1)
    assert (cell.engine, cell.replace(zero=3).engine) == ("deepspeed", "torch")
    assert lab.Parallel(dp=2, zero=2, engine="deepspeed").replace(zero=3).engine == "deepspeed"
