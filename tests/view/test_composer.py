"""The composer, driven through its widgets as a front-end does."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ipywidgets
import pytest

import collie_lab as lab
from collie_lab.cells._source import to_source
from collie_lab.view import composer as module
from collie_lab.view._entries import Entry, FixedEntry
from collie_lab.view._fields import Facts, facts_of, field_docs, read, write
from collie_lab.view._forms import CellEntry, CellForm, CellsEntry
from collie_lab.view.composer import Composer
from tests.cells.test_cells import FULL

SLOTS = {"data": lab.Data, "optimizer": lab.Optimizer, "adapter": lab.Adapter, "evaluate": lab.Evaluation}
KINDS = [(slot, cls) for slot, base in SLOTS.items() for cls in base.kinds().values()]


@pytest.fixture
def compose() -> Iterator[Callable[..., Composer]]:
    """`lab.compose` that closes what it made."""
    before = set(_open_widgets())
    made: list[Composer] = []

    def start(experiment: lab.Experiment | None = None) -> Composer:
        made.append(lab.compose(experiment))
        return made[-1]

    yield start
    for composer in made:
        composer.close()
    assert set(_open_widgets()) == before


def _open_widgets() -> dict[str, Any]:
    state: dict[str, Any] = ipywidgets.Widget.get_manager_state()["state"]
    return state


def _form(composer: Composer, slot: str, index: int = 0) -> CellForm:
    entry = composer.form.entries[slot]
    if isinstance(entry, CellsEntry):
        entry = entry.items[index]
    assert isinstance(entry, CellEntry)
    assert entry.form is not None
    return entry.form


def _choose(composer: Composer, slot: str, name: str) -> CellForm:
    """Choose a kind by its name, as the front-end does; an evaluation is added."""
    entry = composer.form.entries[slot]
    if isinstance(entry, CellsEntry):
        entry.add[name].click()
        return _form(composer, slot, -1)
    assert isinstance(entry, CellEntry)
    entry.kind.index = [label for label, _ in entry.kind.options].index(name)
    return _form(composer, slot)


def _enter(entry: Entry, value: Any) -> None:
    """Type or choose a value."""
    if isinstance(entry.control, ipywidgets.Text):
        entry.control.value = write(value)
    elif isinstance(entry.control, ipywidgets.Checkbox):
        entry.control.value = value
    else:
        entry.control.index = entry.facts.choices.index(value)


def _candidates(facts: Facts) -> list[Any]:
    """Values to try in the place of a field's default."""
    numbers = [0.25, 3, 2.0, -0.5] if facts.kinds & {int, float} else []
    return [*(choice for choice in facts.choices if choice != facts.default), *numbers, {"a": 2}, "some_text", "bytes",
            ("q", "it's (v|w), or"), (0.5, 0.25), (0.5, 0.25, 0.125), ("add", "copy"), (1, 2), ("bleu", "rouge")]


def _changed(cls: type[lab.Cell], required: dict[str, Any]) -> dict[str, Any]:
    """Fields of a cell with every value that can be typed changed."""
    fields = dict(required)
    for facts in facts_of(cls):
        for value in _candidates(facts) if facts.typed or facts.choices else []:
            if facts.name in required or not facts.takes(value):
                continue
            try:
                cell = cls(**{**fields, facts.name: value})
            except lab.CellError:
                continue
            if getattr(cell, facts.name) != facts.default:
                fields[facts.name] = getattr(cell, facts.name)
                break
    return fields


@pytest.mark.parametrize(("slot", "cls"), KINDS, ids=[cls.kind for _, cls in KINDS])
def test_every_field_of_every_kind_can_be_typed(slot: str, cls: type[lab.Cell],
                                                compose: Callable[..., Composer]) -> None:
    required = {facts.name: "file.json" for facts in facts_of(cls) if facts.required}
    fields = _changed(cls, required)
    functions = {"score", "metrics"} | ({"format"} if cls is lab.MultipleChoice else set())
    assert set(cls.model_fields) - set(fields) <= {"data", *functions}  # a cell, and functions
    composer = compose(lab.Experiment(model="llama-1m"))
    form = _choose(composer, slot, cls.__name__)
    for name, value in fields.items():
        _enter(form.entries[name], value)
    cell = cls(**fields)
    experiment = lab.Experiment(model="llama-1m", **{slot: (cell,) if slot == "evaluate" else cell})
    assert composer.experiment == experiment
    assert eval(composer.code, {"lab": lab}) == experiment
    again = compose(experiment)  # the same experiment, shown, gives itself
    assert again.experiment == experiment
    assert again.code == composer.code


@pytest.mark.parametrize("experiment", [
    FULL, lab.Experiment(model="llama-1m"), lab.Experiment(model="llama-1m", parallel=lab.Parallel(zero=1, dp=2)),
    lab.Experiment(model="llama-1m", parallel=lab.Parallel(zero=1, engine="torch")),
    lab.Experiment(model=lab.Model("None", init="random"), data=lab.Text("a.txt", separator="\n\n"),
                   evaluate=[lab.Perplexity(data=lab.Skills(tasks=("add",)), name="own")]),
])
def test_a_given_experiment_is_shown_and_returned(experiment: lab.Experiment, compose: Callable[..., Composer]) -> None:
    composer = compose(experiment)
    assert composer.experiment == experiment
    assert composer.code == experiment.to_code()
    for slot in ("model", "data", "optimizer", "parallel", "training"):
        for name, entry in _form(composer, slot).entries.items():
            value = getattr(getattr(experiment, slot), name)
            if entry.control.disabled:
                assert value is None
            elif isinstance(entry.control, ipywidgets.Text):
                shown = entry.control.value or entry.control.placeholder
                assert shown == write(value), f"{slot}.{name}"
            else:
                assert entry.control.value == value, f"{slot}.{name}"


def test_functions_and_data_in_memory_stay_as_they_are(compose: Callable[..., Composer]) -> None:
    def reader(record: dict[str, Any]) -> tuple[str, str]:
        return record["a"], record["b"]

    experiment = lab.Experiment(
        model="llama-1m", data=lab.Instructions([{"a": "x", "b": "y"}] * 60, format=reader),
        training=lab.Training(loss=max), evaluate=[lab.ExactMatch(score=lambda a, b: 1.0)], callbacks=(print,))
    composer = compose(experiment)
    assert composer.experiment == experiment
    shown = _form(composer, "data").entries
    assert (shown["source"].control.value, shown["format"].control.value) == ("a list of 60", "reader")
    assert shown["format"].control.disabled
    _enter(_form(composer, "training").entries["steps"], 7)
    assert composer.experiment == experiment.with_("training.steps", 7)
    code, held = to_source(composer.experiment)
    assert code in composer.code
    assert eval(composer.code, {"lab": lab, **held}) == composer.experiment


def test_callbacks_are_chosen_and_functions_among_them_stay(compose: Callable[..., Composer]) -> None:
    experiment = lab.Experiment(model="llama-1m", callbacks=[print, lab.EarlyStopping(patience=5), lab.Callback()])
    composer = compose(experiment)
    assert composer.experiment == experiment
    entry = composer.form.entries["callbacks"]
    assert isinstance(entry, CellsEntry)
    assert [item.control.value for item in entry.items if isinstance(item, FixedEntry)] == ["print", "Callback"]
    entry.add["TensorBoard"].click()
    early = entry.items[1]
    assert isinstance(early, CellEntry)
    assert early.form is not None
    _enter(early.form.entries["patience"], 2)
    assert composer.experiment.callbacks == (print, lab.EarlyStopping(patience=2), experiment.callbacks[2],
                                             lab.TensorBoard())
    assert "nothing is evaluated" in early.form.entries["monitor"].problems


def test_problems_stand_at_their_fields(compose: Callable[..., Composer]) -> None:
    composer = compose(lab.Experiment(model=lab.Model("llama-1m", init="random"), evaluate=[lab.Perplexity()]))
    assert composer._status.value.endswith("✓ no problems</span>")
    form = _form(composer, "optimizer")
    lr, betas = form.entries["lr"], form.entries["betas"]
    lr.control.value = "3e-"
    betas.control.value = "0.9, 1.5"
    _form(composer, "model").entries["config"].control.value = "{layers: 2}"
    _form(composer, "evaluate").entries["every"].control.value = "0"
    composer.form.entries["name"].control.value = "no spaces"
    with pytest.raises(lab.CellError) as caught:
        _ = composer.experiment
    assert {f"{problem.cell}.{problem.field}" for problem in caught.value.problems} == {
        "AdamW.lr", "AdamW.betas.1", "Model.config", "Perplexity.every", "Experiment.name"}
    assert "valid number" in lr.problems
    assert "less than 1" in betas.problems
    assert "as in Python" in _form(composer, "model").entries["config"].problems
    assert "match pattern" in composer.form.entries["name"].problems
    assert "5 errors" in composer._status.value
    assert "AdamW.betas.1" in composer._summary.value
    assert "stale" in composer._code._dom_classes
    for entry, text in ((lr, "3e-5"), (betas, ""), (_form(composer, "model").entries["config"], ""),
                        (_form(composer, "evaluate").entries["every"], "10"), (composer.form.entries["name"], "a")):
        entry.control.value = text
        assert not entry.problems
    assert composer.experiment.optimizer == lab.AdamW(lr=3e-5)
    assert "stale" not in composer._code._dom_classes


def test_of_two_evaluations_of_a_kind_the_wrong_one_is_marked(compose: Callable[..., Composer]) -> None:
    composer = compose(FULL.replace(evaluate=[lab.Perplexity(), lab.Perplexity(name="b")]))
    _form(composer, "evaluate", 1).entries["every"].control.value = "-1"
    assert not _form(composer, "evaluate", 0).entries["every"].problems
    assert "greater than or equal to 1" in _form(composer, "evaluate", 1).entries["every"].problems


def test_conflicts_that_check_finds_stand_at_their_fields(compose: Callable[..., Composer]) -> None:
    composer = compose(lab.Experiment(model=lab.Model("llama-1m", init="random")))
    form = _form(composer, "optimizer")
    assert form._more is not None
    _enter(_form(composer, "training").entries["batch_size"], 7)
    _enter(_form(composer, "parallel").entries["dp"], 2)
    assert "cannot be shared equally" in _form(composer, "training").entries["batch_size"].problems
    _enter(_form(composer, "training").entries["batch_size"], 8)
    _enter(form.entries["clip_by"], "previous_norm")
    assert 'class="warning"' in form.entries["clip_by"].problems
    assert "1 warning" in composer._status.value
    assert form._more.value  # what is folded away and has a problem unfolds
    assert form.entries["clip_by"].box in form.box.children[-1].children
    _choose(composer, "optimizer", "SGD").entries["nesterov"].control.value = True
    assert "nesterov needs momentum" in composer.form.entries["optimizer"].problems


def test_a_kind_keeps_what_was_typed_into_it(compose: Callable[..., Composer]) -> None:
    composer = compose(lab.Experiment(model="llama-1m", optimizer=lab.Lion(lr=7e-5)))
    _enter(_choose(composer, "optimizer", "Sophia").entries["rho"], 0.5)
    assert composer.experiment.optimizer == lab.Sophia(rho=0.5)
    _choose(composer, "optimizer", "Lion")
    assert composer.experiment.optimizer == lab.Lion(lr=7e-5)
    _choose(composer, "adapter", "LoRA")
    assert composer.experiment.adapter == lab.LoRA()
    entry = composer.form.entries["adapter"]
    assert isinstance(entry, CellEntry)
    entry.kind.index = 0
    assert composer.experiment.adapter is None


def test_a_default_that_another_field_moves_shows_through(compose: Callable[..., Composer]) -> None:
    composer = compose(lab.Experiment(model="llama-1m"))
    entries = _form(composer, "parallel").entries
    _enter(entries["zero"], 1)
    assert entries["engine"].control.value == "deepspeed"
    _enter(entries["zero"], 2)
    assert entries["engine"].control.value == "torch"
    assert composer.code == ('lab.Experiment(model=lab.Model("llama-1m"), parallel=lab.Parallel(zero=2))')


def test_evaluations_are_added_and_removed(compose: Callable[..., Composer]) -> None:
    composer = compose(FULL)
    entry = composer.form.entries["evaluate"]
    assert isinstance(entry, CellsEntry)
    entry.add["ExactMatch"].click()
    assert composer.experiment.evaluate == (*FULL.evaluate, lab.ExactMatch())
    remove = entry.items[0].control.children[-1]
    remove.click()
    assert composer.experiment.evaluate == (FULL.evaluate[1], lab.ExactMatch())


def test_without_an_experiment_it_says_what_is_missing(compose: Callable[..., Composer]) -> None:
    composer = compose()
    assert repr(composer) == "not yet an experiment: Model.source: this field is required"
    assert "required" in _form(composer, "model").entries["source"].problems
    _form(composer, "model").entries["source"].control.value = "llama-1m"
    assert repr(composer) == composer.code == 'lab.Experiment(model=lab.Model("llama-1m"))'


def test_yaml_and_python_are_shown(compose: Callable[..., Composer]) -> None:
    composer = compose(FULL)
    assert "lab" in composer._code.value
    composer.language.value = "YAML"
    assert "num_hidden_layers" in composer._code.value
    assert "kind" in composer._code.value
    composer = compose(FULL.with_("training.loss", max))
    composer.language.value = "YAML"
    assert "YAML cannot hold what is in memory alone: max" in composer._code.value


def test_a_new_cell_appears_by_itself(compose: Callable[..., Composer]) -> None:
    class Counting(lab.Evaluation):
        """Counts."""

        start: int = 3
        """Where to begin."""

    composer = compose(lab.Experiment(model="llama-1m"))
    entries = _choose(composer, "evaluate", "Counting").entries
    assert entries["start"].control.tooltip == "start: a whole number, default 3\nWhere to begin."
    _enter(entries["start"], 5)
    assert composer.experiment.evaluate == (Counting(start=5),)


def test_docs_of_fields_come_from_their_classes() -> None:
    docs = field_docs(lab.Text)
    assert docs["overlong"].startswith("`split` cuts")  # its own
    assert docs["shuffle"].startswith("A new order every epoch")  # inherited
    facts = {facts.name: facts for facts in facts_of(lab.AdamW)}
    assert facts["lr"].help == ("lr: a number > 0, default 2e-5\n"
                                "Peak learning rate; `Training.schedule` moves it.")


@pytest.mark.parametrize(("cls", "field", "value"), [
    (lab.Text, "separator", "\n\n"), (lab.Text, "separator", " "), (lab.Text, "separator", "None"),
    (lab.Text, "separator", "'"), (lab.Text, "separator", None), (lab.Text, "separator", ""),
    (lab.LoRA, "targets", ("q", "v")), (lab.LoRA, "targets", ("a,b",)), (lab.LoRA, "targets", ("None",)),
    (lab.Model, "config", {"a": [1, None, "x"]}), (lab.Model, "config", {}),
])
def test_texts_and_back(cls: type[lab.Cell], field: str, value: Any) -> None:
    facts = next(facts for facts in facts_of(cls) if facts.name == field)
    assert read(facts, "Cell", write(value)) == value


def test_the_check_of_what_was_typed_before_is_ignored(compose: Callable[..., Composer],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    begun, release, ended = threading.Event(), threading.Event(), threading.Event()

    def check(experiment: lab.Experiment) -> list[lab.Problem]:
        steps = experiment.training.steps
        if steps == 1:  # slow, and overtaken
            begun.set()
            release.wait(60)
            ended.set()
        return [lab.Problem("Training", "steps", f"{steps} steps", level="warning")]

    monkeypatch.setattr(module, "_check", check)
    monkeypatch.setattr(module, "_PAUSES", (0.0, 0.0))

    async def scenario() -> None:
        composer = compose(lab.Experiment(model="llama-1m"))
        steps = _form(composer, "training").entries["steps"]

        async def until(condition: Callable[[], bool]) -> None:
            async with asyncio.timeout(60):
                while not condition():
                    await asyncio.sleep(0.005)

        await until(lambda: "100 steps" in steps.problems)
        steps.control.value = "1"
        await until(begun.is_set)
        assert "checking" in composer._status.value
        steps.control.value = "2"
        await until(lambda: "2 steps" in steps.problems)
        release.set()
        await until(ended.is_set)
        for _ in range(10):
            await asyncio.sleep(0)
        assert "2 steps" in steps.problems

    asyncio.run(scenario())


def test_in_a_notebook(compose: Callable[..., Composer], monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []

    class Handle:
        def update(self, data: dict[str, Any], raw: bool) -> None:
            shown.append(data)

    def display(data: dict[str, Any], raw: bool, display_id: bool) -> Handle:
        shown.append(data)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    composer = compose(FULL)
    composer._ipython_display_()
    assert shown[0]["application/vnd.jupyter.widget-view+json"]["model_id"] == composer.widget.model_id
    assert shown[0]["text/plain"] == FULL.to_code()
    composer.close()  # the code takes its place
    assert set(shown[1]) == {"text/html", "text/plain"}
    monkeypatch.setattr(module, "attended", lambda: False)
    compose(FULL)._ipython_display_()  # papermill: nobody could type
    assert set(shown[2]) == {"text/html", "text/plain"}


def test_importing_collie_lab_does_not_import_widgets() -> None:
    code = "import sys, collie_lab; assert not {'ipywidgets', 'IPython', 'pygments'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_plan_and_what_fits(compose: Callable[..., Composer], monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        def __init__(self, *asked: Any):
            self.asked = asked

        def _repr_html_(self) -> str:
            return " ".join(map(str, self.asked))

    monkeypatch.setattr(lab.Experiment, "plan", lambda experiment, gpu: Answer("plan", experiment.model.source, gpu))
    monkeypatch.setattr("collie_lab.planning.fit", lambda experiment, gpus, gpu, **_: Answer("fit", gpus, gpu))
    composer = compose(FULL)
    bar = composer.plan
    bar.plan.click()
    assert bar.answer.value == "plan llama-7b None"
    bar.gpu.value = "H200"
    bar.plan.click()
    assert bar.answer.value == "plan llama-7b H200"
    bar.fit.click()
    assert bar.answer.value == "fit 2 H200"

    def refused(*_: Any, **__: Any) -> Answer:
        raise lab.CellError([lab.Problem("Parallel", "engine", "DeepSpeed's buffers are its own", "another")])

    monkeypatch.setattr(lab.Experiment, "plan", refused)
    bar.plan.click()
    assert "Parallel.engine" in bar.answer.value
    monkeypatch.setattr(lab.Experiment, "plan", lambda *_: 1 / 0)
    bar.plan.click()
    assert "division by zero" in bar.answer.value


def test_the_form_lives_while_a_plan_is_made(compose: Callable[..., Composer], monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(lab.Experiment, "plan", lambda *_: go.wait(30) and FULL.optimizer)
    monkeypatch.setattr(lab.Lomo, "_repr_html_", lambda _: "done", raising=False)

    async def click() -> list[str]:
        bar = compose(FULL).plan
        bar.plan.click()
        seen = [bar.answer.value]
        go.set()
        while "a dry run" in bar.answer.value:
            await asyncio.sleep(0.01)
        return [*seen, bar.answer.value]

    assert asyncio.run(click()) == ['<span class="checking">a dry run …</span>', "done"]
