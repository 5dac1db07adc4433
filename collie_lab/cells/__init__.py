"""What you compose: typed, immutable choices. Nothing here imports torch."""

from collie_lab.cells._base import Cell, CellError, Problem
from collie_lab.cells.adapter import Adapter, LoRA
from collie_lab.cells.data import SKILLS, Data, Instructions, RandomTokens, Skills, Text
from collie_lab.cells.evaluation import Evaluation, ExactMatch, Perplexity
from collie_lab.cells.experiment import Experiment
from collie_lab.cells.model import SHAPES, Model
from collie_lab.cells.optimizer import SGD, AdamW, Lomo, Optimizer
from collie_lab.cells.parallel import Parallel
from collie_lab.cells.training import Training

__all__ = [
    "SGD", "SHAPES", "SKILLS", "Adapter", "AdamW", "Cell", "CellError", "Data", "Evaluation",
    "ExactMatch", "Experiment", "Instructions", "LoRA", "Lomo", "Model", "Optimizer", "Parallel",
    "Perplexity", "Problem", "RandomTokens", "Skills", "Text", "Training",
]
