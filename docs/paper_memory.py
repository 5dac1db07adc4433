"""The memory figure of the paper, and what a plan says: `python docs/paper_memory.py` writes docs/paper_memory.png.

CoLLiE (arXiv 2312.00407) gives GB per billion parameters, as the driver shows them on eight GPUs together: 34.5 for
Adan and Sophia, 30.5 for Adam and Lion, 2.1 for LOMO and PEFT. What its set-up holds follows from its code: weights and
gradients in bf16, and one flat fp32 tensor with a master copy, a gradient and the optimizer's states, and what a step
makes of that tensor. Ours is the closed form's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

import collie_lab as lab
from collie_lab.view.style import COLORS, INK, MUTED, style

#: Of the models, billions of parameters.
MODELS: Final = {"llama-7b": 6.738, "llama-13b": 13.016, "llama-30b": 32.529, "llama-65b": 65.286}
PURE: Final[dict[str, Any]] = {"precision": "bf16", "weights": "bf16", "recompute": "full"}
#: Optimizer and adapter, ranks that share the matrices, and fp32 numbers of states of each parameter.
METHODS: Final[dict[str, tuple[dict[str, Any], int, int]]] = {
    "Adan": ({"optimizer": lab.Adan()}, 8, 4), "Sophia": ({"optimizer": lab.Sophia(hessian_every=2)}, 8, 2),
    "Adam": ({"optimizer": lab.AdamW()}, 8, 2), "Lion": ({"optimizer": lab.Lion()}, 8, 1),
    "LOMO": ({"optimizer": lab.Lomo()}, 1, 0), "LoRA": ({"optimizer": lab.AdamW(), "adapter": lab.LoRA(r=16)}, 1, 0)}
PAPER: Final = {"Adan": 34.5, "Sophia": 34.5, "Adam": 30.5, "Lion": 30.5, "LOMO": 2.1, "LoRA": 2.1}
#: Bytes of one flat fp32 tensor in a step, a parameter: itself, its gradient, the states, and what the step makes.
FLAT: Final = {"Adan": 28, "Sophia": 28, "Adam": 24, "Lion": 24}
PARTS: Final = {
    "weights, bf16": COLORS[0], "gradients, bf16": COLORS[1], "master copy, fp32": COLORS[5],
    "states, fp32": COLORS[2], "gradients, fp32": COLORS[3], "temporaries of the update": COLORS[4],
    "activations, loss, contexts, gaps": "#9CA3AF"}


def ours(model: str, method: str) -> dict[str, float]:
    """GB per billion parameters, of all ranks together, contexts included; sequences of 2,048 tokens, one a step."""
    cells, ranks, states = METHODS[method]
    ranks = min(ranks, 4) if model == "llama-30b" else ranks  # it has 52 heads
    found = lab.estimate(lab.Experiment(
        model=lab.Model(model, init="random"), data=lab.RandomTokens(length=2048), **cells,
        parallel=lab.Parallel(tp=ranks), training=lab.Training(batch_size=1, **PURE)), "H200")
    size, rows = MODELS[model], dict.fromkeys(PARTS, 0.0)
    total = ranks * (found.process_bytes or 0) / 1e9 / size
    rows["weights, bf16"] = ranks * found.components["weights"] / 1e9 / size
    rows["gradients, bf16"] = ranks * found.components["gradients"] / 1e9 / size
    optimizer = ranks * found.components["optimizer"] / 1e9 / size
    rows["states, fp32"] = min(4 * states, optimizer) if states else optimizer
    rows["master copy, fp32"] = optimizer - rows["states, fp32"]
    rows["activations, loss, contexts, gaps"] = total - sum(rows.values())
    return rows


def theirs(method: str) -> dict[str, float]:
    """The same of the paper's set-up: what is known of it, and the rest of what it measured."""
    states, rows = METHODS[method][2], dict.fromkeys(PARTS, 0.0)
    rows["weights, bf16"] = 2.0
    if method in FLAT:
        rows |= {"gradients, bf16": 2.0, "master copy, fp32": 4.0, "gradients, fp32": 4.0, "states, fp32": 4.0 * states}
        rows["temporaries of the update"] = FLAT[method] - 8.0 - 4 * states
    rows["activations, loss, contexts, gaps"] = PAPER[method] - sum(rows.values())
    return rows


def draw() -> Figure:
    """Two bars a method, stacked by what they are for."""
    with style():
        figure = Figure(figsize=(7.4, 3.7), layout="constrained")
        axes = figure.add_subplot()
        for place, method in enumerate(METHODS):
            for shift, rows in ((-0.2, theirs(method)), (0.2, ours("llama-65b", method))):
                bottom = 0.0
                for part, size in rows.items():
                    axes.bar(place + shift, size, 0.36, bottom=bottom, color=PARTS[part], linewidth=0,
                             label=part if place == 0 and shift < 0 else None)
                    bottom += size
                axes.annotate(f"{bottom:.1f}", (place + shift, bottom), xytext=(0, 2), textcoords="offset points",
                              ha="center", va="bottom", fontsize=8, color=INK)
        axes.set_xticks([place + shift for place in range(len(METHODS)) for shift in (-0.2, 0.2)],
                        ["paper", "ours"] * len(METHODS), fontsize=7)
        for place, method in enumerate(METHODS):
            axes.annotate(method, (place, 0), xytext=(0, -19), textcoords="offset points", ha="center", va="top",
                          fontsize=9, color=INK, annotation_clip=False)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("GB per billion parameters")
        axes.set_ylim(0, 38)
        axes.set_title("memory of a training step of LLaMA-65B, all GPUs together")
        axes.legend(loc="upper right", reverse=True)
        axes.set_xlabel(" \n ", color=MUTED)
    return figure


def main() -> None:
    """The picture, and the table of `docs/plans.md`."""
    draw().savefig(Path(__file__).with_name("paper_memory.png"), dpi=200)
    for method in METHODS:
        totals = [sum(ours(model, method).values()) for model in MODELS]
        print(f"| {method} | {PAPER[method]} | " + " | ".join(
            f"{each:.2f} ({each * size:,.0f} GB)" for each, size in zip(totals, MODELS.values(), strict=True)) + " |")
    for method in METHODS:
        for name, rows in (("paper", theirs(method)), ("ours", ours("llama-65b", method))):
            print(f"| {method}, {name} | " + " | ".join(f"{size:.2f}" if size else "" for size in rows.values()) + " |")


if __name__ == "__main__":
    main()
