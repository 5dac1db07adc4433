"""What a form needs to know of a cell's fields, read from their pydantic models; and their values as text and back."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from collie_lab.cells import Cell, CellError, Problem
from collie_lab.cells._source import literal, to_source

__all__ = ["Facts", "facts_of", "field_docs", "read", "summary", "write"]

_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
#: Fields that a cell shows before its others are unfolded.
_MAIN = 6


@dataclass(frozen=True)
class Facts:
    """One field of a cell."""

    name: str
    default: Any
    required: bool
    optional: bool
    """Whether it takes None."""
    choices: tuple[Any, ...]
    """The values to choose from, where they can be listed."""
    base: type[Cell] | None
    """The cells that it takes, where it takes cells."""
    several: bool
    """Whether it takes any number of those."""
    kinds: frozenset[Any]
    """Other types that it takes, by their origin: int, float, str, tuple, dict, Callable."""
    written: tuple[type[Cell], ...]
    """The cells that may be typed, as in Python, where it takes a text too."""
    main: bool
    """Whether the form shows it at once: the first few, a cell's own before those that it inherits."""
    doc: str
    """The string below the field in its class."""
    values: str
    """What it takes and its default, in words."""

    @property
    def help(self) -> str:
        """All that there is to say about it."""
        return "\n".join(filter(None, (f"{self.name}: {self.values}" if self.values else self.name, self.doc)))

    @property
    def typed(self) -> bool:
        """Whether a person can type it."""
        return bool(self.kinds & {int, float, str, tuple, dict})

    def takes(self, value: Any) -> bool:
        """Whether a person could enter this value: no function, no data in memory."""
        if self.choices:
            return value in self.choices
        if isinstance(value, (tuple, Mapping)):
            try:
                return self.typed and bool(ast.literal_eval(repr(value)) == value)
            except (ValueError, SyntaxError):
                return False
        return self.typed and (value is None or isinstance(value, (int, float, str, *self.written)))


@cache
def facts_of(cls: type[Cell]) -> tuple[Facts, ...]:
    """The fields of a cell: those that it needs first, then its own, then the inherited ones."""
    own = cls.__annotations__
    order = sorted(cls.model_fields, key=lambda name: (not cls.model_fields[name].is_required(), name not in own))
    docs = field_docs(cls)
    found, shown = [], 0
    for name in order:
        facts = _facts(name, cls.model_fields[name], docs.get(name, ""))
        main = shown < _MAIN and (facts.typed or bool(facts.choices) or facts.base is not None)
        found.append(replace(facts, main=main))
        shown += main
    return tuple(sorted(found, key=lambda facts: facts.base is not None))  # cells in it last: they take much room


def _facts(name: str, field: FieldInfo, doc: str) -> Facts:
    members, constraints = _members(field.annotation), list(field.metadata)
    kinds: set[Any] = set()
    choices: list[Any] = []
    base: type[Cell] | None = None
    several = False
    for member, more in members:
        constraints += more
        origin, arguments = get_origin(member) or member, get_args(member)
        if origin is Literal:
            choices += arguments
        elif member is bool:
            choices += [False, True]
        elif origin is tuple and (cell := next(filter(_is_cell, _types(arguments[0])), None)) is not None:
            base, several = cell, True
        elif origin is tuple and Callable in _types(arguments[0]):
            kinds.add(Callable)
        elif _is_cell(origin):
            base = origin
        elif member is not types.NoneType:
            kinds.add(dict if inspect.isclass(origin) and issubclass(origin, Mapping) else origin)
    written: tuple[type[Cell], ...] = ()
    if base is not None and str in kinds:
        written, base = tuple(base.kinds().values()), None
    optional = any(member is types.NoneType for member, _ in members)
    required = field.is_required()
    default = None if required else field.get_default(call_default_factory=True)
    value = "" if required or base else f"default {summary(default)}"
    word = " or ".join([_type_text(kinds, constraints), *(f"{cls.__name__}(...)" for cls in written)])
    values = ", ".join(filter(None, (word, value)))
    if optional and choices:
        choices.insert(0, None)
    return Facts(name=name, default=default, required=required, optional=optional, choices=tuple(choices), base=base,
                 several=several, kinds=frozenset(kinds), written=written, main=False, doc=" ".join(doc.split()),
                 values=values)


def _types(annotation: Any) -> list[Any]:
    """The alternatives of a type, by their origin."""
    return [get_origin(member) or member for member, _ in _members(annotation)]


def _is_cell(member: Any) -> bool:
    return inspect.isclass(member) and issubclass(member, Cell)


def _members(annotation: Any) -> list[tuple[Any, list[Any]]]:
    """The alternatives of a type, each with the constraints of its `Annotated`."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return [(member, [*constraints, *more]) for member, constraints in _members(inner)]
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [(annotation, [])]


def _type_text(kinds: set[Any], constraints: list[Any]) -> str:
    words = {int: "a whole number", float: "a number", str: "a text", tuple: "several, with commas between",
             dict: 'a mapping as in Python, {"name": value}'}
    word = " or ".join(text for kind, text in words.items() if kind in kinds)
    flat = [part for item in constraints for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    bounds = [f"{sign} {getattr(item, key):g}" for item in flat for key, sign in _SIGNS.items()
              if getattr(item, key, None) is not None]
    return " ".join(filter(None, (word, " and ".join(bounds))))


@cache
def field_docs(cls: type[Cell]) -> dict[str, str]:
    """The string below each field in its class, the inherited ones too; empty where no source is at hand."""
    docs: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        if not (issubclass(parent, Cell) and parent is not Cell):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(parent)))
        except (OSError, TypeError, SyntaxError):  # a class of a notebook has no file
            continue
        assert isinstance(tree.body[0], ast.ClassDef)
        body = tree.body[0].body
        for node, below in pairwise(body):
            if (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(below, ast.Expr)
                    and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)):
                docs[node.target.id] = inspect.cleandoc(below.value.value)
    docs |= {name: field.description for name, field in cls.model_fields.items() if field.description}
    return docs


def read(facts: Facts, cell: str, text: str) -> Any:
    """The value that a text stands for; numbers stay text, which pydantic reads and judges.

    Raises:
        CellError: a mapping, a quoted text or a cell that is no Python, or a wrong cell.
    """
    text = text.strip()
    for cls in facts.written:
        if text.removeprefix("lab.").startswith(f"{cls.__name__}("):
            return _read_cell(cls, text)
    if text == "None" and facts.optional:
        return None
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if dict in facts.kinds or (text.startswith(("(", "[")) and tuple in facts.kinds) or (quoted and str in facts.kinds):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            example = '{"name": 1}' if dict in facts.kinds else '("a", "b")' if tuple in facts.kinds else '"text"'
            raise CellError([Problem(cell, facts.name, f"cannot be read: {text:.60}",
                                     f"as in Python: {example}")]) from None
    if tuple in facts.kinds:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def _read_cell(cls: type[Cell], text: str) -> Cell:
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        fields = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise CellError([Problem(cls.__name__, "", f"cannot be read: {text:.60}", "as in Python: "
                                 f"{cls.__name__}(name=value)")]) from None
    return cls(**fields)


def write(value: Any) -> str:
    """The text that `read` turns into an equal value."""
    if isinstance(value, Cell):
        return " ".join(line.strip() for line in to_source(value)[0].splitlines())
    if isinstance(value, str):
        plain = value.isprintable() and value == value.strip() and value not in ("", "None")
        return value if plain and value[0] not in "\"'" else literal(value)
    if isinstance(value, tuple) and value != ("None",):
        parts = [part if isinstance(part, str) else literal(part) for part in value]
        simple = parts and all(part and part == part.strip() and part.isprintable() and not set(part) & set(",([")
                               for part in parts)
        return ", ".join(parts) if simple else repr(value)
    return literal(value)


def summary(value: Any) -> str:
    """A value in a few words: for what cannot be typed, and for defaults."""
    if callable(value):
        return str(getattr(value, "__name__", type(value).__name__))
    if isinstance(value, tuple) and value and all(callable(item) for item in value):
        return ", ".join(map(summary, value))
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    return "None" if value is None else write(value)


