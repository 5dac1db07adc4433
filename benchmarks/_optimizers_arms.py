"""What `optimizers.py` compares: our rules, the same rules of libraries, and the bytes that each must move."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from collie_lab.cells import SHAPES
from collie_lab.optim import SGD, AdaLomo, AdamW, Adan, Lion, Rule, RuleOptimizer, SophiaG
from collie_lab.optim.engine import choose_engine

__all__ = ["CASES", "Arm", "Case", "agreement", "bytes_of_library", "library_arms", "our_arms", "shapes"]

OURS = "collie_lab"
_LR = 1e-4

Step = Callable[[], Any]
Build = Callable[[list[nn.Parameter]], tuple[torch.optim.Optimizer, Step]]


@dataclass(frozen=True)
class Case:
    """A rule with its hyper-parameters, and how often it must read and write what.

    Weight decay is what the rule's authors advise; SGD and AdaLomo have none, which spares libraries a pass.

    Attributes:
        states: as large as the weights, read and written.
        only_read: of the same size, only read.
        weight_reads, gradient_reads: passes over memory; every rule writes the weights once. AdaLomo cannot do
            with less: row and column means of all g² come before the norm of u, and that before the update.
            What the three passes find in the cache is not counted out, so small tensors may beat this floor.
    """

    name: str
    rule: Rule
    hyper: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0
    states: int = 0
    only_read: int = 0
    weight_reads: int = 1
    gradient_reads: int = 1

    def bytes(self, rounding: str) -> int:
        """Bytes a parameter that our rule must move: states in fp32, gradients in the weights' own type."""
        own = 4 if rounding == "exact" else 2
        read, written = {"exact": (4, 4), "stochastic": (2, 2), "kahan": (4, 4), "master": (4, 6)}[rounding]
        return (self.weight_reads * read + written + self.gradient_reads * own
                + 8 * self.states + 4 * self.only_read)


CASES = [
    Case("SGD (LOMO)", SGD(), {}),
    Case("SGD, momentum", SGD(momentum=True), {"momentum": 0.9}, states=1),
    Case("AdamW", AdamW(), {"betas": (0.9, 0.999), "eps": 1e-8}, 0.1, states=2),
    Case("Lion", Lion(), {"betas": (0.9, 0.99)}, 0.1, states=1),
    Case("Adan", Adan(), {"betas": (0.98, 0.92, 0.99), "eps": 1e-8}, 0.02, states=4),
    Case("SophiaG", SophiaG(), {"betas": (0.965, 0.99), "rho": 0.04, "hessian_every": 10}, 0.1, states=1, only_read=1),
    Case("AdaLomo", AdaLomo(), weight_reads=2, gradient_reads=3),
]


@dataclass(frozen=True)
class Arm:
    """One implementation of a rule. `auto` marks the engine that `RuleOptimizer` takes by itself."""

    name: str
    build: Build
    auto: bool = False

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)


# --- ours -----------------------------------------------------------------------------------------


def our_arms(case: Case, device: torch.device, rounding: str, *, in_backward: bool,
             only_auto: bool) -> list[Arm]:
    """Our engines; the one that `auto` means comes first."""
    kinds = {"Native": "native", "Triton": "triton", "Compiled": "compile", "Eager": "eager"}
    auto = kinds[type(choose_engine("auto", device)).__name__]
    foreign = "native" if device.type == "cuda" else "triton"
    others = [name for name in kinds.values() if name not in (auto, foreign)]
    engines = [auto] if only_auto else [auto, *others]
    arms = [Arm(f"{OURS} {name}", partial(_ours, case, name, rounding, False), name == auto) for name in engines]
    if in_backward:
        arms.append(Arm(f"{OURS} {auto}, in backward", partial(_ours, case, auto, rounding, True)))
    return arms


def _ours(case: Case, engine: str, rounding: str, in_backward: bool, parameters: list[nn.Parameter]
          ) -> tuple[torch.optim.Optimizer, Step]:
    optimizer = RuleOptimizer(parameters, case.rule, engine=engine, in_backward=in_backward, lr=_LR,
                              rounding=None if rounding == "exact" else rounding, weight_decay=case.weight_decay,
                              **case.hyper)

    def hooks() -> None:  # what the backward pass would call, without the backward pass
        for parameter in parameters:
            optimizer._on_gradient(parameter)
        optimizer.step()

    return optimizer, hooks if in_backward else optimizer.step


# --- libraries ------------------------------------------------------------------------------------


def library_arms(case: Case, device: torch.device) -> tuple[list[Arm], list[str]]:
    """All variants of the libraries that are installed, and the names of those that are not."""
    arms, missing = _torch_arms(case), []
    for package, find in (("pytorch_optimizer", _pytorch_optimizer_arms), ("optimi", _optimi_arms)):
        try:
            module = importlib.import_module(package)
        except ImportError:
            missing.append(package)
        else:
            arms += find(module, case, device)
    return arms, missing


def _simple(make: Callable[..., torch.optim.Optimizer], options: dict[str, Any], parameters: list[nn.Parameter]
            ) -> tuple[torch.optim.Optimizer, Step]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optimi calls its own foreach deprecated
        optimizer = make(parameters, lr=_LR, **options)
    return optimizer, optimizer.step


def _variants(library: str, make: Callable[..., torch.optim.Optimizer], options: dict[str, Any],
              variants: dict[str, dict[str, Any]]) -> list[Arm]:
    return [Arm(f"{library} {name}", partial(_simple, make, {**options, **more})) for name, more in variants.items()]


def _torch_arms(case: Case) -> list[Arm]:
    loops = {"foreach": {"foreach": True}, "for loop": {"foreach": False}}
    options: dict[str, Any] = {"weight_decay": case.weight_decay}
    match case.rule:
        case SGD():
            return _variants("torch", torch.optim.SGD, case.hyper, {"fused": {"fused": True}, **loops})
        case AdamW():
            return _variants("torch", torch.optim.AdamW, options | case.hyper, {"fused": {"fused": True}, **loops})
        case AdaLomo():  # the same rule with these options, but for lr ≤ 1/√t
            options |= {"eps": (1e-30, 1e-3), "d": 1.0}
            return _variants("torch Adafactor", torch.optim.Adafactor, options, loops)
    return []


def _pytorch_optimizer_arms(library: Any, case: Case, device: torch.device) -> list[Arm]:
    loops = {"foreach": {"foreach": True}, "for loop": {"foreach": False}}
    options = {"weight_decay": case.weight_decay, **case.hyper}
    match case.rule:
        case SGD(momentum=momentum):
            arms = _variants("pytorch_optimizer SGDW", library.SGDW, case.hyper, loops)
            return arms if momentum else [*arms, Arm("pytorch_optimizer LOMO", partial(_lomo, library))]
        case Lion():
            return _variants("pytorch_optimizer", library.Lion, options, loops)
        case Adan():
            return _variants("pytorch_optimizer", library.Adan, options, loops)
        case AdaLomo():
            return [Arm("pytorch_optimizer AdaLOMO", partial(_adalomo, library))]
    return []  # its SophiaH is another rule


def _lomo(library: Any, parameters: list[nn.Parameter]) -> tuple[torch.optim.Optimizer, Step]:
    optimizer = library.LOMO(nn.ParameterList(parameters), lr=_LR)
    return optimizer, lambda: optimizer.grad_func(0)


def _adalomo(library: Any, parameters: list[nn.Parameter]) -> tuple[torch.optim.Optimizer, Step]:
    """As its `fused_backward` does, once for all parameters: not with its hooks, each of which looks at all."""
    optimizer = library.AdaLOMO(nn.ParameterList(parameters), lr=_LR, loss_scale=0.0)

    def step() -> None:
        optimizer.num_steps += 1
        optimizer.grad_func(0)

    return optimizer, step


def _optimi_arms(library: Any, case: Case, device: torch.device) -> list[Arm]:
    variants = {"foreach": {"foreach": True, "triton": False}, "for loop": {"foreach": False, "triton": False}}
    if device.type == "cuda":
        variants["triton"] = {"foreach": False, "triton": True}
    kinds = {SGD: "SGD", AdamW: "AdamW", Lion: "Lion", Adan: "Adan"}
    name = kinds.get(type(case.rule))  # type: ignore[call-overload]
    if name is None:
        return []
    return _variants("optimi", getattr(library, name), {"weight_decay": case.weight_decay, **case.hyper}, variants)


def bytes_of_library(case: Case, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> float:
    """Bytes a parameter that a library's optimizer must move, by its own states after a step."""
    numbers = sum(parameter.numel() for parameter in parameters)
    own = parameters[0].element_size()
    states = sum(value.numel() * value.element_size() for state in optimizer.state.values() for value in state.values()
                 if isinstance(value, Tensor) and value.ndim)
    return own * (case.weight_reads + 1 + case.gradient_reads) + 2 * states / numbers


# --- tensors --------------------------------------------------------------------------------------

_FIFTY_MILLION = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 11, "num_attention_heads": 8,
                  "vocab_size": 32_000, "tie_word_embeddings": True}
_QUICK = {**_FIFTY_MILLION, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "vocab_size": 4000}


def shapes(model: str) -> list[tuple[int, ...]]:
    """The parameters of a Llama: `50m`, `quick`, or a name of `collie_lab.SHAPES`."""
    fields = {"50m": _FIFTY_MILLION, "quick": _QUICK, **SHAPES}[model]
    hidden, middle, heads = fields["hidden_size"], fields["intermediate_size"], fields["num_attention_heads"]
    small = hidden * fields.get("num_key_value_heads", heads) // heads
    layer = [(hidden, hidden), (small, hidden), (small, hidden), (hidden, hidden), (middle, hidden), (middle, hidden),
             (hidden, middle), (hidden,), (hidden,)]
    embedding = (fields["vocab_size"], hidden)
    head = [] if fields.get("tie_word_embeddings") else [embedding]
    return [embedding, *layer * fields["num_hidden_layers"], (hidden,), *head]


# --- is it the same rule? -------------------------------------------------------------------------

_CHECK_STEPS, _CHECK_SHAPES = 3, ((96, 64), (64, 128), (64,))


def agreement(case: Case, arm: Arm, device: torch.device) -> float:
    """The largest difference from our eager engine after a few fp32 steps, in units of the largest movement.

    Compiled rules are compiled here, so that no clock sees it.
    """
    reference = Arm(OURS, partial(_ours, case, "eager", "exact", False))
    begin, expected = _trajectory(reference, device)
    _, found = _trajectory(arm, device)
    return float((found - expected).abs().max() / (expected - begin).abs().max())


def _trajectory(arm: Arm, device: torch.device) -> tuple[Tensor, Tensor]:
    """Small weights before and after some steps of prescribed gradients."""
    random = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter((torch.randn(shape, generator=random) * 0.02).to(device)) for shape in _CHECK_SHAPES]
    begin = torch.cat([parameter.detach().flatten() for parameter in parameters])
    _, step = arm.build(parameters)
    for _ in range(_CHECK_STEPS):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=random).to(device)
        step()
    return begin, torch.cat([parameter.detach().flatten() for parameter in parameters])
