"""The adapter cells: parameter-efficient fine-tuning through peft."""

from __future__ import annotations

from pydantic import Field

from collie_lab.cells._base import Cell

__all__ = ["Adapter", "LoRA"]


class Adapter(Cell):
    """A small set of trained parameters on a frozen model."""


class LoRA(Adapter):
    """Low-rank adaptation (Hu et al., arXiv 2106.09685): W + (alpha/r)·B·A with W frozen."""

    r: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0.0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the linear layers to adapt. Default: all but the output head."""
