"""The documentation is held to the code: its Python parses, what it calls is there and takes these arguments, its
commands have these options, its links lead somewhere, and no public name is left out."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import typer
import yaml

import collie_lab as lab
from collie_lab.cells import Cell
from collie_lab.cli import app
from collie_lab.launch import Pool, Run, launch
from collie_lab.planning import Fit, Plan, plan
from collie_lab.study.export import export
from collie_lab.study.fairness import fairness
from collie_lab.study.report import write_report
from collie_lab.study.table import Table, tabulate

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
#: What the pages call their variables.
HANDLES: Final[dict[str, type]] = {"exp": lab.Experiment, "run": Run, "study": lab.Study, "pool": Pool, "found": Fit,
                                   "plan": Plan, "table": Table}
#: What needs torch, which takes seconds to import.
HEAVY: Final = {"optim", "merge"}
#: What takes the `**options` of a method.
OPTIONS: Final[dict[Callable[..., Any], Callable[..., Any]]] = {
    lab.Experiment.launch: launch, lab.Experiment.plan: plan, lab.Study.table: tabulate, lab.Study.export: export,
    lab.Study.fairness: fairness, lab.Study.report: write_report}


@cache
def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _blocks(page: str, language: str) -> list[str]:
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", _text(page), flags=re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for named, code in found if named == language]


def _prose(page: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", _text(page), flags=re.MULTILINE | re.DOTALL)


def _python(page: str) -> list[str]:
    """The blocks of Python as a file could hold them: no magics, prompts, outputs, or dots for what is left out."""
    blocks = []
    for block in _blocks(page, "python"):
        lines = [line for line in block.splitlines() if not line.startswith("%")]
        if any(line.startswith(">>> ") for line in lines):
            lines = [line.removeprefix(">>> ") for line in lines if line.startswith(">>> ")]
        blocks.append("\n".join(lines).replace(", ...)", ")"))
    return blocks


def _inline(page: str) -> Iterator[ast.expr]:
    """What stands in backticks in the prose and is a call."""
    for span in re.findall(r"`([^`\n]+\))`", _prose(page)):
        try:
            yield ast.parse(span.replace(r"\|", "|").replace(", ...)", ")"), mode="eval").body
        except SyntaxError:
            continue


def _called(function: ast.expr) -> Any:
    """What a call in a page calls; None for what is no public name of ours."""
    if isinstance(function, ast.Name):
        return getattr(lab, function.id) if function.id in lab.__all__ else None
    if not isinstance(function, ast.Attribute):
        return None
    if isinstance(function.value, ast.Name) and function.value.id in {"lab", *HANDLES}:
        owner = HANDLES.get(function.value.id, lab)
        return None if function.attr in HEAVY else getattr(owner, function.attr)
    outer = _called(function.value)
    return None if outer is None or isinstance(outer, property) else getattr(outer, function.attr, None)


def _parameters(target: Any) -> set[str] | None:
    """The names of what it takes; None where it takes any."""
    parameters = inspect.signature(OPTIONS.get(target, target)).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return None
    return set(parameters)


def _wrong(call: ast.Call, inline: bool) -> str:
    """What a call gives that is not taken, in words; "" where all is."""
    target = _called(call.func)
    if target is None or not callable(target):
        return ""
    known = _parameters(target)
    names = [keyword.arg for keyword in call.keywords if keyword.arg]
    if isinstance(target, type) and issubclass(target, Cell):
        if inline:  # `LoRA(r, alpha)` names fields
            names += [argument.id for argument in call.args if isinstance(argument, ast.Name)]
        known = set(target.model_fields)
    unknown = [] if known is None else [name for name in names if name not in known]
    if unknown or not (isinstance(target, type) and issubclass(target, Cell)):
        return f"{ast.unparse(call)}: no {unknown}" if unknown else ""
    try:
        given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
        target(*map(ast.literal_eval, call.args), **given)
    except lab.CellError as error:
        return "" if "is required" in str(error) or "Ellipsis" in str(error) else str(error)  # what a page leaves out
    except (TypeError, ValueError):  # the same, and what is no literal
        return ""
    return ""


@pytest.mark.parametrize("page", PAGES)
def test_what_the_pages_call_is_there_and_takes_these_arguments(page: str) -> None:
    calls = [(node, inline) for inline, trees in ((False, map(ast.parse, _python(page))), (True, _inline(page)))
             for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [words for call, inline in calls if (words := _wrong(call, inline))] == []


@pytest.mark.parametrize("page", PAGES)
def test_what_the_pages_read_of_handles_is_there(page: str) -> None:
    inline = re.findall(r"`((?:run|study|lab|exp)\.\w+)(?!\.?\w)(?<!\.json)", _prose(page))
    trees = [*map(ast.parse, _python(page)), *map(ast.parse, inline)]
    attributes = [node for tree in trees for node in ast.walk(tree)
                  if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    for node in attributes:
        assert isinstance(node.value, ast.Name)
        owner = lab if node.value.id == "lab" else HANDLES.get(node.value.id)
        fields = {field.name for field in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else set()
        fields |= set(getattr(owner, "model_fields", ()))
        assert owner is None or node.attr in fields | HEAVY or hasattr(owner, node.attr), f"{node.value.id}.{node.attr}"


def test_the_defaults_of_callbacks_are_those_in_their_table() -> None:
    rows = re.findall(r"^\| `([A-Z]\w+\([^`]+\))` \|", _text("docs/callbacks.md"), flags=re.MULTILINE)
    calls = [ast.parse(row, mode="eval").body for row in rows]
    told = {call.func.id: {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
            for call in calls if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.keywords}
    assert len(told) == 10
    for name, defaults in told.items():
        cell = getattr(lab, name)()
        assert {field: getattr(cell, field) for field in defaults} == defaults, name


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_these_options(page: str) -> None:
    lines = [line for block in _blocks(page, "") for line in block.splitlines()]
    lines += re.findall(r"`(collie-lab [^`\n]+)`", _prose(page))
    for line in lines:
        line = line.partition("  #")[0]
        if "collie-lab " in line:
            command: Any = typer.main.get_command(app)
            words = shlex.split(line[line.index("collie-lab "):])[1:]
            while hasattr(command, "commands") and words and not words[0].startswith("-"):
                command = command.commands[words.pop(0).strip(",")]
            known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            assert {word for word in words if word.startswith("--")} <= known, line
        for file in re.findall(r"(?:python|papermill) (\S+\.(?:py|ipynb))", line):
            assert (ROOT / file).is_file(), line


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if link.startswith("http"):
            continue
        file, _, heading = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]


def test_no_public_name_is_left_out() -> None:
    text = "\n".join(map(_text, PAGES))
    assert [name for name in lab.__all__ if not re.search(rf"\b{name}\b", text) and name != "__version__"] == []


def test_the_grids_of_the_guide_have_no_conflicts(tmp_path: Path) -> None:
    whole, tuning = map(yaml.safe_load, _blocks("docs/studies.md", "yaml"))
    for profile in (None, "cpu"):
        assert lab.Study(whole, profile, results=tmp_path).check().errors == []
    base = {"model": "llama-tiny", "data": {"kind": "skills"}, "evaluate": [{"kind": "perplexity"}]}
    study = lab.Study({"name": "tuned", "base": base, **tuning}, results=tmp_path)
    assert study.check().errors == []
    assert len(study.arms) == 6
