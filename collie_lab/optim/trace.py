"""A formula, written once in torch, as the statements of a kernel in another language."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from collie_lab.optim.engine import Formula

__all__ = ["FACTORS", "TRITON", "VECTOR", "C", "is_flat", "operand_kind", "trace"]

#: What the last pass of AdaLomo reads of a matrix and of a vector: the operands of its formula, and how they lie.
FACTORS = (("row", "column"), ("column", "row"), ("shrink", "number"))
VECTOR = (("v", "full"), ("shrink", "number"), ("size", "number"))

_OPERATORS: dict[Any, str] = {
    operator.add: "{} + {}", operator.sub: "{} - {}", operator.mul: "{} * {}", operator.truediv: "{} / {}",
    operator.neg: "-{}", operator.lt: "{} < {}", operator.gt: "{} > {}",
}
TRITON: dict[Any, str] = {
    **_OPERATORS,
    torch.sqrt: "tl.sqrt_rn({})", torch.abs: "tl.abs({})", torch.where: "tl.where({}, {}, {})",
    torch.sign: "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))",  # of NaN: 0, as torch's
}
C: dict[Any, str] = {
    **_OPERATORS,
    torch.sqrt: "std::sqrt({})", torch.abs: "std::abs({})", torch.where: "{} ? {} : {}",
    torch.sign: "{0} > 0 ? T(1) : {0} < 0 ? T(-1) : T(0)",
}
"""The torch functions that a formula may use, and what they are in each language."""


def trace(formula: Formula, operands: tuple[str, ...], scalars: tuple[str, ...], language: dict[Any, str]
          ) -> tuple[list[tuple[str, str]], str, dict[str, str]]:
    """Run `formula.update` on symbols.

    Returns:
        Its statements as (name, expression), the name of the new weight, and those of the new states by state. The
        symbols are `weight`, `gradient`, `o_<name>` for an operand and `s_<name>` for a scalar.

    Raises:
        TypeError: the formula uses a function that the language does not know.
    """
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    names = ("weight", "gradient", *[f"o_{name}" for name in operands], *[f"s_{name}" for name in scalars])
    symbol: dict[str, Any] = {name: fx.Proxy(graph.placeholder(name), tracer) for name in names}
    value: Any  # proxies, in truth
    new: dict[str, Any]
    value, new = formula.update(symbol["weight"], symbol["gradient"], {name: symbol[f"o_{name}"] for name in operands},
                                {name: symbol[f"s_{name}"] for name in scalars})
    constant = "T({})" if language is C else "{}"  # a plain 0.1 would make all of C compute in double
    statements = []
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op != "call_function" or node.target not in language or node.kwargs:
            raise TypeError(f"{type(formula).__name__}.update uses {node.target}, which no kernel knows: "
                            "see collie_lab.optim.trace")
        arguments = [arg.name if isinstance(arg, fx.Node) else constant.format(arg) for arg in node.args]
        statements.append((node.name, language[node.target].format(*arguments)))
    return statements, value.node.name, {name: proxy.node.name for name, proxy in new.items()}  # type: ignore[attr-defined]


def operand_kind(operand: Tensor, weight: Tensor) -> str:
    """How an operand lies beside a weight [m, n]: `full`, a `column` [m, 1], a `row` [1, n], or one `number`."""
    if operand.shape == weight.shape:
        return "full"
    if operand.numel() == 1:
        return "number"
    return "column" if operand.shape[-1] == 1 else "row"


def is_flat(operands: tuple[tuple[str, str], ...]) -> bool:
    """Whether rows and columns are nothing to operands (name, kind): one loop over all elements does."""
    return all(kind in ("full", "number") for _, kind in operands)
