"""Figures: their data against numpy and brute force, and that they show what they should; nobody's eyes are asked."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

import collie_lab as lab
from collie_lab.folder import JsonLines
from collie_lab.study.contents import default_figures
from collie_lab.study.figures import KINDS, size_fits
from collie_lab.study.outcomes import run_figures, whole_metrics
from collie_lab.study.report import inline_svg
from tests.study.fabricate import BASE, Fabricated, made_run

SIZES = {"1m": 1e6, "5m": 5e6, "30m": 3e7}


@pytest.fixture
def memory() -> Fabricated:
    """Peaks on straight lines: AdamW 16 bytes a parameter and 20 MB, LOMO 4 and 10; the largest did not fit."""
    made = Fabricated("method", "model", "seed")
    for method, slope, rest in (("AdamW", 16, 2e7), ("LOMO", 4, 1e7)):
        for model, parameters in SIZES.items():
            peak = slope * parameters + rest
            oom = (method, model) == ("AdamW", "30m")
            made.add(method, model, 0, status="host_oom" if oom else "ok", planned_bytes=peak * 1.01,
                     planned_weights=4 * parameters, planned_optimizer=peak * 1.01 - 4 * parameters,
                     **({} if oom else {"peak_bytes": peak, "parameters": parameters, "tgs": 1e9 / parameters}))
    return made


def _texts(figure: Figure) -> list[str]:
    texts = [text.get_text() for axes in figure.axes for text in [*axes.texts, *axes.get_xticklabels(), axes.title]]
    return texts + [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_fitted_slopes_are_gigabytes_per_billion(memory: Fabricated) -> None:
    fits = size_fits(memory)
    assert fits["slope"].to_dict() == pytest.approx({"AdamW": 16.0, "LOMO": 4.0})
    assert fits["intercept"].to_dict() == pytest.approx({"AdamW": 2e7, "LOMO": 1e7})
    assert fits["n"].to_dict() == {"AdamW": 2, "LOMO": 3}
    figure = memory.figure("size", reference={"AdamW": 30.5})
    assert {"AdamW: 16.0 GB per billion", "LOMO: 4.0 GB per billion", "planned", "published",
            "host oom"} <= set(_texts(figure))
    failed = figure.data[figure.data["failed"] == "host oom"]
    assert failed["parameters"].item() == SIZES["30m"]  # known from the arm that fitted


def test_a_size_at_which_nothing_fitted_is_shown_and_one_that_nobody_knows_is_told(memory: Fabricated) -> None:
    for method in ("AdamW", "LOMO"):
        run = made_run(status="cuda_oom", steps=1)
        with contextlib.closing(JsonLines(run.folder.path / "events.jsonl")) as events:
            events.append({"kind": "start", "step": 0, "time": 1.7e9, "parameters": 70_000_000})
        memory.add(method, "70m", 0, run=run, status="cuda_oom", planned_bytes=2e9)
        memory.add(method, "7b", 0, status="pending", planned_bytes=1e11)
    figure = memory.figure("size")
    assert set(figure.data.loc[figure.data["arms"].str.contains("70m"), "parameters"]) == {7e7}
    assert _texts(figure).count("cuda oom") == 2
    assert figure.get_supxlabel() == "Not drawn, parameters unknown: AdamW, 7b (pending); LOMO, 7b (pending)"


def test_components_stand_beside_what_was_measured(memory: Fabricated) -> None:
    figure = memory.figure("components", where={"model": ["5m", "30m"]}, panels="model")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["model 5m", "model 30m"]
    row = figure.data[(figure.data["method"] == "AdamW") & (figure.data["model"] == "5m")].iloc[0]
    assert row["weights"] == 2e7
    assert row["weights"] + row["optimizer"] == pytest.approx(1.01 * row["peak_bytes"])
    heights = [bar.get_height() + bar.get_y() for bar in figure.axes[0].patches]
    assert max(heights) == pytest.approx(101.0)  # the plan's 101 MB
    assert "host oom" in _texts(figure)
    planned = pd.DataFrame({"weights": 1e6}, index=memory.frame.index)
    assert memory.figure("components", where={"model": "1m"}, planned=planned).data["weights"].tolist() == [1e6, 1e6]
    with pytest.raises(ValueError, match="made of"):
        lab.Results({"a": made_run()}).figure("components")


def test_bars_show_means_deviations_and_words() -> None:
    made = Fabricated("method", "model", "batch", "seed")
    for method in "ab":
        for batch in (8, 32):
            for seed, tgs in enumerate((90.0, 100.0, 110.0)):
                bad = (method, batch) == ("a", 32)
                made.add(method, "1m", batch, seed, status="timeout" if bad else "ok", **({} if bad else {"tgs": tgs}))
    figure = made.figure("bars", x="model", panels="batch", reference={"b": {"1m": 120.0}})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["batch 8", "batch 32"]
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([100.0, 100.0])
    assert figure.data["tgs_std"].dropna().tolist() == pytest.approx([10.0] * 3)
    assert "timeout" in _texts(figure)
    assert sorted(figure.arms) == sorted(made.frame.index)


def test_the_pareto_front_is_what_no_other_beats() -> None:
    rng = np.random.default_rng(0)
    made = Fabricated("method")
    points = {str(index): rng.uniform(1, 2, 2) for index in range(12)}
    for name, (memory, accuracy) in points.items():
        made.add(name, peak_bytes=memory, exact_match=accuracy / 2)
    figure = made.figure("pareto", y="exact_match")
    front = {name for name, (x, y) in points.items()
             if not any(other_x <= x and other_y >= y and (other_x, other_y) != (x, y)
                        for other_x, other_y in points.values())}
    assert set(figure.data[figure.data["pareto"]]["method"]) == front


def test_curves_are_means_over_seeds_and_go_through_attempts() -> None:
    made = Fabricated("method", "seed")
    for seed, scale in enumerate((1.0, 2.0, 3.0)):
        made.add("a", seed, run=made_run(BASE.with_("training.steps", 12), loss=lambda step, scale=scale: scale * step))
    later = made_run(loss=lambda step: 7.0, steps=12)
    begun = made_run(loss=lambda step: 3.0, steps=5)
    lines = (later.folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (later.folder.path / "metrics.jsonl").write_text("\n".join(lines[4:]) + "\n", encoding="utf-8")
    later.folder.write("launch.json", {"world_size": 1,
                                       "resume_from": str(begun.folder.checkpoints / "step-000004")})
    made.add("b", 0, run=lab.Run(later.folder.path))
    data = made.figure("curves").data.set_index(["method", "step"])
    assert data.loc[("a", 5), "loss"] == pytest.approx(10.0)
    assert data.loc[("a", 5), "loss_std"] == pytest.approx(np.std([5, 10, 15], ddof=1))
    assert data.loc["b", "loss"].tolist() == [3.0] * 4 + [7.0] * 8  # the later account of step 5 counts
    assert math.isnan(data.loc[("b", 5), "loss_std"])
    with pytest.raises(ValueError, match="no run has recorded 'accuracy'"):
        made.figure("curves", metric="accuracy")


def test_of_an_attempt_the_steps_count_up_to_where_the_next_went_on() -> None:
    begun, later = made_run(tokens=1000, steps=9), made_run(tokens=2000, steps=6)
    metrics = later.folder.path / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text(encoding="utf-8").splitlines(keepends=True)[4:]), encoding="utf-8")
    # It was launched from the other's step 4, and has begun again by itself from its own step 5.
    later.folder.write("launch.json", {
        "world_size": 1, "launched_from": str(begun.folder.checkpoints / "step-000004"),
        "resume_from": str(later.folder.checkpoints / "step-000005")})
    run = lab.Run(later.folder.path)
    assert whole_metrics(run)["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run_figures(run)["tokens_per_step"] == pytest.approx((4 * 1000 + 2 * 2000) / 6)
    copied = lab.Run(Path(shutil.copytree("runs", "copied")) / run.id)
    assert whole_metrics(copied)["step"].tolist() == [1, 2, 3, 4, 5, 6]
    moved = lab.Run(Path("runs").rename("moved") / run.id)
    assert whole_metrics(moved)["step"].tolist() == [1, 2, 3, 4, 5, 6]
    Path("moved").rename("runs")
    for place in (later.folder.checkpoints / "step-000005", begun.folder.checkpoints / "copied"):
        later.folder.write("launch.json", {"resume_from": str(place)})
        assert whole_metrics(run)["step"].tolist() == [5, 6]


@pytest.mark.parametrize(("statuses", "crosses"), [
    (["diverged", "cuda_oom"], 1), (["diverged", "pending"], 0), (["ok", "cuda_oom"], 0), (["running"], 0)])
def test_a_curve_ends_in_a_cross_where_all_its_arms_have_failed(statuses: list[str], crosses: int) -> None:
    made = Fabricated("method", "seed")
    for seed, status in enumerate(statuses):  # the second arm never came to a step
        made.add("a", seed, status=status, run=None if seed else made_run(steps=5))
    axes, = made.figure("curves").axes
    assert sum(line.get_marker() == "x" for line in axes.lines) == crosses


def test_settings_of_which_none_is_the_best_yet_have_no_curve() -> None:
    made = Fabricated("method", "lr", "seed", tuned={"lr": "perplexity"})
    for lr in (0.1, 0.2):
        made.add("a", lr, 0, run=made_run())
    with pytest.raises(ValueError, match="none is the best yet"):
        made.figure("curves")
    assert "curves" not in default_figures(made)
    made.add("b", 0.1, 0, run=made_run())  # one setting is no choice
    assert set(default_figures(made)["curves"].data["method"]) == {"b"}


def test_a_sweep_shows_every_value_that_was_tried() -> None:
    made = Fabricated("method", "lr", "seed", tuned={"lr": "loss"})
    for lr in (1e-4, 1e-3, 1e-2):
        made.add("a", lr, 0, status="diverged" if lr == 1e-2 else "ok", **({} if lr == 1e-2 else {"loss": 1 / lr}))
    figure = made.figure("sweep")
    assert figure.data["lr"].tolist() == [1e-4, 1e-3, 1e-2]
    assert {"diverged", "0.0001", "0.001", "0.01"} <= set(_texts(figure))
    assert made.figure("bars", metric="loss").data["loss"].tolist() == [1000.0]  # the best alone


def test_a_sweep_over_words_stands_in_the_order_of_the_grid(tmp_path: Path) -> None:
    made = Fabricated("method", "schedule", "seed", tuned={"schedule": "loss"})
    for schedule, loss in (("wsd", 2.0), ("linear", None), ("cosine", 1.0)):
        made.add("a", schedule, 0, loss=loss, status="ok" if loss else "diverged")
    figure = made.figure("sweep")
    assert figure.save(tmp_path / "sweep")  # the cross of what diverged has a place
    assert [each.get_text() for each in figure.axes[0].get_xticklabels()] == ["wsd", "linear", "cosine"]


@pytest.mark.parametrize(("values", "words"), [
    ([None, 0.5, 1.0], ["–", "0.5", "1"]), ([True, False], ["True", "False"]), (["zero", "constant"],) * 2])
def test_a_sweep_of_what_is_no_number_stands_in_the_order_of_the_grid(values: list[Any], words: list[str]) -> None:
    made = Fabricated("method", "value", "seed", tuned={"value": "loss"})
    for place, value in enumerate(values):
        made.add("a", value, 0, loss=1.0 + place)
        made.add("b", value, 0, **{"status": "diverged"} if place else {"loss": 2.0})
    axes, = made.figure("sweep").axes
    assert [text.get_text() for text in axes.get_xticklabels()] == words
    assert list(axes.lines[0].get_xdata()) == list(range(len(values)))
    low, high = axes.get_xlim()
    assert low < 0 < len(values) - 1 < high


def test_the_ring_of_a_sweep_is_at_the_value_that_was_chosen() -> None:
    made = Fabricated("method", "lr", "seed", tuned={"lr": "loss"})
    for lr, loss in ((1, 3.0), (2, 2.0), (3, 4.0)):
        made.add("a", lr, 0, loss=loss)
    made.add("a", 2, 1, loss=9.0)  # of a seed that the other values were not tried with
    ring, = (line for line in made.figure("sweep").axes[0].lines if line.get_markerfacecolor() == "none")
    assert list(ring.get_xdata()) == [2]


def test_of_a_figure_without_a_direction_nothing_is_the_best() -> None:
    made = Fabricated("method", "lr", "seed", tuned={"lr": "loss"})
    for lr in (0.1, 0.2):
        made.add("a", lr, 0, loss=lr, oddity=lr)
    assert not [line for line in made.figure("sweep", metric="oddity").axes[0].lines
                if line.get_markerfacecolor() == "none"]
    assert made.figure("pareto", x="loss", y="loss").data["pareto"].all()
    assert not made.figure("pareto", x="loss", y="oddity").data["pareto"].any()


def test_labels_are_no_formulas() -> None:
    made = Fabricated("method", "model", "lr", "seed", tuned={"lr": "loss"})
    for method in ("_$\\none$", "$a$"):
        for model in ("$\\m$", "5m"):
            for lr in ("$\\x$", "y"):
                made.add(method, model, lr, 0, run=made_run(BASE.with_("training.steps", 3)), loss=1.0, peak_bytes=1e7,
                         parameters=1e6, planned_weights=1e6, planned_bytes=1e6)
    for kind, options in {"bars": {"metric": "loss", "x": "model"}, "pareto": {"y": "loss", "panels": "model"},
                          "components": {"panels": "model"}, "size": {"log": True}, "sweep": {"panels": "model"},
                          "curves": {"panels": "model", "log": True}}.items():
        figure = made.figure(kind, **options)
        figure.canvas.draw()
        shown = [text.get_text() for text in figure.findobj(Text)]
        assert not [text for text in shown if "math" in text], kind
        if kind == "pareto" or figure.legends:
            assert any("$a$" in text for text in shown), kind


def test_failures_above_a_logarithmic_axis_take_little_room() -> None:
    made = Fabricated("method", "lr", "seed", tuned={"lr": "loss"})
    for lr, loss in ((1, 1.0), (2, 1000.0), (3, None)):
        made.add("a", lr, 0, **({"loss": loss} if loss else {"status": "diverged"}))
    axes, = made.figure("sweep").axes
    assert axes.get_xlim()[1] >= 3
    low, high = np.log10(axes.get_ylim())
    assert 0.72 < 3 / (high - low) < 0.82  # data over all


def test_points_without_a_figure_for_their_area_are_seen() -> None:
    made = Fabricated("method")
    made.add("a", peak_bytes=1.0, loss=1.0, tgs=5.0)
    made.add("b", peak_bytes=2.0, loss=0.5)
    axes, = made.figure("pareto", y="loss", area="tgs").axes
    assert [each.get_sizes().tolist() for each in axes.collections if isinstance(each, PathCollection)] == [[180], [45]]


def test_saved_files_repeat_and_tell_their_arms(memory: Fabricated, tmp_path: Path) -> None:
    figure = memory.figure("bars", metric="peak_bytes", where={"model": "1m"}, x="method")
    files = figure.save(tmp_path / "out" / "memory")
    assert [file.suffix for file in files] == [".pdf", ".svg", ".png", ".csv", ".json"]
    first = [file.read_bytes() for file in files[:4]]
    figure.save(tmp_path / "out" / "memory")
    assert [file.read_bytes() for file in files[:4]] == first
    assert "AdamW" in files[1].read_text(encoding="utf-8")  # text stays text
    sidecar = json.loads(files[-1].read_text(encoding="utf-8"))
    assert [arm["arm"] for arm in sidecar["arms"]] == ["AdamW-1m-0", "LOMO-1m-0"]
    assert sidecar["arms"][0]["status"] == "ok"
    assert pd.read_csv(files[3])["peak_bytes"].tolist() == [3.6e7, 1.4e7]


def test_a_figure_in_a_page_takes_its_colours_and_names_no_address(memory: Fabricated) -> None:
    svg = inline_svg(memory.figure("bars", metric="peak_bytes", x="model"), "peak memory")
    assert svg.startswith('<svg role="img" aria-label="peak memory"')
    assert "http" not in svg
    assert "var(--c0)" in svg
    assert not re.search(r"#(0072b2|ffffff|222222|6b7280)", svg)
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert ids
    assert all(each.startswith("peak-memory-") for each in ids)
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_mistakes_name_what_there_is(memory: Fabricated) -> None:
    with pytest.raises(ValueError, match=f"no kind is called 'pie'; there are: {', '.join(KINDS)}"):
        memory.figure("pie")
    with pytest.raises(ValueError, match=r"no arm has 'perplexity'; there are: .*peak_bytes"):
        memory.figure("bars", metric="perplexity")
    with pytest.raises(ValueError, match="differ in 'model'"):
        memory.figure("pareto", y="tgs")
    with pytest.raises(ValueError, match="nothing was tuned"):
        memory.figure("sweep")
