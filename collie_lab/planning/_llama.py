"""The parameters of a Llama-like model in sizes; names are those of the model's configuration.

Sizes are those of one rank: with tensor parallelism, of its heads and its columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from collie_lab.planning._sizes import Parameter

__all__ = ["Block", "Linear", "Model", "Shape"]


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that its memory depends on.

    Attributes:
        hidden, intermediate, layers, vocabulary: as in the configuration.
        heads, key_heads, head_size: of attention; of queries, of keys and values, and numbers of each.
        tied: the output head is the embedding.
        attention_bias: which of the four matrices of attention have one.
        head_norms: queries and keys have a norm of each head.
    """

    LINEARS: ClassVar = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    heads: int
    key_heads: int
    head_size: int
    tied: bool = False
    attention_bias: tuple[bool, bool, bool, bool] = (False, False, False, False)
    mlp_bias: bool = False
    head_norms: bool = False

    def cut(self, ranks: int, vocabulary: bool) -> Shape:
        """What a tensor-parallel rank has of it."""
        return replace(self, intermediate=self.intermediate // ranks, heads=self.heads // ranks,
                       key_heads=self.key_heads // ranks,
                       vocabulary=self.vocabulary // ranks if vocabulary else self.vocabulary)

    def linears(self) -> dict[str, tuple[int, int, bool]]:
        """Outputs, inputs and whether there is a bias, of every matrix of a layer."""
        c, i = self.hidden, self.intermediate
        queries, keys = self.heads * self.head_size, self.key_heads * self.head_size
        (q, k, v, o), bias = self.attention_bias, self.mlp_bias
        sizes = ((queries, c, q), (keys, c, k), (keys, c, v), (c, queries, o), (i, c, bias), (i, c, bias), (c, i, bias))
        return dict(zip(self.LINEARS, sizes, strict=True))


@dataclass(eq=False)
class Linear:
    """A matrix, its bias, and the two narrow ones of LoRA beside it; tensor parallelism cuts it by rows or columns."""

    weight: Parameter
    by_rows: bool
    bias: Parameter | None = None
    down: Parameter | None = None
    up: Parameter | None = None

    def parameters(self) -> list[Parameter]:
        """All of them."""
        return [each for each in (self.weight, self.bias, self.down, self.up) if each is not None]


@dataclass(eq=False)
class Block:
    """The parameters of one layer."""

    linears: dict[str, Linear]
    norms: list[Parameter]
    head_norms: list[Parameter]

    def parameters(self) -> list[Parameter]:
        """All of them."""
        return [each for linear in self.linears.values() for each in linear.parameters()] + self.norms + self.head_norms


class Model:
    """The parameters of a model.

    Attributes:
        compute: bytes a number of what matrices are multiplied in.
        autocast: matrices and their operands are cast to it one by one.
        gathered: all weights of a layer are, before it runs (FSDP2).
        cut: the matrices are pieces of a tensor-parallel rank, and so is the vocabulary where `cut_vocabulary`.
    """

    def __init__(self, shape: Shape, kept: int, compute: int, *, autocast: bool, gathered: bool, cut: bool,
                 cut_vocabulary: bool, trained: bool, rank: int, targets: Callable[[str], bool]):
        """The matrices of the `targets` have LoRA's of that `rank` beside them."""
        self.shape, self.compute, self.autocast = shape, compute, autocast
        self.cut, self.cut_vocabulary = cut, cut_vocabulary

        def parameter(*sizes: int) -> Parameter:
            return Parameter(sizes, compute if gathered else kept, kept, trained)

        def linear(name: str, outputs: int, inputs: int, bias: bool) -> Linear:
            made = Linear(parameter(outputs, inputs), name in ("o_proj", "down_proj"))
            made.bias = parameter(outputs) if bias else None
            if targets(name):  # peft keeps adapters in fp32
                made.down, made.up = (Parameter(sizes, compute if gathered else 4, 4)
                                      for sizes in ((rank, inputs), (outputs, rank)))
            return made

        self.embedding = parameter(shape.vocabulary, shape.hidden)
        self.blocks = [
            Block({name: linear(name, *sizes) for name, sizes in shape.linears().items()},
                  [parameter(shape.hidden) for _ in range(2)],
                  [parameter(shape.head_size) for _ in range(2)] if shape.head_norms else [])
            for _ in range(shape.layers)]
        self.norm = parameter(shape.hidden)
        self.head = self.embedding if shape.tied else parameter(shape.vocabulary, shape.hidden)

    def outer(self) -> list[Parameter]:
        """What lies outside of the layers, once."""
        return [self.embedding, self.norm] + ([] if self.shape.tied else [self.head])

    def parameters(self) -> list[Parameter]:
        """All of them, once."""
        return self.outer() + [each for block in self.blocks for each in block.parameters()]
