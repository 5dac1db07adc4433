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
from collie_lab.cells.data import SKILLS, Data, Instructions, RandomTokens, Skills, Text
from collie_lab.cells.evaluation import Evaluation, ExactMatch, Perplexity
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
from collie_lab.cells.training import Training

__all__ = [
    "IA3", "OFT", "SGD", "SHAPES", "SKILLS", "AdaLoRA", "AdaLomo", "Adafactor", "AdamW", "AdamW8bit", "Adan",
    "Adapter", "AddedAdapter", "Apollo", "Cell", "CellError", "Data", "Evaluation", "ExactMatch", "Experiment",
    "Freeze", "GaLore", "Instructions", "LibraryOptimizer", "Lion", "LoRA", "Lomo", "Model", "Muon", "Nodes",
    "Optimizer", "PTuning", "Parallel", "Perplexity", "Prefix", "Problem", "Prompt", "QLoRA", "RandomTokens",
    "RuleCell", "ScheduleFree", "Skills", "Sophia", "Text", "Training", "VirtualTokens",
]
