"""All update rules in float64 numpy, written from their formulas alone; nothing here imports the package.

θ weight, g gradient, η learning rate, λ weight decay, t step from 1. One call is one step of
one parameter, `state` its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
State = dict[str, Any]
Step = Callable[[Array, Array, State, int, float, dict[str, Any]], Array]


def _ema(state: State, name: str, value: Array, keep: float) -> Array:
    state[name] = keep * state.get(name, np.zeros_like(value)) + (1.0 - keep) * value
    return state[name]


def sgd(theta: Array, g: Array, state: State, t: int, lr: float, h: dict[str, Any]) -> Array:
    return theta - lr * (g + h["weight_decay"] * theta)


def momentum(theta: Array, g: Array, state: State, t: int, lr: float, h: dict[str, Any]) -> Array:
    state["b"] = h["momentum"] * state.get("b", 0.0) + g
    return theta - lr * h["weight_decay"] * theta - lr * state["b"]


def nesterov(theta: Array, g: Array, state: State, t: int, lr: float, h: dict[str, Any]) -> Array:
    state["b"] = h["momentum"] * state.get("b", 0.0) + g
    return theta - lr * h["weight_decay"] * theta - lr * (g + h["momentum"] * state["b"])


def adamw(theta: Array, g: Array, state: State, t: int, lr: float, h: dict[str, Any]) -> Array:
    b1, b2 = h["betas"]
    m_hat = _ema(state, "m", g, b1) / (1.0 - b1**t)
    v_hat = _ema(state, "v", np.square(g), b2) / (1.0 - b2**t)
    return theta - lr * (m_hat / (np.sqrt(v_hat) + h["eps"]) + h["weight_decay"] * theta)


def lion(theta: Array, g: Array, state: State, t: int, lr: float, h: dict[str, Any]) -> Array:
    b1, b2 = h["betas"]
    direction = np.sign(b1 * state.get("m", np.zeros_like(g)) + (1.0 - b1) * g)
    _ema(state, "m", g, b2)
    return theta - lr * (direction + h["weight_decay"] * theta)


def _adan_step(g: Array, state: State, t: int, lr: float, h: dict[str, Any]) -> Array:
    b1, b2, b3 = h["betas"]
    difference = g - state.get("last", g)  # none in the first step
    state["last"] = g.copy()
    m = _ema(state, "m", g, b1) / (1.0 - b1**t)
    v = _ema(state, "v", difference, b2) / (1.0 - b2**t)
    n = _ema(state, "n", np.square(g + b2 * difference), b3) / (1.0 - b3**t)
    return lr * (m + b2 * v) / (np.sqrt(n) + h["eps"])


def adan(theta: Array, g: Array, state: State, t: int, lr: float, h: dict[str, Any]) -> Array:
    return (theta - _adan_step(g, state, t, lr, h)) / (1.0 + lr * h["weight_decay"])


def adan_not_proximal(theta: Array, g: Array, state: State, t: int, lr: float, h: dict[str, Any]) -> Array:
    return theta * (1.0 - lr * h["weight_decay"]) - _adan_step(g, state, t, lr, h)


def sophia(theta: Array, g: Array, state: State, t: int, lr: float, h: dict[str, Any]) -> Array:
    """As the official code has it: the squared gradient in h, the tokens of a batch in the update."""
    m = _ema(state, "m", g, h["betas"][0])
    hessian = state.get("h", np.zeros_like(g))
    ratio = np.minimum(np.abs(m) / (h["rho"] * state.get("tokens", 1) * hessian + 1e-15), 1.0)
    return theta * (1.0 - lr * h["weight_decay"]) - lr * np.sign(m) * ratio


def sophia_refresh(g: Array, state: State, tokens: int, h: dict[str, Any]) -> None:
    """The gradient of sampled labels."""
    state["tokens"] = tokens
    _ema(state, "h", np.square(g), h["betas"][1])


def adalomo(theta: Array, g: Array, state: State, t: int, lr: float, h: dict[str, Any]) -> Array:
    keep = 1.0 - t ** (-0.8)
    q = np.square(g) + 1e-30
    if theta.ndim < 2:
        second = _ema(state, "v", q, keep)
    else:
        r = _ema(state, "r", q.mean(axis=-1), keep)
        c = _ema(state, "c", q.mean(axis=-2), keep)
        outer = np.einsum("...i,...j->...ij", r, c)
        second = outer / r.mean(axis=-1)[..., None, None]
    u = g / np.sqrt(second)
    u = u / max(1.0, float(np.sqrt(np.mean(np.square(u)))))
    alpha = lr * max(1e-3, float(np.sqrt(np.mean(np.square(theta)))))
    return theta - alpha * h["weight_decay"] * theta - alpha * u


STEPS: dict[str, Step] = {
    "sgd": sgd, "momentum": momentum, "nesterov": nesterov, "adamw": adamw, "lion": lion, "adan": adan,
    "adan_not_proximal": adan_not_proximal, "sophia": sophia, "adalomo": adalomo,
}
