from __future__ import annotations

import io

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from collie_lab.folder import RunFolder
from collie_lab.view import compare, figure
from collie_lab.view.history import History
from collie_lab.view.style import COLORS, STYLE, style
from tests.view.fabricate import START, FakeRun, append, end, record


def test_the_lines_of_a_figure_hold_the_run(finished: FakeRun) -> None:
    history = History(finished.folder)
    history.update(alive=False)
    loss, speed, memory, lr = figure(finished).axes
    lines = {line.get_label(): np.asarray(line.get_xydata()) for line in loss.get_lines()}
    np.testing.assert_allclose(lines["of each step"], np.stack([history.column("step"), history.column("loss")], 1))
    np.testing.assert_allclose(lines["smoothed"][:, 1], history.curve("loss").smooth)
    np.testing.assert_allclose(lines["held out (log perplexity)"], [[20, np.log(4)], [40, np.log(3)]])
    for axes, name in ((speed, "tokens_per_second"), (memory, "memory_allocated"), (lr, "lr")):
        np.testing.assert_allclose(np.asarray(axes.get_lines()[0].get_ydata()), history.column(name))


def test_a_figure_says_run_status_and_results(finished: FakeRun) -> None:
    words = "\n".join(text.get_text() for text in figure(finished).texts)
    for part in (finished.folder.id, "ok", "step 40/40 in 1 min 00 s", "exact match 50.0%"):
        assert part in words


def test_a_notebook_shows_a_figure_by_itself(finished: FakeRun) -> None:
    image = imread(io.BytesIO(figure(finished)._repr_png_()), format="png")  # type: ignore[attr-defined]
    assert image.shape[1] > image.shape[0] > 300


def _with(folder: RunFolder, losses: list[float]) -> FakeRun:
    append(folder, "metrics.jsonl", (record(step, loss, memory_allocated=None) for step, loss in enumerate(losses, 1)))
    return FakeRun(folder)


@pytest.mark.parametrize("losses", [[], [1.0], [float("nan")] * 3, [1.0, float("nan"), 2.0]])
@pytest.mark.parametrize("status", ["running", "error", "diverged"])
def test_a_figure_of_next_to_nothing(folder: RunFolder, losses: list[float], status: str) -> None:
    run = _with(folder, losses)
    if status != "running":
        end(folder, status)
    for picture in (figure(run), compare([run])):
        picture.canvas.draw()


def test_compare_draws_every_run_and_what_it_reached(finished: FakeRun) -> None:
    other = RunFolder.create(finished.folder.path.parent, "other")
    run = _with(other, [3.0, 2.0, 1.0])
    end(other, "stopped")
    loss, *bars = compare([finished, run], ["one", "two"]).axes
    assert loss.get_legend_handles_labels()[1] == ["one", "two"]
    two = next(line for line in loss.get_lines() if line.get_label() == "two")
    np.testing.assert_allclose(np.asarray(two.get_xydata()), [[1, 3], [2, 2], [3, 1]])
    values = {axes.get_title(loc="left"): [text.get_text() for text in axes.texts] for axes in bars}
    assert values == {"held-out perplexity": ["3.000", "–"], "exact match": ["50.0%", "–"],
                      "peak memory": ["2.00 MB", "–"], "tokens per second": ["130", "128"]}


@pytest.mark.parametrize(("status", "shown"), [("running", "4.000"), ("stopped", "–"), ("diverged", "–")])
def test_what_a_run_had_halfway_is_not_what_it_reached(finished: FakeRun, status: str, shown: str) -> None:
    other = RunFolder.create(finished.folder.path.parent, "other")
    run = _with(other, [3.0, 2.0, 1.0])
    append(other, "events.jsonl", [{"time": START, "kind": "evaluation", "step": 2, "perplexity": 4.0}])
    if status != "running":
        end(other, status, loss=1.0)
    perplexity = compare([finished, run]).axes[1]
    assert [text.get_text() for text in perplexity.texts] == ["3.000", shown]


@pytest.mark.parametrize("losses", [[5.0, 3.0, 2.0, 1.5, 1.2, 1.0, 1.0], [1.0, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0]])
def test_the_legend_lies_on_no_curve(folder: RunFolder, losses: list[float]) -> None:
    run = _with(folder, losses)
    end(folder)
    picture = compare([run, run])
    picture.canvas.draw()
    legend, axes = picture.axes[0].get_legend(), picture.axes[0]
    assert legend is not None
    box = legend.get_window_extent()
    points = axes.transData.transform(np.asarray(axes.get_lines()[0].get_xydata()))
    assert not any(box.contains(*point) for point in points)


def test_labels_are_shown_as_they_are(finished: FakeRun) -> None:
    picture = compare([finished, finished], ["_hidden", r"$\\none$"])
    picture.canvas.draw()
    legend = picture.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["_hidden", r"$\\none$"]


def test_compare_says_what_is_wrong(finished: FakeRun) -> None:
    with pytest.raises(ValueError, match="no runs"):
        compare([])
    with pytest.raises(ValueError, match="2 labels for 1 runs"):
        compare([finished], ["a", "b"])
    with pytest.raises(ValueError, match=r"compare takes a list of runs, compare\(\[a, b\]\), got <"):
        compare(finished, ["a"])  # type: ignore[arg-type]


def test_global_settings_stay_as_they_are(finished: FakeRun) -> None:
    before = dict(matplotlib.rcParams)
    figure(finished)
    compare([finished])
    assert dict(matplotlib.rcParams) == before


def test_the_style_is_a_context() -> None:
    with style():
        assert matplotlib.rcParams["axes.spines.top"] is STYLE["axes.spines.top"]
        assert matplotlib.rcParams["axes.prop_cycle"].by_key()["color"] == list(COLORS)
