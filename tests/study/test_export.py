"""The export holds what a reviewer needs and no weights; the report opens alone."""

from __future__ import annotations

import json
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

import collie_lab as lab
from collie_lab.study.export import export
from tests.study.fabricate import BASE, Fabricated, made_run


@pytest.fixture
def study() -> Fabricated:
    made = Fabricated("method", "seed")
    made.add("AdamW", 0, run=made_run(perplexity=2.4, peak_bytes=5e7, parameters=1e6))
    made.add("LOMO <b>", 0, run=made_run(BASE.replace(optimizer=lab.Lomo(lr=0.1)), "diverged", steps=3),
             status="diverged")
    made.add("LoRA", 0, status="pending")
    return made


class _Page(HTMLParser):
    """Addresses that a browser would ask for, ids and links within the page, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.asked: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster") or (name == "href" and tag in ("link", "image", "use")):
                self.asked += [] if (value or "").startswith(("#", "data:")) else [f"{tag} {value}"]
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "xlink:href") and (value or "").startswith("#"):
                self.links.append((value or "")[1:])
        if tag in ("link", "iframe", "object", "embed"):
            self.asked.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_page_that_asks_for_nothing(study: Fabricated, tmp_path: Path) -> None:
    prose = "**Why?** See [the paper](https://arxiv.org/abs/2306.09782). ![x](http://a/b.png) <script>bad()</script>"
    path = study.report(tmp_path / "out" / "report.html", prose=prose,
                        tables={"quality": study.table(["perplexity", "peak_bytes"], caption="A table")},
                        figures={"curves": study.figure("curves"), "again": study.figure("curves")})
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.asked == []
    assert "@import" not in text
    assert "url(http" not in text
    assert text.replace("https://arxiv.org/abs/2306.09782", "").count("http") == 1  # the picture's, as words
    assert len(page.ids) == len(set(page.ids))
    assert set(page.links) <= set(page.ids)
    assert "<script>bad" not in text
    assert "LOMO <b>" in page.text
    for words in ("Why?", "A table", "it diverged", "it pending", "1a7fb8003", "torch 2.13.0", "kind: lomo"):
        assert words in page.text, words
    assert list(tmp_path.joinpath("out").iterdir()) == [path]


def test_an_export_is_whole_and_has_no_weights(study: Fabricated, tmp_path: Path) -> None:
    figure = study.figure("curves")
    folder = export(study, tmp_path / "out", figures={"curves": figure}, prose="Why?")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    run = study.runs["AdamW-0"]
    arm = f"arms/AdamW-0/runs/{run.id}"
    assert {"README.md", "report.html", "arms.csv", "fairness.csv", "requirements.txt", "export.json",
            *(f"tables/results.{kind}" for kind in ("csv", "md", "tex", "html", "json")),
            *(f"figures/curves.{kind}" for kind in ("pdf", "svg", "png", "csv", "json")),
            *(f"{arm}/{name}" for name in ("experiment.yaml", "result.json", "env.json", "status.json", "metrics.jsonl",
                                           "data/index.json"))} <= files
    assert not [file for file in files if "checkpoints" in file or file.endswith((".safetensors", ".distcp"))]
    assert (folder / arm / "metrics.jsonl").read_bytes() == (run.folder.path / "metrics.jsonl").read_bytes()
    arms = pd.read_csv(folder / "arms.csv", index_col=0)
    assert arms.loc["AdamW-0", "peak_bytes"] == 5e7
    assert arms.loc["AdamW-0", "run"] == arm
    assert "torch==2.13.0" in (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    assert listed["folders"] == {"AdamW-0": "AdamW-0", "LOMO <b>-0": "LOMO-b--0", "LoRA-0": None}
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "3 arms: 1 ok, 1 diverged, 1 pending." in readme
    (folder / "mine.txt").touch()
    export(study, folder, figures={}, tables={}, found=study.fairness("method", intended=("commit",)))
    assert "meant to differ: commit" in (folder / "README.md").read_text(encoding="utf-8")
    assert not (folder / "mine.txt").exists()  # it is an export, and a new one is whole
    assert not list(tmp_path.glob(".out-*"))


def test_a_zip_holds_the_same(study: Fabricated, tmp_path: Path) -> None:
    folder = export(study, tmp_path / "all", figures={})
    path = export(study, tmp_path / "all.zip", figures={})
    assert export(study, tmp_path / "all", figures={}, as_zip=True) == path  # an earlier export is replaced
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert names == {f"all/{file.relative_to(folder)}" for file in folder.rglob("*") if file.is_file()}


def test_nothing_else_is_overwritten(study: Fabricated, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years", encoding="utf-8")
    with pytest.raises(FileExistsError, match="no earlier export"):
        export(study, tmp_path / "thesis", figures={})
    assert (tmp_path / "thesis" / "chapter.tex").read_text(encoding="utf-8") == "years"
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        export(study, tmp_path / "file", figures={})
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        archive.writestr("mine/thesis.tex", "years")
    (tmp_path / "other.zip").write_text("no zip", encoding="utf-8")
    for name in ("mine.zip", "other.zip"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(FileExistsError, match="no earlier export"):
            export(study, tmp_path / name, figures={})
        assert (tmp_path / name).read_bytes() == before


def test_a_study_exports_a_grid_that_gives_the_same_arms(tmp_path: Path) -> None:
    grid = {"name": "tiny", "base": {"model": {"source": "llama-tiny", "init": "random"}, "training": {"steps": 2}},
            "product": {"method": {"AdamW": {"optimizer": {"kind": "adamw"}}, "LOMO": {"optimizer": {"kind": "lomo"}}}},
            "seeds": [0, 1], "profiles": {"short": {"base": {"training": {"steps": 1}}}}}
    study = lab.Study(grid, profile="short", results=tmp_path / "results")
    folder = study.export(tmp_path / "out")
    again = lab.Study(folder / "grid.yaml", results=tmp_path / "again")
    assert [arm.id for arm in again.arms] == [arm.id for arm in study.arms]
    assert "collie-lab study run grid.yaml" in (folder / "README.md").read_text(encoding="utf-8")
    assert "pending" in (folder / "report.html").read_text(encoding="utf-8")
