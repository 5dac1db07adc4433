"""The grid file: from YAML to combinations of choices.

    name: memory
    base: {model: llama-tiny, training: {steps: 4}}      # an experiment, as `Experiment.to_yaml` writes it, or parts
    product:                                             # axes, of which every combination is an arm
      training.batch_size: [2, 4]                        # a slot, or a dotted field, and its values
      method:                                            # a name of one's own, and groups of changes by label
        AdamW: {optimizer: {kind: adamw}}
        LOMO: {optimizer: {kind: lomo}, training.weights: bf16}
    seeds: [0, 1, 2]

What is changed is merged into the base: a field of a cell at a time, but for a cell of another `kind`, which replaces
the one that is there. Of two changes the one of the smaller part counts: `optimizer.lr` before `optimizer`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, field_validator

from collie_lab.cells import SHAPES, Cell, CellError, Experiment, Problem
from collie_lab.cells._base import check_names
from collie_lab.cells._yaml import read
from collie_lab.study.mappings import as_mapping

__all__ = ["DEFAULT_RUNNER", "Choice", "Combination", "Grid", "Tune", "size_in_bytes"]

#: What runs an arm where nothing else is named.
DEFAULT_RUNNER: Final = "collie_lab"

_BYTES: Final = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
                 "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
#: Columns of a study's frame, which no axis of one's own can be called.
_COLUMNS: Final = ("arm", "id", "status", "reason", "attempts", "run", "code", "arm_seconds")
#: Top-level keys that a profile cannot have.
_FIXED: Final = ("name", "profiles")


class Tune(Cell):
    """Values of an axis are tried with the first seed; the other seeds run at the best of them."""

    axis: str
    """An axis of the grid; or a field (`optimizer.lr`) for which every group of another axis has a list of values."""
    metric: str
    """A figure of a run's summary: `loss`, or what an evaluation gives."""
    better: Literal["min", "max"] | None = None
    """Default: what the evaluation says of its figure."""


class Grid(Cell):
    """A grid file's contents, with a profile's in place."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: dict[str, Any] = Field(default_factory=dict)
    product: dict[str, Any] = Field(default_factory=dict)
    """Axes: every combination of their values is an arm."""
    zip: dict[str, Any] = Field(default_factory=dict)
    """Axes of one length that go together."""
    include: list[dict[str, Any]] = Field(default_factory=list)
    """Further arms: a label for each axis, and changes."""
    exclude: list[dict[str, Any]] = Field(default_factory=list)
    """Arms to leave out: labels, or lists of labels, by axis."""
    seeds: list[int] | None = Field(default=None, min_length=1)
    """Every arm once with each, as `training.seed`. Default: the base's."""
    tune: Tune | None = None
    timeout: float | None = Field(default=None, gt=0)
    """Seconds that an arm may take."""
    memory_limit: int | None = Field(default=None, gt=0)
    """Bytes of the host's memory that an arm's processes may take together: a number, or `4 GB`."""
    profiles: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("memory_limit", mode="before")
    @classmethod
    def _in_bytes(cls, value: Any) -> Any:
        return size_in_bytes(value)

    @field_validator("base")
    @classmethod
    def _is_experiment(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Without its `kind`, which `Experiment.to_yaml` writes."""
        if value.get("kind", Experiment.kind) != Experiment.kind:
            raise ValueError(f"{value['kind']!r} is no experiment")
        return {path: item for path, item in value.items() if path != "kind"}

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError(f"a seed stands twice: {value}")
        return value

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any], profile: str | None = None,
             changes: Mapping[str, Any] | None = None) -> Self:
        """A grid from its file, or from a mapping of the same form, with a profile merged into it. A mapping may have
        cells in it.

        `changes` are made to `base` last: `{"data.source": "alpaca.json"}`.

        Raises:
            CellError: no such file or profile, no valid YAML, an unknown key, an axis that is none.
        """
        fields = _mapping(source)
        check_names(fields, "Grid")
        whole = cls(**fields)
        if profile is not None and profile not in whole.profiles:
            raise _error("profile", f"no profile {profile!r} in {whole.name}",
                         "there are: " + ", ".join(whole.profiles) if whole.profiles else "it has none: leave it out")
        known = [key for key in cls.model_fields if key not in _FIXED]
        for name, keys in whole.profiles.items():
            if wrong := [key for key in keys if key not in known]:
                raise _error(f"profiles.{name}.{wrong[0]}", "a profile has no such key",
                             "its keys: " + ", ".join(known))
        over = whole.profiles[profile] if profile is not None else {}
        fields = {key: getattr(whole, key) for key in whole.model_fields_set}
        grid = cls(**{**fields, **{key: _over(key, fields.get(key), value) for key, value in over.items()}})
        grid = grid.replace(base=_folded((changes or {}).items(), _folded(grid.base.items())))
        grid._check_axes()
        return grid

    # --- from axes to combinations

    @property
    def axes(self) -> dict[str, list[Choice]]:
        """The choices of each axis of `product` and `zip`, in their order."""
        return {name: _choices(name, content) for name, content in {**self.product, **self.zip}.items()}

    def combinations(self) -> list[Combination]:
        """The combinations of labels, without seeds: of the product, the zip, what is included, less what is excluded.

        Where the grid tunes by lists in the groups of an axis, their values are labels too.
        """
        axes = self.axes
        together = [dict(zip(self.zip, group, strict=True))
                    for group in zip(*(axes[name] for name in self.zip), strict=True)] if self.zip else [{}]
        found = [_combination({name: picked[name] for name in axes})
                 for alone in itertools.product(*(axes[name] for name in self.product))
                 for group in together for picked in [{**dict(zip(self.product, alone, strict=True)), **group}]]
        found = self._excluded(found)
        found += [self._included(entry, axes) for entry in self.include]
        return [each for combination in found for each in self._tried(combination)]

    def mapping(self, combination: Combination) -> tuple[dict[str, Any], str]:
        """The experiment of a combination as `Experiment.from_dict` takes it, and its runner."""
        defaults = {name: {"kind": field.default.kind} for name, field in Experiment.model_fields.items()
                    if isinstance(field.default, Cell)}
        made = _folded(combination.changes, _merged(defaults, self.base))
        model = made.get("model")
        if isinstance(model, Mapping) and model.get("source") in tuple(SHAPES) and "init" not in model:
            made["model"] = {**model, "init": "random"}  # a shape has no other weights
        return made, str(made.pop("runner", DEFAULT_RUNNER))

    def _excluded(self, found: list[Combination]) -> list[Combination]:
        for rule in ({name: _wanted(item) for name, item in rule.items()} for rule in self.exclude):
            kept = [each for each in found if not _matches(each.labels, rule)]
            if len(kept) == len(found):
                told = {name: ", ".join(map(str, labels)) for name, labels in rule.items()}
                there = [f"{name} ({', '.join(str(each.label) for each in axis)})" for name, axis in self.axes.items()]
                raise _error("exclude", f"no arm has {_text(told)}",
                             f"the axes, and their labels, are: {'; '.join(there) or 'none'}")
            found = kept
        return found

    def _included(self, entry: Mapping[str, Any], axes: Mapping[str, list[Choice]]) -> Combination:
        picked: dict[str, Choice] = {}
        changes = [(path, value) for path, value in entry.items() if path not in axes and path != "seed"]
        for name, choices in axes.items():
            if name in entry:
                known = next((choice for choice in choices if choice.label == entry[name]), None)
                if known is None:
                    known = _choice(name, entry[name]) if _is_path(name) else Choice(entry[name], ())
                picked[name] = known
            elif not _is_path(name):
                raise _error("include", f"{_text(entry)} has no `{name}`", "label it on every axis with a name of "
                             "its own")
        for path, _ in changes:
            _check_path(path, "include")
        bare = _combination(picked)
        missing = {name: _value_at(self.mapping(Combination(bare.labels, (*bare.changes, *changes)))[0], name)
                   for name in axes if name not in picked}
        labels = {name: bare.labels.get(name, missing.get(name)) for name in axes}
        return Combination(labels, (*bare.changes, *changes), seed=entry.get("seed"), included=True)

    def _tried(self, combination: Combination) -> Iterator[Combination]:
        """The combination once for each value of a list that is to be tuned over."""
        axis = self.tune.axis if self.tune is not None else None
        if axis is None or axis in combination.labels:
            yield combination
            return
        found = [value for path, value in combination.changes if path == axis]
        if not found or not (isinstance(found[-1], list) or combination.included):
            raise _error("tune.axis", f"`{axis}` is no axis of the grid, and {_text(combination.labels)} has no list "
                         "of values for it", f"{axis}: [...] in each group, or as an axis")
        others = tuple(change for change in combination.changes if change[0] != axis)
        for value in found[-1] if isinstance(found[-1], list) else [found[-1]]:
            yield Combination({**combination.labels, axis: value}, (*others, (axis, value)), combination.seed,
                              combination.included)

    def _check_axes(self) -> None:
        both = self.product.keys() & self.zip.keys()
        if both:
            raise _error("zip", f"the axis `{next(iter(both))}` stands in `product` too")
        lengths = {name: len(self.axes[name]) for name in self.zip}
        if len(set(lengths.values())) > 1:
            raise _error("zip", f"its axes are of different lengths: {lengths}")
        for name, choices in self.axes.items():
            labels = [str(choice.label) for choice in choices]
            if twice := [label for label in labels if labels.count(label) > 1]:
                raise _error(name, f"two of its values are called {twice[0]!r}", "name them: {label: value}")


@dataclass(frozen=True)
class Choice:
    """One value of an axis: how it is called, and what it changes."""

    label: Any
    changes: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Combination:
    """A choice of every axis."""

    labels: dict[str, Any]
    changes: tuple[tuple[str, Any], ...]
    """Paths and values, as the axes have them."""
    seed: int | None = None
    """The seed that an included arm names."""
    included: bool = False
    """Not of the product: nothing is tuned."""


def size_in_bytes(value: Any) -> Any:
    """`4 GB`, `512 MiB` → bytes; what is no string stays.

    Raises:
        ValueError: a string of another form.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?i?B)\s*", value)
    if match is None:
        raise ValueError(f"no size in bytes: {value!r}; e.g. 4 GB")
    return int(float(match[1]) * _BYTES[match[2].upper()])


def _merged(base: Any, over: Any) -> Any:
    """Both mappings in one, deeply; a cell of another kind, and what is no mapping, replaces what is there."""
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    if over.get("kind", base.get("kind")) != base.get("kind"):
        return over
    return {**base, **{key: _merged(base.get(key), value) for key, value in over.items()}}


def _nested(path: str, value: Any) -> dict[str, Any]:
    """`training.steps`, 4 → {"training": {"steps": 4}}; a model that is named changes the source alone."""
    check_names([path], "Grid")
    head, _, rest = path.partition(".")
    if rest:
        return {head: _nested(rest, value)}
    if path == "model" and isinstance(value, (str, Path)):
        return {path: {"source": str(value)}}
    return {path: value}


def _folded(changes: Iterable[tuple[str, Any]], start: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A mapping with changes made to it, those of the smallest parts last."""
    made = dict(start or {})
    for path, value in sorted(changes, key=lambda change: str(change[0]).count(".")):
        made = _merged(made, _nested(path, value))
    return made


def _mapping(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return {key: as_mapping(value) for key, value in source.items()}
    found = read(source, "Grid")
    if not isinstance(found, Mapping):
        raise _error("", f"{source} is no mapping")
    return dict(found)


def _over(key: str, below: Any, over: Any) -> Any:
    """A profile's value of a top-level key over the one of the file."""
    if key == "base" and isinstance(over, Mapping):
        return _folded(over.items(), _folded((below or {}).items()))
    if key not in ("product", "zip") or not isinstance(over, Mapping):
        return over
    axes = {**(below or {}), **{name: _some((below or {}).get(name), axis) for name, axis in over.items()}}
    return {name: axis for name, axis in axes.items() if axis is not None}


def _some(below: Any, over: Any) -> Any:
    """An axis of a profile; a list of labels chooses among those of the file's axis."""
    if isinstance(below, Mapping) and isinstance(over, list):
        if unknown := [label for label in over if label not in list(below)]:
            raise _error("profiles", f"{unknown[0]!r} is no label of the axis",
                         "there are: " + ", ".join(map(str, below)))
        return {label: below[label] for label in over}
    return over


def _choices(name: str, content: Any) -> list[Choice]:
    """The values of one axis.

    Raises:
        CellError: the axis is no field of an experiment and has no changes; it is empty.
    """
    if name == "seed":
        raise _error(name, "seeds are no axis", "`seeds: [0, 1, 2]`")
    if name in _COLUMNS:
        raise _error(name, "every study's frame has a column of this name", "another name for the axis")
    if not isinstance(content, (list, Mapping)) or not content:
        raise _error(name, "an axis has a list of values, or a mapping from labels to values or changes, "
                     f"got {content!r:.60}")
    if _is_path(name):
        pairs = content.items() if isinstance(content, Mapping) else [(None, value) for value in content]
        return [_choice(name, value, label) for label, value in pairs]
    if not isinstance(content, Mapping):
        raise _error(name, "no field of an experiment", "an axis with a name of its own has a mapping: "
                     "{label: {optimizer: {kind: ...}, training.weights: bf16}}; else, the experiment's fields are: "
                     + ", ".join(Experiment.model_fields))
    for label, changes in content.items():
        if not isinstance(changes, Mapping):
            raise _error(f"{name}.{label}", f"a mapping of changes is wanted, got {changes!r:.60}")
        for path in changes:
            _check_path(path, f"{name}.{label}")
    return [Choice(label, tuple(changes.items())) for label, changes in content.items()]


def _choice(name: str, value: Any, label: Any = None) -> Choice:
    return Choice(_label(value) if label is None else label, ((name, value),))


def _label(value: Any) -> Any:
    """What a table calls a value: itself, or the kind of a cell."""
    if isinstance(value, Mapping):
        name = value.get("kind", value.get("source", ""))
        rest = ", ".join(f"{key}={item}" for key, item in value.items() if key not in ("kind", "source"))
        return f"{name}({rest})" if rest else str(name)
    if isinstance(value, list):
        return ", ".join(str(_label(item)) for item in value)
    return "none" if value is None else value


def _combination(picked: Mapping[str, Choice]) -> Combination:
    changes = tuple(change for choice in picked.values() for change in choice.changes)
    owners: dict[str, str] = {}
    for name, choice in picked.items():
        for path, _ in choice.changes:
            if path in owners:
                raise _error(name, f"the axis `{owners[path]}` sets `{path}` too", "let one of them")
            owners[path] = name
    return Combination({name: choice.label for name, choice in picked.items()}, changes)


def _is_path(name: str) -> bool:
    return name == "runner" or name.split(".")[0] in Experiment.model_fields


def _check_path(path: str, where: str) -> None:
    if not _is_path(str(path)):
        raise _error(where, f"`{path}` is no field of an experiment",
                     "its fields: " + ", ".join([*Experiment.model_fields, "runner"]))


def _value_at(mapping: Any, path: str) -> Any:
    for part in path.split("."):
        mapping = mapping.get(part) if isinstance(mapping, Mapping) else None
    return _label(mapping)


def _wanted(items: Any) -> list[Any]:
    """The labels that a rule has for an axis; it may have the values instead, as the axis has them."""
    return [_label(item) for item in (items if isinstance(items, Sequence) and not isinstance(items, str) else [items])]


def _matches(labels: Mapping[str, Any], rule: Mapping[str, list[Any]]) -> bool:
    return all(name in labels and _label(labels[name]) in wanted for name, wanted in rule.items())


def _text(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in entry.items())


def _error(field: str, message: str, remedy: str = "") -> CellError:
    return CellError([Problem("Grid", field, message, remedy)])
