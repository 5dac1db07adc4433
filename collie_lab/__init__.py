"""collie_lab: a Jupyter-first workbench for experiments in training large language models.

Importing it is quick and does not import torch: what runs, draws or tabulates is loaded when it is first used.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

from collie_lab._version import __version__
from collie_lab.cells import (
    BBH,
    CSV,
    GSM8K,
    IA3,
    MMLU,
    OFT,
    SGD,
    SHAPES,
    SKILLS,
    Adafactor,
    AdaLomo,
    AdaLoRA,
    AdamW,
    AdamW8bit,
    Adan,
    Adapter,
    Apollo,
    BestCheckpoint,
    Callback,
    Cell,
    CellError,
    Classification,
    Data,
    EarlyStopping,
    Evaluation,
    ExactMatch,
    Experiment,
    ExtendTokenizer,
    Freeze,
    GaLore,
    Generation,
    GradientStatistics,
    HumanEval,
    Instructions,
    Lion,
    LMEval,
    Lomo,
    LoRA,
    MLflow,
    Model,
    MultipleChoice,
    Muon,
    Nodes,
    Optimizer,
    Parallel,
    Perplexity,
    Prefix,
    Problem,
    Profile,
    Prompt,
    PTuning,
    QLoRA,
    RandomTokens,
    ScheduleFree,
    Skills,
    Sophia,
    SystemMeters,
    TensorBoard,
    Text,
    Training,
    TrainTokenizer,
    WandB,
    WeightStatistics,
)

if TYPE_CHECKING:
    from collie_lab import optim
    from collie_lab.diagnosis import doctor
    from collie_lab.launch import Pool, RankError, Run, attach, pull, runs
    from collie_lab.planning import GPU, GPUS, Estimate, Plan, PlanError, calibrate, estimate, fit, residuals
    from collie_lab.study import Ray, Results, Slurm, Study
    from collie_lab.training.merge import merge
    from collie_lab.view import compare, compose, figure, watch

_LAZY = {
    "Estimate": "planning", "GPU": "planning", "GPUS": "planning", "Plan": "planning", "PlanError": "planning",
    "Pool": "launch", "RankError": "launch", "Ray": "study", "Results": "study", "Run": "launch", "Slurm": "study",
    "Study": "study", "attach": "launch", "calibrate": "planning", "compare": "view", "compose": "view",
    "doctor": "diagnosis", "estimate": "planning", "figure": "view", "fit": "planning", "merge": "training.merge",
    "pull": "launch", "residuals": "planning", "runs": "launch", "watch": "view",
}

__all__ = [
    "AdaLoRA", "AdaLomo", "Adafactor", "AdamW", "AdamW8bit", "Adan", "Adapter", "Apollo", "BBH", "BestCheckpoint",
    "CSV", "Callback", "Cell", "CellError", "Classification", "Data", "EarlyStopping", "Estimate", "Evaluation",
    "ExactMatch", "Experiment", "ExtendTokenizer", "Freeze", "GPU", "GPUS", "GSM8K", "GaLore", "Generation",
    "GradientStatistics", "HumanEval", "IA3", "Instructions", "LMEval", "Lion", "LoRA", "Lomo", "MLflow", "MMLU",
    "Model", "MultipleChoice", "Muon", "Nodes", "OFT", "Optimizer", "PTuning", "Parallel", "Perplexity", "Plan",
    "PlanError", "Pool", "Prefix", "Problem", "Profile", "Prompt", "QLoRA", "RandomTokens", "RankError", "Ray",
    "Results", "Run", "SGD", "SHAPES", "SKILLS", "ScheduleFree", "Skills", "Slurm", "Sophia", "Study", "SystemMeters",
    "TensorBoard", "Text", "TrainTokenizer", "Training", "WandB", "WeightStatistics", "__version__", "attach",
    "calibrate", "compare", "compose", "doctor", "estimate", "figure", "fit", "merge", "optim", "pull", "residuals",
    "runs", "watch",
]


def __getattr__(name: str) -> Any:
    if name == "optim":
        return importlib.import_module("collie_lab.optim")
    if name in _LAZY:
        return getattr(importlib.import_module(f"collie_lab.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'collie_lab' has no attribute {name!r}{_meant(name)}")


def _meant(name: str) -> str:
    """What is called almost so, LOMO and `LoRa` too."""
    known = {each.casefold(): each for each in __all__}
    close = [] if name.startswith("_") else difflib.get_close_matches(name.casefold(), known, n=1)
    return f"; did you mean `{known[close[0]]}`?" if close else ""


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext collie_lab`: the magic `%%ranks`."""
    importlib.import_module("collie_lab.launch.magic").register(shell)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
