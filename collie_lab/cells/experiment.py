"""The experiment: cells composed into something that can be checked, planned and launched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, field_validator

from collie_lab.cells._base import Cell, CellError, Problem
from collie_lab.cells.adapter import Adapter
from collie_lab.cells.data import Data, Skills
from collie_lab.cells.evaluation import Evaluation
from collie_lab.cells.model import Model
from collie_lab.cells.optimizer import AdamW, Optimizer
from collie_lab.cells.parallel import Parallel
from collie_lab.cells.training import Training

if TYPE_CHECKING:
    from collie_lab.check import Report
    from collie_lab.launch import Run
    from collie_lab.planning import GPU, Plan

__all__ = ["Experiment"]


class Experiment(Cell):
    """A model, data, an optimizer and a layout: everything a run needs, and nothing that is hidden."""

    _slots: ClassVar[dict[str, type[Cell]]] = {
        "model": Model, "data": Data, "optimizer": Optimizer, "adapter": Adapter,
        "parallel": Parallel, "training": Training, "evaluate": Evaluation,
    }

    model: Model
    data: Data = Skills()
    optimizer: Optimizer = AdamW()
    adapter: Adapter | None = None
    parallel: Parallel = Parallel()
    training: Training = Training()
    evaluate: tuple[Evaluation, ...] = ()
    callbacks: tuple[Callable[..., Any], ...] = ()
    """Each is called with the trainer after every optimizer step, on every rank."""
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The first part of the run folder's name."""

    @field_validator("model", mode="before")
    @classmethod
    def _model_by_name(cls, value: Any) -> Any:
        return Model(value) if isinstance(value, (str, Path)) else value

    def with_(self, path: str, value: Any) -> Self:
        """A variant with one nested field changed: `exp.with_("optimizer.lr", 3e-5)`."""
        head, _, rest = path.partition(".")
        if head not in type(self).model_fields:
            raise CellError([Problem("Experiment", head, "unknown field",
                                     "its fields: " + ", ".join(type(self).model_fields))])
        if not rest:
            return self.replace(**{head: value})
        cell = getattr(self, head)
        if not isinstance(cell, Cell):
            raise CellError([Problem("Experiment", head, f"`{path}`: there is no cell to change",
                                     f"set it whole: with_({head!r}, ...)")])
        return self.replace(**{head: cell.replace(**{rest: value})})

    def check(self) -> Report:
        """Every conflict between the cells, their files and the model, with its reason and remedy."""
        from collie_lab.check import check

        return check(self)

    def plan(self, gpu: GPU | str | None = None, **options: Any) -> Plan:
        """Memory of a step, rank by rank, before anything runs; see `collie_lab.planning.plan`."""
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
        import yaml

        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, source: str | Path) -> Self:
        """Read a YAML file (a `Path`, or a string that ends in .yaml or .yml) or YAML text."""
        import yaml

        text = str(source)
        if isinstance(source, Path) or text.endswith((".yaml", ".yml")):
            if not Path(source).is_file():
                raise CellError([Problem("Experiment", "", f"no such file: {source}")])
            text = Path(source).read_text(encoding="utf-8")
        try:
            mapping = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise CellError([Problem("Experiment", "", f"this is no valid YAML: {error}")]) from None
        if not isinstance(mapping, Mapping):
            raise CellError([Problem("Experiment", "", "the YAML is no mapping of cells")])
        return cls.from_dict(mapping)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. `kind` chooses the cell where a slot takes several types."""
        fields: dict[str, Any] = dict(mapping)
        if fields.pop("kind", cls.kind) != cls.kind:
            raise CellError([Problem("Experiment", "kind", f"{mapping['kind']!r} is no experiment")])
        for slot, base in cls._slots.items():
            if fields.get(slot) is None:
                continue
            if slot == "evaluate":
                fields[slot] = tuple(_cell_from(item, base, slot) for item in fields[slot])
            else:
                fields[slot] = _cell_from(fields[slot], base, slot)
        return cls(**fields)


def _cell_from(value: Any, base: type[Cell], slot: str) -> Cell:
    """A cell from its mapping; the classes a slot takes are the subclasses of its base."""
    if isinstance(value, base):
        return value
    if isinstance(value, str) and base is Model:
        return Model(value)
    if not isinstance(value, Mapping):
        raise CellError([Problem("Experiment", slot, f"a mapping is wanted, got {value!r:.60}",
                                 f"e.g. `{slot}: {{kind: ...}}`")])
    fields = dict(value)
    kinds = base.kinds()
    kind = fields.pop("kind", next(iter(kinds)) if len(kinds) == 1 else None)
    if kind not in kinds:
        message = "`kind` is missing" if kind is None else f"unknown kind {kind!r}"
        raise CellError([Problem("Experiment", slot, message, "there are: " + ", ".join(sorted(kinds)))])
    if isinstance(fields.get("data"), Mapping):  # an evaluation's own data
        fields["data"] = _cell_from(fields["data"], Data, f"{slot}.data")
    if base is Model and "source" not in fields:
        raise CellError([Problem("Model", "source", "this field is required")])
    return kinds[kind](**fields)
