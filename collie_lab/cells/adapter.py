"""The adapter cells: what is trained instead of all weights, most of them through peft."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from collie_lab.cells._base import PATH_TEXT, Cell

__all__ = ["IA3", "OFT", "AdaLoRA", "AddedAdapter", "Adapter", "Freeze", "LoRA", "PTuning", "Prefix", "Prompt", "QLoRA",
           "VirtualTokens"]

_Names = tuple[str, ...]


class Adapter(Cell):
    """A small set of trained parameters; all others are frozen."""


class AddedAdapter(Adapter):
    """What the adapters share that peft adds to a model."""

    kind: ClassVar[str] = ""

    load: Annotated[str | None, PATH_TEXT] = None
    """Begin with the values of a peft folder, `run.model_path` of an earlier run, say."""


class LoRA(AddedAdapter):
    """Low-rank adaptation (Hu et al., arXiv 2106.09685): W + (alpha/r)·B·A with W frozen."""

    r: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0.0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: _Names | None = Field(default=None, min_length=1)
    """Names of the linear layers to adapt. Default: all but the output head."""
    rslora: bool = False
    """alpha/√r in the place of alpha/r, so that larger ranks learn more (Kalajdzievski, arXiv 2312.03732)."""
    dora: bool = False
    """The lengths of W's rows are trained apart from their directions (Liu et al., arXiv 2402.09353). Slower."""
    init: Literal["default", "gaussian", "pissa", "olora"] = "default"
    """First values. `default`: A by Kaiming, B zero. `gaussian`: A normal, B zero. `pissa`: the r largest singular
    values of W and their vectors (Meng et al., arXiv 2404.02948); `olora`: the first r columns of its QR decomposition
    (Büyükakyüz, arXiv 2406.01775). These two take B·A out of W at the start; the exported adapter has twice the rank,
    and is one for the model as it was."""
    plus: float = Field(default=1.0, gt=0.0)
    """LoRA+ (Hayou et al., arXiv 2402.12354): B learns so many times as fast as A. The paper advises 16."""


class QLoRA(LoRA):
    """LoRA beside weights of four bits (Dettmers et al., arXiv 2305.14314), which bitsandbytes keeps.

    All linear layers but the output head are quantized, as they are read. `init`, `dora` and so on as with LoRA.
    """

    quantization: Literal["nf4", "fp4"] = "nf4"
    """The four-bit numbers: quantiles of a normal distribution, or floating point."""
    double: bool = True
    """The scales of the blocks are quantized too: 4.13 bits a number in the place of 4.5."""


class AdaLoRA(AddedAdapter):
    """LoRA in the form P·Λ·Q whose ranks are dealt to the layers that need them (Zhang et al., arXiv 2303.10512).

    All layers begin with `init_r`; the least important directions are set to zero, until `target_r` a layer is left on
    average. The loss that is reported includes the term that keeps P and Q orthogonal.
    """

    kind: ClassVar[str] = "adalora"

    init_r: int = Field(default=12, ge=2)
    target_r: int = Field(default=8, ge=1)
    alpha: float = Field(default=32.0, gt=0.0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: _Names | None = Field(default=None, min_length=1)
    """Names of the linear layers to adapt. Default: all but the output head."""
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    """The share of the steps before the first direction goes."""
    final: float = Field(default=0.3, gt=0.0, lt=1.0)
    """The share of the steps, at the end, in which no more go."""
    every: int = Field(default=1, ge=1)
    """Steps between two decisions."""
    betas: tuple[float, float] = (0.85, 0.85)
    """Of the averages of importance and of its uncertainty (eq. 9 and 10)."""
    orthogonal: float = Field(default=0.5, ge=0.0)
    """Weight of the term that keeps P and Q orthogonal (eq. 4)."""


class IA3(AddedAdapter):
    """A trained factor for each key, value and inner activation (Liu et al., arXiv 2205.05638): the fewest parameters.

    It wants a learning rate ten times LoRA's.
    """

    targets: _Names | None = Field(default=None, min_length=1)
    """Names of the linear layers to scale. Default, for families that peft knows: keys, values and the second
    feed-forward layer."""
    feedforward: _Names = ()
    """Those of `targets` whose inputs are scaled, in the place of their outputs."""


class OFT(AddedAdapter):
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


class VirtualTokens(AddedAdapter):
    """What the adapters share that put trained tokens before every document; the model itself is as it was.

    The data's documents get shorter where the context has no room for both.
    """

    kind: ClassVar[str] = ""
    cached: ClassVar[bool] = False
    """The tokens are keys and values of attention alone: they have no place among a document's own."""

    tokens: int = Field(default=20, ge=1)
    """Virtual tokens before every document."""


class Prompt(VirtualTokens):
    """Prompt tuning (Lester et al., arXiv 2104.08691): the embeddings of the virtual tokens are trained.

    It wants a far larger learning rate than LoRA.
    """

    init: Literal["vocabulary", "random"] = "vocabulary"
    """First values: embeddings of tokens drawn from the vocabulary (the paper, section 3.2), or normal numbers."""
    text: str | None = Field(default=None, min_length=1)
    """First values from the tokens of a text, repeated or cut to `tokens`; goes before `init`."""


class PTuning(VirtualTokens):
    """P-tuning (Liu et al., arXiv 2103.10385): as `Prompt`, the embeddings made by a trained network of three layers.

    The network serves the training alone: what is exported are the embeddings.
    """

    hidden: int | None = Field(default=None, ge=1)
    """Width of the network. Default: that of the model."""


class Prefix(VirtualTokens):
    """Prefix tuning (Li & Liang, arXiv 2101.00190): keys and values of the virtual tokens are trained, in every layer.

    With `projection` a network makes them, which serves the training alone.
    """

    cached: ClassVar[bool] = True
    projection: bool = False
    hidden: int | None = Field(default=None, ge=1)
    """Width of the network. Default: that of the model."""
