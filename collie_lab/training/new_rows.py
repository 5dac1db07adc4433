"""Rows for new tokens: means of a checkpoint's rows, made region by region as its tensors are read.

So every layout makes the rows that it holds, and no rank reads more than those it needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from collie_lab.data import Extension

__all__ = ["extended"]

#: Rows that are read at a time for the mean of all.
_CHUNK: Final = 4096


def extended(tensors: Mapping[str, Any], whole: PreTrainedModel, extension: Extension) -> Mapping[str, Any]:
    """A checkpoint's tensors by their names in `whole`; those with a row a token have the new rows too."""
    vocabulary = {id(parameter) for module in (whole.get_input_embeddings(), whole.get_output_embeddings())
                  if module is not None for parameter in module.parameters(recurse=False)}
    names = {name for name, parameter in whole.named_parameters(remove_duplicate=False) if id(parameter) in vocabulary}
    return _Extended(tensors, names, extension)


class _Extended(Mapping[str, Any]):
    """Tensors, or slices of files, some of them with more rows than are stored."""

    def __init__(self, tensors: Mapping[str, Any], names: set[str], extension: Extension):
        self._tensors, self._names, self._extension = tensors, names, extension

    def __getitem__(self, name: str) -> Any:
        values = self._tensors[name]
        return _Rows(values, self._extension) if name in self._names else values

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Rows:
    """Regions [rows, ...] of a stored tensor with a row for every token, those of new tokens made."""

    def __init__(self, values: Any, extension: Extension):
        self._values, self._extension = values, extension
        self._stored: list[int] = list(values.shape if isinstance(values, Tensor) else values.get_shape())

    def get_shape(self) -> list[int]:
        """The whole shape, as of a slice of a file."""
        if self._stored[0] != self._extension.rows_before:
            return self._stored  # not what the configuration says: an error, which tells this shape
        return [self._extension.rows, *self._stored[1:]]

    def __getitem__(self, region: tuple[slice, ...]) -> Tensor:
        rows, *rest = region
        first, end = self._extension.first, self._extension.first + len(self._extension.pieces)
        bounds = [rows.start, *(bound for bound in (first, end, self._stored[0]) if rows.start < bound < rows.stop),
                  rows.stop]
        parts: list[Tensor] = []
        mean = cache(lambda: self._mean_of_all(rest))
        for start, stop in itertools.pairwise(sorted(bounds)):
            if start < first or end <= start < self._stored[0]:
                parts.append(self._values[(slice(start, stop), *rest)].float())
            else:
                parts += [self._new(index, rest, mean)[None] for index in range(start - first, stop - first)]
        return torch.cat(parts) if parts else self._values[(slice(0, 0), *rest)]

    def _new(self, index: int, rest: list[slice], mean_of_all: Callable[[], Tensor]) -> Tensor:
        """A new row: what is after the last token is for none, and as unlikely as the mean of all."""
        pieces = self._extension.pieces[index] if index < len(self._extension.pieces) else ()
        if not pieces:
            return mean_of_all()
        return torch.cat([self._values[(slice(piece, piece + 1), *rest)] for piece in pieces]).float().mean(0)

    def _mean_of_all(self, rest: list[slice]) -> Tensor:
        count = self._extension.first
        chunks = (self._values[(slice(start, min(start + _CHUNK, count)), *rest)] for start in range(0, count, _CHUNK))
        total: Tensor = sum(chunk.double().sum(0) for chunk in chunks)  # type: ignore[assignment]
        return (total / count).float()
