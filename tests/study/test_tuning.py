"""Tuning: trials at the first seed, the other seeds at the best value."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import collie_lab as lab
from collie_lab.folder import read_json
from collie_lab.study.arms import Arm, arms_of
from collie_lab.study.grid import Grid
from collie_lab.study.tuning import Tuning
from tests.study.grids import fake_command

GRID: dict[str, Any] = {
    "name": "toy", "seeds": [5, 6, 7], "tune": {"axis": "optimizer.lr", "metric": "exact_match"},
    "base": {"model": "llama-tiny", "evaluate": [{"kind": "exact_match"}]},
    "product": {"method": {"AdamW": {"optimizer": {"kind": "adamw"}, "optimizer.lr": [1e-4, 1e-3]},
                           "Lion": {"optimizer": {"kind": "lion"}, "optimizer.lr": [1e-5, 1e-4]}}},
    "include": [{"method": "SGD", "optimizer": {"kind": "sgd"}, "optimizer.lr": 0.1, "seed": 5}],
}
TRIALS = ["AdamW, lr=0.0001, seed=5", "AdamW, lr=0.001, seed=5", "Lion, lr=1e-05, seed=5", "Lion, lr=0.0001, seed=5"]


def names(outcomes: dict[str, tuple[str, float | None]], **keys: Any) -> list[str]:
    grid = Grid.read({**GRID, **keys})

    def outcome(arm: Arm) -> tuple[str, dict[str, Any]]:
        status, value = outcomes.get(arm.name, ("pending", None))
        return status, {"exact_match": value}

    tuning = Tuning(grid.tune, arms_of(grid, Path("results")), outcome)
    assert tuning.count == 9
    return [arm.name for arm in tuning.known()]


def test_the_other_seeds_wait_for_the_best_value() -> None:
    others = ["SGD, lr=0.1, seed=5"]
    assert names({}) == [*TRIALS, *others]
    half = {TRIALS[0]: ("ok", 0.2)}
    assert names(half) == [*TRIALS, *others]
    found = names({**half, TRIALS[1]: ("ok", 0.1)})  # more exact matches are better
    assert [name for name in found if name not in (*TRIALS, *others)] == [
        "AdamW, lr=0.0001, seed=6", "AdamW, lr=0.0001, seed=7"]


def test_what_failed_is_not_chosen_and_where_all_failed_nothing_is() -> None:
    failed = {TRIALS[0]: ("diverged", 0.9), TRIALS[1]: ("ok", 0.1)}
    assert "AdamW, lr=0.001, seed=7" in names(failed)
    assert names({TRIALS[0]: ("cuda_oom", None), TRIALS[1]: ("error", None)}) == [*TRIALS, "SGD, lr=0.1, seed=5"]
    assert "AdamW, lr=0.001, seed=7" not in names({TRIALS[0]: ("lost", None), TRIALS[1]: ("ok", 0.1)})


def test_budgets_are_equal_and_the_metric_is_known() -> None:
    unequal = {"method": {**GRID["product"]["method"], "LOMO": {"optimizer": {"kind": "lomo"}, "optimizer.lr": [1.0]}}}
    for keys, words in (
        ({"product": unequal}, "different numbers of values are tried: AdamW: 2, Lion: 2, LOMO: 1"),
        ({"tune": {"axis": "optimizer.lr", "metric": "bleu"}}, "less or more of 'bleu' is better"),
        ({"tune": {"axis": "optimizer.lr", "metric": "perplexity", "better": "min"}},
         "Grid.tune.metric: nothing gives 'perplexity' of AdamW, lr=0.0001, seed=5 → an evaluation that does; "
         "given are: loss, exact_match, seconds"),
        ({"tune": {"axis": "method", "metric": "loss", "mode": "min"}}, "unknown field"),
    ):
        with pytest.raises(lab.CellError) as error:
            lab.Study({**GRID, **keys})
        assert words in str(error.value)


@pytest.mark.parametrize(("metric", "base"), [
    ("peak_bytes", {}), ("exact_match_se", {}), ("anything", {"runner": "a.module"}),
    ("bleu", {"evaluate": [{"kind": "generation", "metrics": ["bleu"]}]}),
])
def test_a_metric_that_may_be_given_is_taken(metric: str, base: dict[str, Any]) -> None:
    tune = {"axis": "optimizer.lr", "metric": metric, "better": "min"}
    assert lab.Study({**GRID, "base": {**GRID["base"], **base}, "tune": tune}).tuned["optimizer.lr"].better == "min"


def test_a_study_runs_what_follows_and_records_the_choice(tmp_path: Path) -> None:
    """The runs of fake arms are none: their figures are put in their place."""
    study = lab.Study(GRID, results=tmp_path)
    figures = {"AdamW, lr=0.0001, seed=5": 0.5, "AdamW, lr=0.001, seed=5": 0.6, "Lion, lr=1e-05, seed=5": 0.3,
               "Lion, lr=0.0001, seed=5": 0.2}
    plain = type(study)._outcome
    with mock.patch("collie_lab.study.executor.command", fake_command), mock.patch.object(
            type(study), "_outcome", lambda self, arm: (plain(self, arm)[0], {"exact_match": figures.get(arm.name)})):
        study._tuning._outcome = study._outcome
        study.run(slots=3, progress=False)
    recorded = read_json(tmp_path / "study.json")["tuning"]
    best = {entry["group"][0]: read_json(tmp_path / "study.json")["arms"][entry["best"]] for entry in recorded}
    assert best == {"AdamW": "AdamW, lr=0.001, seed=5", "Lion": "Lion, lr=1e-05, seed=5"}
    assert [entry["values"] for entry in recorded] == [[1e-4, 1e-3], [1e-5, 1e-4]]
    assert len(list(tmp_path.glob("arms/*/diary"))) == 9
    assert study.tuned["optimizer.lr"].better == "max"
