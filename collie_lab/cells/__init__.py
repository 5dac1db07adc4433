"""What you compose: typed, immutable choices. Nothing here imports torch."""

from collie_lab.cells._base import Cell, CellError, Problem
from collie_lab.cells.adapter import (
    IA3,
    OFT,
    AdaLoRA,
    Adapter,
    AddedAdapter,
    Freeze,
    LoRA,
    Prefix,
    Prompt,
    PTuning,
    QLoRA,
    VirtualTokens,
)
from collie_lab.cells.benchmarks import BBH, GSM8K, MMLU, Benchmark, HumanEval, LMEval
from collie_lab.cells.callback import (
    CSV,
    BestCheckpoint,
    Callback,
    CallbackCell,
    EarlyStopping,
    GradientStatistics,
    MLflow,
    Monitor,
    Profile,
    Statistics,
    SystemMeters,
    TensorBoard,
    WandB,
    WeightStatistics,
)
from collie_lab.cells.data import SKILLS, Data, Instructions, RandomTokens, Skills, Text
from collie_lab.cells.evaluation import (
    Classification,
    Evaluation,
    ExactMatch,
    Generation,
    HeldOut,
    MultipleChoice,
    Perplexity,
)
from collie_lab.cells.experiment import Experiment
from collie_lab.cells.library_optimizer import (
    Adafactor,
    AdamW8bit,
    Apollo,
    GaLore,
    LibraryOptimizer,
    Muon,
    ScheduleFree,
)
from collie_lab.cells.model import SHAPES, Model
from collie_lab.cells.nodes import Nodes
from collie_lab.cells.optimizer import SGD, AdaLomo, AdamW, Adan, Lion, Lomo, Optimizer, RuleCell, Sophia
from collie_lab.cells.parallel import Parallel
from collie_lab.cells.tokenizer import ExtendTokenizer, NewTokenizer, TrainTokenizer
from collie_lab.cells.training import Training

__all__ = [
    "BBH", "CSV", "GSM8K", "IA3", "MMLU", "OFT", "SGD", "SHAPES", "SKILLS", "AdaLoRA", "AdaLomo", "Adafactor", "AdamW",
    "AdamW8bit", "Adan", "Adapter", "AddedAdapter", "Apollo", "Benchmark", "BestCheckpoint", "Callback", "CallbackCell",
    "Cell", "CellError", "Classification", "Data", "EarlyStopping", "Evaluation", "ExactMatch", "Experiment",
    "ExtendTokenizer", "Freeze", "GaLore", "Generation", "GradientStatistics", "HeldOut", "HumanEval", "Instructions",
    "LMEval", "LibraryOptimizer", "Lion", "LoRA", "Lomo", "MLflow", "Model", "Monitor", "MultipleChoice", "Muon",
    "NewTokenizer", "Nodes", "Optimizer", "PTuning", "Parallel", "Perplexity", "Prefix", "Problem", "Profile", "Prompt",
    "QLoRA", "RandomTokens", "RuleCell", "ScheduleFree", "Skills", "Sophia", "Statistics", "SystemMeters",
    "TensorBoard", "Text", "TrainTokenizer", "Training", "VirtualTokens", "WandB", "WeightStatistics",
]
