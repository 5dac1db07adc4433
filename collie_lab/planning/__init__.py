"""What an experiment will need, before it runs."""

from collie_lab.gpus import GPU, GPUS, find_gpu
from collie_lab.planning._client import PlanError
from collie_lab.planning.calibration import calibrate
from collie_lab.planning.closed_form import Estimate, estimate
from collie_lab.planning.fitting import METHODS, Fit, fit
from collie_lab.planning.plan import Plan, plan
from collie_lab.planning.rates import Rates
from collie_lab.planning.residual_table import Residuals, residuals
from collie_lab.planning.speed import Speed

__all__ = [
    "GPU", "GPUS", "METHODS", "Estimate", "Fit", "Plan", "PlanError", "Rates", "Residuals", "Speed", "calibrate",
    "estimate", "find_gpu", "fit", "plan", "residuals",
]
