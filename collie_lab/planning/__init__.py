"""What an experiment will need, before it runs."""

from collie_lab.planning._client import PlanError
from collie_lab.planning.closed_form import Estimate, estimate
from collie_lab.planning.gpus import GPU, GPUS, find_gpu
from collie_lab.planning.plan import Plan, plan

__all__ = ["GPU", "GPUS", "Estimate", "Plan", "PlanError", "estimate", "find_gpu", "plan"]
