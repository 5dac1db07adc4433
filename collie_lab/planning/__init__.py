"""What an experiment will need, before it runs."""

from collie_lab.planning._client import PlanError
from collie_lab.planning.gpus import GPU, GPUS, find_gpu
from collie_lab.planning.plan import Plan, plan
from collie_lab.planning.residual_table import Residuals, residuals

__all__ = ["GPU", "GPUS", "Plan", "PlanError", "Residuals", "find_gpu", "plan", "residuals"]
