"""From a cell to the Python source that makes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, Final, NamedTuple

from collie_lab.cells._base import Cell

__all__ = ["explicit_fields", "literal", "to_source"]

_WIDTH: Final = 110
#: Longer lists and mappings stand in the source by a name: they are data, and would bury the choices.
_LONGEST: Final = 50


class _Place(NamedTuple):
    """Where an expression begins: columns its further lines are indented by, and columns left on its first."""

    indent: int
    room: int


def to_source(cell: Cell) -> tuple[str, dict[str, Any]]:
    """A Python expression that makes an equal cell, and the values that stand in it by a name alone.

    Classes of collie_lab are written `lab.<class>`, others by their bare name. Functions, and data in memory of more
    than 50 items, have no source here: they are in the mapping.
    """
    held: dict[str, Any] = {}
    return _value(cell, "", _Place(0, _WIDTH), held), held


def explicit_fields(cell: Cell) -> dict[str, Any]:
    """The fields that must be given to make an equal cell: those that differ from their defaults.

    A default that another field would change is among them: `engine` in `Parallel(zero=1, engine="torch")`.
    """
    cls = type(cell)
    given = {name: getattr(cell, name) for name, field in cls.model_fields.items()
             if field.is_required() or getattr(cell, name) != field.get_default(call_default_factory=True)}
    again = cls(**given)
    return {name: getattr(cell, name) for name in cls.model_fields
            if name in given or getattr(again, name) != getattr(cell, name)}


def explicit(value: Any) -> Any:
    """An equal cell to which only those fields were given; cells in it, and in tuples, likewise.

    What `to_dict` has written gives all fields, and an option that is given without having an effect is warned of.
    """
    if isinstance(value, tuple):
        return tuple(explicit(item) for item in value)
    if not isinstance(value, Cell):
        return value
    return type(value)(**{name: explicit(item) for name, item in explicit_fields(value).items()})


def literal(value: Any) -> str:
    """Plain values as a person writes them: `5e-4`, `"text"`; else their `repr`."""
    text = repr(value)
    if isinstance(value, float):
        return text if 1e-3 < abs(value) < 1e4 or value == 0 else min(text, _scientific(value), key=len)
    if isinstance(value, str) and text.startswith("'") and '"' not in value:
        return f'"{text[1:-1]}"'
    return text


def _scientific(value: float) -> str:
    """With an exponent and no digit too many: `5e-4`."""
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int)  # cells take finite numbers alone
    first, *rest = map(str, digits)
    mantissa = f"{first}.{''.join(rest)}" if rest else first
    return f"{'-' if sign else ''}{mantissa}e{exponent + len(rest)}"


def _value(value: Any, name: str, place: _Place, held: dict[str, Any]) -> str:
    """Source of a field's value."""
    if isinstance(value, Cell):
        return _cell(value, place, held)
    if callable(value) or (isinstance(value, (list, tuple, Mapping)) and len(value) > _LONGEST):
        return _hold(value, name, held)
    if isinstance(value, Mapping):
        return _group("{", "}", place, [(f"{literal(key)}: ", _later(item, name, held)) for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        # A tuple of cells reads better as a list; pydantic takes either.
        round_ = isinstance(value, tuple) and not any(isinstance(item, Cell) for item in value)
        items = [("", _later(item, name, held)) for item in value]
        return _group("(" if round_ else "[", ")" if round_ else "]", place, items, lone="," if round_ else "")
    return literal(value)


def _later(value: Any, name: str, held: dict[str, Any]) -> Callable[[_Place], str]:
    return lambda place: _value(value, name, place, held)


def _cell(cell: Cell, place: _Place, held: dict[str, Any]) -> str:
    cls, given = type(cell), explicit_fields(cell)
    by_place = [name for name, parameter in inspect.signature(cls.__init__).parameters.items()
                if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name in given]
    items = [("", _later(given.pop(name), name, held)) for name in by_place]
    items += [(f"{name}=", _later(value, name, held)) for name, value in given.items()]
    prefix = "lab." if cls.__module__.partition(".")[0] == "collie_lab" else ""
    return _group(f"{prefix}{cls.__name__}(", ")", place, items)


def _group(opening: str, closing: str, place: _Place, items: list[tuple[str, Callable[[_Place], str]]],
           lone: str = "") -> str:
    """The items on one line where that fits, on one further line where they are plain, else each on one of its own.

    `lone` follows a single item.
    """
    line = opening + ", ".join(head + make(_Place(0, _WIDTH)) for head, make in items)
    line += (lone if len(items) == 1 else "") + closing
    if "\n" not in line and len(line) <= place.room:
        return line
    inner = place.indent + 4
    plain = line[len(opening):-len(closing)]
    if not set("\n([{") & set(plain) and len(plain) <= _WIDTH - inner:
        return "\n".join([opening, " " * inner + plain, " " * place.indent + closing])
    lines = [f"{' ' * inner}{head}{make(_Place(inner, _WIDTH - inner - len(head) - 1))}," for head, make in items]
    return "\n".join([opening, *lines, " " * place.indent + closing])


def _hold(value: Any, name: str, held: dict[str, Any]) -> str:
    """Give a value a name that no other value has."""
    own = getattr(value, "__name__", "")
    base = own if own.isidentifier() else name
    number, chosen = 1, base
    while chosen in held and held[chosen] is not value:
        number, chosen = number + 1, f"{base}_{number + 1}"
    held[chosen] = value
    return chosen
