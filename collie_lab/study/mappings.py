"""Cells where a grid would have mappings: a notebook has them at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collie_lab.cells import Cell, Experiment, Model, Parallel, Training

__all__ = ["as_mapping"]

#: Cells whose place in an experiment says what they are.
_ALONE = (Experiment, Model, Parallel, Training)


def as_mapping(value: Any) -> Any:
    """The same with mappings for cells, of the fields that were set: their labels tell no more than that."""
    if isinstance(value, Cell):
        fields = {name: as_mapping(getattr(value, name)) for name in type(value).model_fields
                  if name in value.model_fields_set}
        return fields if isinstance(value, _ALONE) else {"kind": value.kind, **fields}
    if isinstance(value, Mapping):
        return {key: as_mapping(item) for key, item in value.items()}
    return [as_mapping(item) for item in value] if isinstance(value, (list, tuple)) else value
