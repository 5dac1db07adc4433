"""Tables against numpy, scipy's distributions and hand-made examples; their formats against parsers and LaTeX."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from collie_lab.study.columns import Column, column
from collie_lab.study.groups import Value
from collie_lab.study.significance import against_best
from tests.study.fabricate import Fabricated

SAMPLES = {"AdamW & co": [2.41, 2.44, 2.40], "LOMO": [3.6, 3.7, 3.5], "LoRA_8": [2.42, 2.40, 2.45]}


@pytest.fixture
def quality() -> Fabricated:
    made = Fabricated("method", "model", "seed")
    for method, values in SAMPLES.items():
        for model, scale in (("1m", 1.0), ("5m", 0.5)):
            for seed, value in enumerate(values):
                failed = method == "LOMO" and model == "5m"
                made.add(method, model, seed, status="cuda_oom" if failed else "ok",
                         **({} if failed else {"perplexity": value * scale, "peak_bytes": 2e9 * value, "steps": 30}))
    return made


def test_cells_are_mean_and_sample_deviation_over_seeds(quality: Fabricated) -> None:
    table = quality.table(["perplexity", "peak_bytes"])
    mean, std = np.mean(SAMPLES["LOMO"]), np.std(SAMPLES["LOMO"], ddof=1)
    assert table.row_axes == ["method", "model"]
    assert table.loc[("LOMO", "1m"), "Perplexity"] == f"{mean:.2f} ± {std:.2f}"
    assert table.loc[("LOMO", "1m"), "Peak memory (GB)"] == f"{2 * mean:.2f} ± {2 * std:.2f}"
    assert set(table.loc["LOMO", "5m"]) == {"cuda oom"}
    numbers = pd.read_csv(StringIO(table.to_csv())).set_index(["method", "model"])
    assert numbers.loc[("LOMO", "1m"), "perplexity_std"] == std
    assert numbers.loc[("LOMO", "1m"), "peak_bytes"] == pytest.approx(2e9 * mean, rel=1e-15)
    assert numbers.loc[("LOMO", "5m"), "status"] == "cuda_oom"
    assert "3 seeds" in table.notes[0].text


def test_the_best_is_bold_where_all_other_labels_are_equal(quality: Fabricated) -> None:
    table = quality.table(["perplexity"], columns=["model"])
    bold = {(row, place) for (row, place), cell in table.cells.items() if cell.best}
    assert bold == {(("AdamW & co",), 0), (("LoRA_8",), 0), (("AdamW & co",), 1), (("LoRA_8",), 1)}  # 2.417 and 2.423
    steps = quality.table(["steps"], columns=["model"])
    assert not any(cell.best for cell in steps.cells.values())  # neither more nor less is better
    assert steps.loc["LOMO", ("Steps", "1m")] == "30"  # no deviation at all


def test_a_seed_without_a_figure_is_told(quality: Fabricated) -> None:
    quality.add("AdamW & co", "1m", 3, status="diverged")
    quality.add("LoRA_8", "1m", 3, perplexity=2.4)
    table = quality.table(["perplexity"], where={"model": "1m"})
    assert table.rows == [("AdamW & co",), ("LOMO",), ("LoRA_8",)]
    notes = {note.mark: note.text for note in table.notes if note.mark}
    assert notes[table.cells[("AdamW & co",), 0].marks] == "of 3 seeds; 1 diverged"
    assert notes[table.cells[("LOMO",), 0].marks] == "of 3 seeds"
    assert not table.cells[("LoRA_8",), 0].marks
    assert table.numbers.loc["AdamW & co", "status"] == "3 ok, 1 diverged"


def test_statuses_are_those_of_the_arms_whatever_figures_they_have() -> None:
    made = Fabricated("method", "seed")
    made.add("a", 0, loss=1.0)
    made.add("b", 0, loss=1.0, status="stopped")
    made.add("c", 0)
    made.add("c", 1, loss=1.0)
    made.add("c", 2, status="diverged")
    assert made.table(["loss"]).numbers["status"].to_dict() == {"a": "ok", "b": "stopped", "c": "2 ok, 1 diverged"}


def test_a_table_whose_axes_are_all_in_columns_or_tuned_has_one_row_without_a_label() -> None:
    made = Fabricated("method", "seed")
    for method, loss in (("a", 1.0), ("b", 2.0)):
        made.add(method, 0, loss=loss)
    table = made.table(["loss"], columns=["method"])
    assert table.text.to_numpy().tolist() == [["1.000", "2.000"]]
    assert "|  | **1.000** |" in table.to_markdown()
    assert r" & \textbf{1.000} & 2.000 \\" in table.to_latex()
    assert '<tr><th class="label" scope="row"></th><td><b>' in table.to_html()
    assert table.numbers["loss"].tolist() == [1.0, 2.0]
    tuned = Fabricated("lr", "seed", tuned={"lr": "loss"})
    for lr in (0.1, 0.2):
        tuned.add(lr, 0, loss=lr)
    assert tuned.table(["loss"]).text["Loss"].to_dict() == {"": "0.100"}


def test_missing_arms_are_dashes_and_an_axis_that_nobody_names_is_an_error() -> None:
    made = Fabricated("method", "model", "batch", "seed")
    made.add("a", "1m", 2, 0, loss=1.0)
    made.add("b", "5m", 4, 0, loss=1.0)
    made.add("b", "1m", 4, 0, loss=2.0)
    table = made.table(["loss"], rows=["method"], columns=["model"], where={"batch": [2, 4]})
    assert table.loc["a", ("Loss", "5m")] == "–"
    assert table.columns[0][1] == ("1m",)
    made.add("b", "1m", 8, 0, loss=2.0)
    with pytest.raises(ValueError, match=r"differ in 'batch' .*4, 8"):
        made.table(["loss"], rows=["method"], columns=["model"])
    with pytest.raises(ValueError, match="no axis is called 'modle'"):
        made.table(columns=["modle"])
    with pytest.raises(ValueError, match="no arm has 'exact_match'"):
        made.table(["exact_match"])
    with pytest.raises(ValueError, match="no arm has batch = 3"):
        made.table(where={"batch": 3})
    with pytest.raises(ValueError, match="no test is called 'welsh'; there are: welch, paired"):
        made.table(["loss"], rows=["method", "batch"], test="welsh")


def test_a_tuned_axis_shows_its_best_over_the_seeds_that_all_values_have() -> None:
    made = Fabricated("method", "lr", "seed", tuned={"lr": "perplexity"})
    for lr, value in ((0.1, 3.0), (0.2, 2.0), (0.3, None)):
        made.add("a", lr, 0, perplexity=value, status="ok" if value else "diverged")
    made.add("a", 0.2, 1, perplexity=8.0)  # worse than every other value, but with a seed of its own
    table = made.table(["perplexity"])
    assert table.row_axes == ["method"]
    assert table.arms == ["a-0.2-0", "a-0.2-1"]
    assert table.numbers.loc["a", "perplexity"] == 5.0


def test_settings_of_which_none_is_the_best_yet_have_no_figure() -> None:
    made = Fabricated("method", "lr", "seed", tuned={"lr": "perplexity"})
    for lr in (0.1, 0.2):
        made.add("a", lr, 0, loss=lr)
    made.add("b", 0.1, 0, loss=5.0)  # one setting is no choice
    assert made.table(["loss"]).text["Loss"].to_dict() == {"a": "–", "b": "5.000"}


def test_axes_that_were_tuned_together_are_chosen_together() -> None:
    made = Fabricated("method", "lr", "decay", "seed", tuned={"lr": "loss", "decay": "loss"})
    for lr, decay, loss in ((0.1, 0.0, 1.0), (0.1, 0.5, 9.0), (0.2, 0.0, 3.0), (0.2, 0.5, 2.0)):
        made.add("a", lr, decay, 0, loss=loss)
    assert made.table(["loss"]).numbers.loc["a", "loss"] == 1.0


def test_welch_and_paired_tests_agree_with_their_formulas() -> None:
    from scipy.special import stdtr  # Student's distribution

    a, b = np.array([2.41, 2.44, 2.40, 2.47]), np.array([2.5, 2.7, 2.6])
    values = {"a": Value(dict(enumerate(a))), "b": Value(dict(enumerate(b)))}
    verdict, = against_best("a", values, "welch")
    va, vb = a.var(ddof=1) / 4, b.var(ddof=1) / 3
    t = (a.mean() - b.mean()) / np.sqrt(va + vb)
    freedom = (va + vb) ** 2 / (va**2 / 3 + vb**2 / 2)
    assert verdict.p == pytest.approx(2 * stdtr(freedom, -abs(t)), rel=1e-9)
    assert verdict.n == (4, 3)
    verdict, = against_best("a", values, "paired")
    difference = a[:3] - b
    t = difference.mean() / (difference.std(ddof=1) / np.sqrt(3))
    assert verdict.p == pytest.approx(2 * stdtr(2, -abs(t)), rel=1e-9)


def test_holm_and_what_cannot_be_tested() -> None:
    spread = np.array([-1.0, 0.0, 1.0])
    values = {name: Value(dict(enumerate(shift + spread))) for name, shift in (("a", 0), ("b", 3), ("c", 4), ("d", 9))}
    values |= {"one": Value({0: 5.0}), "same": Value({0: 5.0, 1: 5.0})}
    found = {each.other: each for each in against_best("a", values, "welch")}
    p = {name: found[name].p for name in "bcd"}
    ranked = sorted([*p.values(), found["same"].p])
    assert found["d"].adjusted == pytest.approx(4 * ranked[0])  # the smallest of four p-values (Holm 1979)
    assert found["one"].p is None
    assert against_best("same", {"same": values["same"], "other": Value({0: 6.0, 1: 6.0})}, "welch")[0].p == 0.0


def test_with_a_test_all_are_bold_that_are_not_significantly_worse(quality: Fabricated) -> None:
    quality.add("near", "1m", 0, perplexity=2.43)
    quality.add("near", "1m", 1, perplexity=2.55)
    table = quality.table(["perplexity"], where={"model": "1m"}, test="welch")
    assert {row[0] for (row, _), cell in table.cells.items() if cell.best} == {"AdamW & co", "LoRA_8", "near"}
    assert list(table.tests["other"]) == ["LOMO", "LoRA_8", "near"]
    assert "Welch" in next(note.text for note in table.notes if note.text.startswith("Bold"))


def test_markdown_reads_back_as_the_same_cells(quality: Fabricated) -> None:
    table = quality.table(["perplexity"], columns=["model"])
    tokens = MarkdownIt("commonmark").enable("table").parse(table.to_markdown())
    texts = ["".join(child.content for child in token.children or [] if child.type == "text")
             for token in tokens if token.type == "inline"]
    assert texts[:3] == ["method", "Perplexity, 1m", "Perplexity, 5m"]
    assert texts[3:6] == ["AdamW & co", *table.text.loc["AdamW & co"]]
    lines = table.to_markdown().splitlines()[:5]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
@pytest.mark.parametrize("siunitx", [False, True])
def test_latex_compiles(quality: Fabricated, tmp_path: Path, siunitx: bool) -> None:
    quality.add("AdamW & co", "1m", 3, status="diverged")
    quality.add(r"100% #_{x} ~^\ ≥ <|>", "1m", 0, perplexity=9.0)
    table = quality.table(["perplexity", "peak_bytes", "steps"], columns=["model"], caption="A & B ± 3%", test="paired")
    (tmp_path / "t.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs,siunitx,graphicx}\begin{document}" + "\n"
        + table.to_latex(siunitx=siunitx, label="tab:t") + r"\end{document}", encoding="utf-8")
    done = subprocess.run(["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "t.tex"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout  # wider than the page, and made to fit it


def test_line_breaks_in_names_end_no_row() -> None:
    made = Fabricated("the\nmethod", "model")
    made.add("Adam\n\n W", "1\tm", loss=1.0)
    made.add("LOMO", "1\tm", loss=2.0)
    table = made.table(["loss"], columns=["model"], caption="A\n\ntitle")
    head, _, *rows = table.to_markdown().split("\n\n")[1].splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in (head, *rows)] == [
        ["the method", "Loss, 1 m"], ["Adam W", "**1.000**"], ["LOMO", "2.000"]]
    assert r"\caption{A title}" in table.to_latex()
    assert "\nAdam W & " in table.to_latex()


def test_figures_that_no_s_column_takes_are_text_and_deviations_have_the_decimals_of_the_mean() -> None:
    made = Fabricated("method", "seed")
    for method, values in (("a", (1.25, 1.25005)), ("b", (2e-5, 2.1e-5))):
        for seed, value in enumerate(values):
            made.add(method, seed, gap=value, tiny=value * 1e-5)
    table = made.table([Column("gap", "Gap", "min"), "tiny"], fair=False)
    assert table.text["Gap"].to_dict() == {"a": "1.250 ± 0.000", "b": "2.05e-5 ± 7.07e-7"}
    latex = table.to_latex(siunitx=True)
    assert r"{lS[table-format=1.3(1), detect-weight, separate-uncertainty, retain-zero-uncertainty]c}" in latex
    assert r"a & 1.250 \pm 0.000 & {" in latex
    assert r"b & {\textbf{2.05e-5 $\pm$ 7.07e-7}} & {2.05e-10 $\pm$ 7.07e-12} \\" in latex


def test_markdown_shows_labels_as_they_are() -> None:
    labels = ["<lambda>", "a*b*c", "_x_", "`c`", r"\d", "p|q", "[t](u)", "&lt;", "LoRA_8", "__init__"]
    made = Fabricated("method", "seed")
    for label in labels:
        made.add(label, 0, loss=1.0)
    made.add("<lambda>", 1, status="diverged")
    table = made.table(["loss"], caption=" ".join(labels[:4]))
    markdown = table.to_markdown()
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    shown = ["".join(child.content for child in token.children or []) for token in tokens if token.type == "inline"]
    assert shown[0] == " ".join(labels[:4])
    assert [text for text in shown if text in labels] == labels
    assert "LoRA_8 " in markdown


def test_a_row_label_is_no_argument_of_the_line_before() -> None:
    made = Fabricated("method", "seed")
    for label in ("[a]", "*", "b"):
        made.add(label, 0, loss=1.0)
    lines = made.table(["loss"], best=False).to_latex().splitlines()
    assert [line.split(" & ")[0] for line in lines[5:8]] == ["{}[a]", "{}*", "b"]


def test_only_a_wide_table_is_made_to_fit(quality: Fabricated) -> None:
    narrow, wide = (quality.table(metrics, best=False).to_latex()
                    for metrics in (["perplexity"], ["perplexity", "peak_bytes", "steps", "perplexity"]))
    assert narrow.startswith("% needs booktabs\n")
    assert "resizebox" not in narrow
    assert wide.startswith("% needs booktabs, graphicx\n")
    head, body, rest = re.split(r"\\resizebox.*\{%\n|\n\}\n", wide)
    assert body.startswith(r"\begin{tabular}")
    assert body.endswith(r"\end{tabular}")
    assert "tabular" not in head + rest


def test_save_writes_every_format_and_which_arms(quality: Fabricated, tmp_path: Path) -> None:
    files = quality.table(["perplexity"], where={"model": "1m"}).save(tmp_path / "out" / "t")
    assert [file.name for file in files] == ["t.csv", "t.md", "t.tex", "t.html", "t.json"]
    sidecar = json.loads(files[-1].read_text(encoding="utf-8"))
    assert [arm["arm"] for arm in sidecar["arms"]] == [f"{name}-1m-{seed}" for name in SAMPLES for seed in range(3)]
    assert sidecar["arms"][4]["labels"] == {"method": "LOMO", "model": "1m"}


def test_columns_know_units_and_directions() -> None:
    assert column("val_exact_match").better == "max"
    assert column("val_exact_match").heading == "Val exact match (%)"
    assert column("bits_per_byte").better == "min"
    assert column("whatever").better is None
    memory = column("peak_bytes")
    assert memory.fitted([49.5e6]).text(49.5e6) == "49.5"
    assert memory.fitted([2.2e9, 4e6]).heading == "Peak memory (GB)"
    assert memory.fitted([2.2e9]).text(1.234e9) == "1.23"
    assert column(Column("x", "X")).text(float("nan")) == "–"
    assert column("loss").text(-0.0001) == column("loss").text(0.0001) == "0.000"
    assert column("loss").text(-0.1) == "-0.100"


def test_a_table_before_anything_has_run_says_so() -> None:
    made = Fabricated("method", "seed")
    made.add("a", 0, status="pending")
    assert list(made.table().loc["a"]) == ["pending"]
    assert "pending" in made._repr_html_()
