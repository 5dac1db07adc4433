"""The experiment: cells composed into something that can be checked, planned and launched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from collie_lab.cells._base import Cell, CellError, Problem, check_names, known_fields
from collie_lab.cells.adapter import Adapter, LoRA, VirtualTokens
from collie_lab.cells.callback import Callback, CallbackCell
from collie_lab.cells.data import Data, Skills
from collie_lab.cells.evaluation import Evaluation
from collie_lab.cells.model import Model
from collie_lab.cells.optimizer import AdamW, Optimizer
from collie_lab.cells.parallel import Parallel
from collie_lab.cells.tokenizer import NewTokenizer
from collie_lab.cells.training import Training

if TYPE_CHECKING:
    from collie_lab.check import Report
    from collie_lab.launch import Run
    from collie_lab.planning import GPU, Plan
    from collie_lab.size import Size

__all__ = ["Experiment"]


class Experiment(Cell):
    """A model, data, an optimizer and a layout: everything a run needs, and nothing that is hidden."""

    _slots: ClassVar[dict[str, type[Cell]]] = {
        "model": Model, "data": Data, "optimizer": Optimizer, "adapter": Adapter,
        "parallel": Parallel, "training": Training, "evaluate": Evaluation, "callbacks": CallbackCell,
    }

    model: Model
    data: Data = Skills()
    optimizer: Optimizer = AdamW()
    adapter: Adapter | None = None
    parallel: Parallel = Parallel()
    training: Training = Training()
    evaluate: tuple[Evaluation, ...] = ()
    callbacks: tuple[CallbackCell | Callable[..., Any], ...] = ()
    """Built-in ones, a `Callback` of one's own, or a function, which is called with the trainer after every optimizer
    step; on every rank."""
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The first part of the run folder's name."""

    @property
    def virtual(self) -> VirtualTokens | None:
        """The adapter, where it puts tokens before every document."""
        return self.adapter if isinstance(self.adapter, VirtualTokens) else None

    @property
    def scaled_optimizer(self) -> Optimizer:
        """The optimizer with the factor that LoRA+ wants; those that it names itself count first."""
        if not isinstance(self.adapter, LoRA) or self.adapter.plus == 1.0:
            return self.optimizer
        own, pattern = self.optimizer.lr_scale, "*lora_B*"
        return self.optimizer.replace(lr_scale={**own, pattern: own.get(pattern, self.adapter.plus)})

    @model_validator(mode="before")
    @classmethod
    def _cells(cls, fields: Any) -> Any:
        """Slots take a cell, its mapping as in YAML, or a model's name; no class, and nothing else."""
        return cls._with_cells(fields) if isinstance(fields, Mapping) else fields

    def with_(self, path: str, value: Any) -> Self:
        """A variant with one nested field changed: `exp.with_("optimizer.lr", 3e-5)`.

        A whole slot takes a cell, or its mapping as in YAML.
        """
        head, _, rest = path.partition(".")
        if head not in type(self).model_fields:
            raise CellError([Problem("Experiment", head, "unknown field", known_fields(type(self)))])
        if not rest:
            return self.replace(**{head: value})
        return self.replace(**{head: _changed(getattr(self, head), head, rest, value)})

    def check(self) -> Report:
        """Every conflict between the cells, their files and the model, with its reason and remedy."""
        from collie_lab.check import check

        return check(self)

    def steps_for(self, epochs: float) -> int:
        """Optimizer steps of so many passes over the data: `exp.with_("training.steps", exp.steps_for(epochs=3))`."""
        from collie_lab.data.epochs import steps_for

        return steps_for(self, epochs)

    def size(self) -> Size:
        """Parameters, how many of them are trained, and their bytes; found by another process in some seconds."""
        from collie_lab.size import find_size

        return find_size(self)

    def plan(self, gpu: GPU | str | None = None, **options: Any) -> Plan:
        """Memory and speed of a step, rank by rank, before anything runs; see `collie_lab.planning.plan`."""
        from collie_lab.planning import plan

        return plan(self, gpu, **options)

    def launch(self, **options: Any) -> Run:
        """Start the run in processes of its own; see `collie_lab.launch.launch` for the options."""
        from collie_lab.launch import launch

        return launch(self, **options)

    def to_code(self) -> str:
        """Python source that makes an equal experiment, defaults left out: an expression `lab.Experiment(...)`.

        Functions, and data in memory of more than 50 items, stand in it by a name; a comment before it says which.
        """
        from collie_lab.cells._source import to_source

        code, held = to_source(self)
        return (f"# defined elsewhere: {', '.join(held)}\n" if held else "") + code

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The experiment as YAML, defaults included; written to `path` where one is given."""
        from collie_lab.cells._yaml import dump

        text = dump(self.to_dict())
        if path is not None:
            Path(path).expanduser().write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, source: str | Path) -> Self:
        """Read a YAML file (a `Path`, or a string that ends in .yaml or .yml) or YAML text."""
        from collie_lab.cells._yaml import parse, read

        if isinstance(source, Path) or source.endswith((".yaml", ".yml")):
            if not Path(source).expanduser().is_file():
                raise CellError([Problem("Experiment", "", f"no such file: {source}")])
            mapping = read(source, "Experiment")
        else:
            mapping = parse(source, "Experiment")
        if not isinstance(mapping, Mapping):
            raise CellError([Problem("Experiment", "", "the YAML is no mapping of cells")])
        return cls.from_dict(mapping)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. `kind` chooses the cell where a slot takes several types."""
        check_names(mapping, "Experiment")
        fields: dict[str, Any] = dict(mapping)
        if fields.pop("kind", cls.kind) != cls.kind:
            raise CellError([Problem("Experiment", "kind", f"{mapping['kind']!r} is no experiment")])
        return cls(**fields)

    @classmethod
    def _with_cells(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The same fields, with a cell for every mapping in a slot."""
        made = dict(fields)
        for slot, base in cls._slots.items():
            if made.get(slot) is None:
                continue
            if slot in ("evaluate", "callbacks"):
                if not isinstance(made[slot], (list, tuple)):
                    raise CellError([Problem("Experiment", slot, f"a list is wanted, got {made[slot]!r:.60}",
                                             f"`{slot}=[...]`")])
                made[slot] = tuple(_cell_from(item, base, slot) for item in made[slot])
            else:
                made[slot] = _cell_from(made[slot], base, slot)
        return made


def _changed(cell: Any, place: str, path: str, value: Any) -> Cell:
    """The cell at `place` of an experiment with the field at `path` in it changed."""
    if not isinstance(cell, Cell):
        raise CellError([Problem("Experiment", place.partition(".")[0], f"`{place}.{path}`: there is no cell to change",
                                 f"set it whole: with_({place!r}, ...)")])
    head, _, rest = path.partition(".")
    if not rest or head not in type(cell).model_fields:
        return cell.replace(**{path: value})
    return cell.replace(**{head: _changed(getattr(cell, head), f"{place}.{head}", rest, value)})


def _cell_from(value: Any, base: type[Cell], slot: str) -> Any:
    """A cell from its mapping; the classes a slot takes are the subclasses of its base."""
    if isinstance(value, type) and issubclass(value, (base, Callback)):
        raise CellError([Problem("Experiment", slot, f"a class, where one of it is wanted: {value.__name__}()")])
    if isinstance(value, base) or (base is CallbackCell and callable(value)):
        return value
    if isinstance(value, (str, Path)) and base is Model:
        return Model(value)
    if not isinstance(value, Mapping):
        what = "neither a callback nor a function" if base is CallbackCell else "neither a cell nor its mapping"
        known = ", ".join(sorted(child.__name__ for child in base.kinds().values()))
        raise CellError([Problem("Experiment", slot, f"{what}: {value!r:.60}",
                                 f"there are: {known}; in YAML `{slot}: {{kind: ...}}`")])
    fields = dict(value)
    kinds = base.kinds()
    kind = fields.pop("kind", next(iter(kinds)) if len(kinds) == 1 else None)
    if not isinstance(kind, str) or kind not in kinds:
        message = "`kind` is missing" if kind is None else f"unknown kind {kind!r}"
        raise CellError([Problem("Experiment", slot, message, "there are: " + ", ".join(sorted(kinds)))])
    inside: dict[str, type[Cell]] = {"data": Data, "tokenizer": NewTokenizer}  # of an evaluation, of a model
    for name, inner in inside.items():
        if isinstance(fields.get(name), Mapping):
            fields[name] = _cell_from(fields[name], inner, f"{slot}.{name}")
    if base is Model and "source" not in fields:
        raise CellError([Problem("Model", "source", "this field is required")])
    check_names(fields, kinds[kind].__name__)
    return kinds[kind](**fields)
