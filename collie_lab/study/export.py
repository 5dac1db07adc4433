"""One folder, or one zip, with everything a reviewer needs; no weights in it."""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from collie_lab.folder import write_json
from collie_lab.study.artefacts import origins, sidecar
from collie_lab.study.contents import default_figures, default_tables
from collie_lab.study.fairness import Fairness, fairness
from collie_lab.study.outcomes import attempts
from collie_lab.study.report import write_report

if TYPE_CHECKING:
    from collie_lab.study._canvas import StudyFigure
    from collie_lab.study.presentation import Presentation
    from collie_lab.study.table import Table

__all__ = ["export"]

#: Of an arm's folder, and of each of its runs: all but weights, checkpoints and what is of this machine alone.
_OF_ARM: Final = ("arm.json", "status.json", "arm.ipynb")
_OF_RUN: Final = ("experiment.yaml", "result.json", "env.json", "status.json", "metrics.jsonl", "events.jsonl",
                  "data/index.json", "errors/*.json", "evaluations/*.jsonl", "system-*.jsonl")
#: Says that a folder, or a zip of one, is an export, which another may replace.
_MARK: Final = "export.json"


def export(
    outcomes: Presentation, out: str | Path, *, tables: Mapping[str, Table] | None = None,
    figures: Mapping[str, StudyFigure] | None = None, prose: str = "", found: Fairness | None = None,
    as_zip: bool | None = None,
) -> Path:
    """Write tables, figures, the report, and of every arm what it was and what it measured; the folder or the zip.

    It is there whole or not at all; an earlier export in its place is replaced.

    Args:
        tables, figures: by the names of their files; default: see `contents`.
        prose: of the report, in Markdown.
        found: the fairness to tell of; default: of what is compared.
        as_zip: default: whether `out` ends in .zip.

    Raises:
        FileExistsError: something else is there.
    """
    out = Path(out).expanduser()
    zipped = out.suffix == ".zip" if as_zip is None else as_zip
    target = out.with_name(f"{out.name}.zip") if zipped and out.suffix != ".zip" else out
    if target.exists() and not (_is_zipped_export if zipped else _is_export)(target):
        raise FileExistsError(f"{target} is there and no earlier export: name another folder, or take it away")
    tables = default_tables(outcomes) if tables is None else tables
    figures = default_figures(outcomes) if figures is None else figures
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder = Path(scratch) / target.name.removesuffix(".zip")
        folder.mkdir()
        _fill(folder, outcomes, tables, figures, prose, fairness(outcomes) if found is None else found)
        if zipped:
            made = Path(shutil.make_archive(str(folder), "zip", scratch, folder.name))
            made.replace(target)
        else:
            if target.exists():
                target.replace(Path(scratch) / "earlier")
            folder.replace(target)
    return target


def _is_export(target: Path) -> bool:
    """Whether it is the folder of an export, or an empty one."""
    return target.is_dir() and ((target / _MARK).is_file() or not any(target.iterdir()))


def _is_zipped_export(target: Path) -> bool:
    """Whether it is the zip of an export, whatever its name is now."""
    if not zipfile.is_zipfile(target):
        return False
    with zipfile.ZipFile(target) as archive:
        return any(re.fullmatch(rf"[^/]+/{re.escape(_MARK)}", name) for name in archive.namelist())


def _fill(folder: Path, outcomes: Presentation, tables: Mapping[str, Table], figures: Mapping[str, StudyFigure],
          prose: str, found: Fairness) -> None:
    for name, table in tables.items():
        table.save(folder / "tables" / name)
    for name, figure in figures.items():
        figure.save(folder / "figures" / name)
    found.frame.to_csv(folder / "fairness.csv", index=False)
    for name, text in outcomes.recipe.items():
        (folder / name).write_text(text, encoding="utf-8")
    places = {name: _copy_arm(outcomes, name, folder / "arms") for name in outcomes.frame.index}
    frame = outcomes.frame
    frame["run"] = [f"arms/{places[name]}/runs/{outcomes.runs[name].id}" if name in outcomes.runs else None
                    for name in frame.index]
    frame.to_csv(folder / "arms.csv")
    (folder / "requirements.txt").write_text(_requirements(outcomes), encoding="utf-8")
    write_json(folder / _MARK, {"title": outcomes.title, "folders": places, **sidecar(outcomes)})
    write_report(outcomes, folder / "report.html", tables=tables, figures=figures, prose=prose, found=found)
    (folder / "README.md").write_text(_readme(outcomes, tables, figures, found), encoding="utf-8")


def _copy_arm(outcomes: Presentation, name: str, parent: Path) -> str | None:
    """The folder of an arm without weights; its name, None where the arm has left nothing."""
    home, run = outcomes.folders.get(name), outcomes.runs.get(name)
    if home is None and run is None:
        return None
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "arm"
    target = parent / (home.name if home is not None else slug)
    if home is not None:
        _copy(home, target, _OF_ARM)
    for attempt, _ in attempts(run) if run is not None else []:
        _copy(attempt.folder.path, target / "runs" / attempt.id, _OF_RUN)
    return target.name


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for file in (file for pattern in patterns for file in sorted(source.glob(pattern)) if file.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, place)


def _requirements(outcomes: Presentation) -> str:
    """The versions that the arms ran with; where they differ, all of them, but for the first as comments."""
    versions: dict[str, dict[str, None]] = {}
    pythons: dict[str, None] = {}
    for run in outcomes.runs.values():
        known = run.folder.read("env.json")
        pythons |= {str(known["python"]): None} if known.get("python") else {}
        for name, version in {"collie-lab": known.get("collie_lab"), **known.get("packages", {})}.items():
            if version:
                versions.setdefault(name, {})[str(version)] = None
    lines = [f"# Python {', '.join(pythons)}"] if pythons else ["# no arm has told its versions"]
    for name, each in versions.items():
        first, *rest = each
        lines += [f"{name}=={first}", *(f"# and of other arms: {name}=={version}" for version in rest)]
    return "\n".join(lines) + "\n"


def _readme(outcomes: Presentation, tables: Mapping[str, Table], figures: Mapping[str, StudyFigure],
            found: Fairness) -> str:
    """What lies where."""
    counts = outcomes.frame["status"].value_counts()
    states = ", ".join(f"{count} {str(status).replace('_', ' ')}" for status, count in counts.items())
    rows = [
        ("report.html", "everything on one page, which needs no network"),
        *((f"tables/{name}.*", f"{table.caption or 'a table'}: CSV (unrounded), Markdown, LaTeX, HTML; its arms (JSON)")
          for name, table in tables.items()),
        *((f"figures/{name}.*", "PDF, SVG, PNG; what is drawn (CSV); its arms (JSON)") for name in figures),
        ("arms.csv", "every figure of every arm, unrounded, in base units"),
        ("fairness.csv", "what else differs between arms that are compared"),
        *((name, "the grid, from which all arms follow") for name in outcomes.recipe),
        ("arms/", "of every arm its notebook, experiment, environment, steps, evaluations and result; no weights"),
        ("requirements.txt", "the versions that the arms ran with"),
        (_MARK, "the arms: ids, runs, commits, machines, folders"),
    ]
    listing = "\n".join(f"| `{name}` | {words} |" for name, words in rows)
    again = "\n".join(f"    collie-lab study run {name}" for name in outcomes.recipe)
    where = "\n".join(f"- {what}: " + "; ".join(f"{value} ({len(arms)} arms)" for value, arms in values.items())
                      for what, values in origins(outcomes).items())
    parts = [f"# {outcomes.title}", f"{len(outcomes.frame)} arms: {states}.",
             *(table.to_markdown() for table in tables.values()), "## Fairness", str(found), "## What lies where",
             f"| | |\n|---|---|\n{listing}", "## Where it was measured", where]
    if again:
        parts += ["## To repeat it", again]
    return "\n\n".join(parts) + "\n"
