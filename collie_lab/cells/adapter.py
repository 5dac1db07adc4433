"""The adapter cells: what is trained instead of all weights, most of them through peft."""

from __future__ import annotations

from pydantic import Field, field_validator

from collie_lab.cells._base import Cell

__all__ = ["IA3", "OFT", "Adapter", "Freeze", "LoRA"]

_Names = tuple[str, ...]


class Adapter(Cell):
    """A small set of trained parameters; all others are frozen."""


class LoRA(Adapter):
    """Low-rank adaptation (Hu et al., arXiv 2106.09685): W + (alpha/r)·B·A with W frozen.

    LoRA+ (Hayou et al., arXiv 2402.12354) gives B a larger learning rate: `AdamW(lr_scale={"*lora_B*": 16})`.
    """

    r: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0.0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: _Names | None = Field(default=None, min_length=1)
    """Names of the linear layers to adapt. Default: all but the output head."""
    rslora: bool = False
    """alpha/√r in the place of alpha/r, so that larger ranks learn more (Kalajdzievski, arXiv 2312.03732)."""
    dora: bool = False
    """The lengths of W's rows are trained apart from their directions (Liu et al., arXiv 2402.09353). Slower."""


class IA3(Adapter):
    """A trained factor for each key, value and inner activation (Liu et al., arXiv 2205.05638): the fewest parameters.

    It wants a learning rate ten times LoRA's.
    """

    targets: _Names | None = Field(default=None, min_length=1)
    """Names of the linear layers to scale. Default, for families that peft knows: keys, values and the second
    feed-forward layer."""
    feedforward: _Names = ()
    """Those of `targets` whose inputs are scaled, in the place of their outputs."""


class OFT(Adapter):
    """Orthogonal fine-tuning (Qiu et al., arXiv 2306.07280): the inputs of W are rotated, block by block."""

    block_size: int = Field(default=32, ge=2)
    """Sides of the rotations; where it does not divide a layer's inputs, peft takes the nearest that does."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The share of rotations that are left out of a step."""
    targets: _Names | None = Field(default=None, min_length=1)
    """Names of the linear layers to adapt. Default: all but the output head."""


class Freeze(Adapter):
    """No new parameters: of the model's own, only those are trained whose names match one of the patterns.

    `Freeze(("*norm*",))`, `Freeze(("model.layers.2?.*", "lm_head*"))`; `*` and `?` as in file names.
    """

    train: _Names = Field(min_length=1)

    @field_validator("train", mode="before")
    @classmethod
    def _one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    def __init__(self, train: _Names | str, **fields: object) -> None:
        super().__init__(**{"train": train, **fields})
