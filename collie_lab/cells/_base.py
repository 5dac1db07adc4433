"""What every cell is: a frozen pydantic model with plain errors and a dictionary form."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo, field_validator

__all__ = ["PATH_TEXT", "Cell", "CellError", "Problem", "check_names", "known_fields"]

#: For fields that hold a path as text: a `Path` becomes one.
PATH_TEXT: Final = BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an experiment, and what to do about it."""

    cell: str
    field: str
    message: str
    remedy: str = ""
    level: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        where = f"{self.cell}.{self.field}" if self.field else self.cell
        return f"{where}: {self.message}" + (f" → {self.remedy}" if self.remedy else "")


class CellError(ValueError):
    """A user's mistake in a cell or between cells; raised before any process starts."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        lines = [str(problem) for problem in problems]
        super().__init__(lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines))


class Cell(BaseModel):
    """One typed, immutable choice. Unknown fields are errors; `replace` makes a variant.

    `kind` stands for the class in YAML: its name in snake case, unless the class says otherwise;
    "" for a class that only others build on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
    kind: ClassVar[str] = "cell"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" not in cls.__dict__:
            cls.kind = _snake_case(cls.__name__)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        # What help shows: the fields with their types, without what checks them.
        shown = [each.replace(annotation=cls.model_fields[each.name].annotation if each.name in cls.model_fields
                              else each.annotation)
                 for each in cls.__signature__.parameters.values() if each.kind is not each.VAR_POSITIONAL]
        cls.__signature__ = cls.__signature__.replace(parameters=shown)

    def __init__(self, *unnamed: Any, **fields: Any) -> None:
        if unnamed:
            raise CellError([Problem(type(self).__name__, "", f"its fields are given by name, got {unnamed[0]!r:.80}",
                                     known_fields(type(self)))])
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise CellError(_problems(type(self), error)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """To pydantic True is 1, as it is to Python."""
        types = set(_types(cls.model_fields[str(info.field_name)].annotation))
        if types & {int, float} and not types & {bool, Any} and _holds_bool(value):
            raise ValueError(f"a number is wanted, got {value!r:.80}")
        return value

    @classmethod
    def kinds(cls) -> dict[str, type[Self]]:
        """The cells that a slot of this type takes, by their kind: its subclasses, or itself where it has none."""
        found: list[type[Self]] = []
        for child in cls.__subclasses__():
            found += [child, *child.kinds().values()]
        return {child.kind: child for child in found if child.kind} or {cls.kind: cls}

    @property
    def chosen(self) -> set[str]:
        """The fields that differ from their defaults; a YAML file names all, and `model_fields_set` with it."""
        return {name for name, field in type(self).model_fields.items()
                if field.is_required() or getattr(self, name) != field.get_default(call_default_factory=True)}

    def replace(self, **changes: Any) -> Self:
        """The same cell with some fields changed; the result is validated anew."""
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**fields, **changes})

    def to_dict(self, external: Callable[[str, Any], Any] | None = None, path: str = "") -> dict[str, Any]:
        """All fields, defaults included, as plain values that YAML can hold, `kind` first.

        Values that no YAML can hold (callables, lists of records) are given to
        `external(path, value)`, which returns what stands in their place; without it they are errors.
        """
        plain: dict[str, Any] = {"kind": self.kind}
        for name in type(self).model_fields:
            here = f"{path}.{name}" if path else name
            plain[name] = _plain(getattr(self, name), here, external, type(self).__name__)
        return plain


def _plain(value: Any, path: str, external: Callable[[str, Any], Any] | None, cell: str) -> Any:
    if isinstance(value, Cell):
        return value.to_dict(external, path)
    if callable(value):
        if external is None:
            problem = Problem(cell, path.rsplit(".", 1)[-1], "a callable cannot be written to YAML",
                              "leave it out of the file and set it with `replace` after loading")
            raise CellError([problem])
        return external(path, value)
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{path}.{key}", external, cell) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if external is not None and any(isinstance(item, Mapping) for item in value):
            return external(path, value)
        return [_plain(item, f"{path}.{index}", external, cell) for index, item in enumerate(value)]
    return value


def _snake_case(name: str) -> str:
    """AdamW → adamw, RandomTokens → random_tokens, LoRA → lora, ExactMatch → exact_match."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", name).lower()


def known_fields(cell: type[Cell]) -> str:
    """The remedy for a field that a cell does not have."""
    return "its fields: " + ", ".join(cell.model_fields)


def _types(annotation: Any) -> Iterator[Any]:
    """The types that stand in an annotation, but for those of what a callable takes and gives."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from map(type, inner)
    elif inner and origin is not Callable:
        for each in inner[:1] if origin is Annotated else inner:
            yield from _types(each)
    else:
        yield annotation


def _holds_bool(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return any(map(_holds_bool, value)) if isinstance(value, (list, tuple)) else isinstance(value, bool)


def check_names(names: Iterable[Any], cell: str) -> None:
    """Raise where a field's name is no text, before Python does: `on: 1` in YAML is True: 1."""
    for name in names:
        if not isinstance(name, str):
            meant = "; YAML reads on, yes, off and no as true and false" if isinstance(name, bool) else ""
            raise CellError([Problem(cell, str(name), f"a field's name is a text, got {name!r:.80}",
                                     "quote it" + meant)])


def _problems(cell: type[Cell], error: ValidationError) -> list[Problem]:
    problems = []
    items = error.errors()
    if len(items) > 1:  # of a tuple whose items are wrong, pydantic says too that there are too few of them
        items = [item for item in items if item["type"] != "too_short"] or items
    for item in items:
        field = ".".join(str(part) for part in item["loc"] if not _is_union_tag(part)) or ""
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(field, cell.model_fields, n=1)
            remedy = f"did you mean `{close[0]}`?" if close else known_fields(cell)
            problems.append(Problem(cell.__name__, field, "unknown field", remedy))
        elif item["type"] == "missing":
            problems.append(Problem(cell.__name__, field, "this field is required"))
        elif isinstance(inner := item.get("ctx", {}).get("error"), CellError):
            problems += inner.problems  # of a cell within this one
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = "" if item["type"] == "value_error" else f", got {item['input']!r:.80}"
            alone = item["type"] == "tuple_type" and isinstance(item["input"], str)
            remedy = f"one in a list: [{item['input']!r:.80}]" if alone else ""
            problems.append(Problem(cell.__name__, field, message[0].lower() + message[1:] + given, remedy))
    return problems


def _is_union_tag(part: Any) -> bool:
    """Pydantic adds the member of a union that it tried to an error's place: `source.str`."""
    return isinstance(part, str) and (part in {"str", "int", "float", "bool"} or "[" in part or "callable" in part)
