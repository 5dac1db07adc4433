"""Starts experiments beside the kernel and holds on to them: kernel → supervisor → torchrun → ranks."""

from collie_lab.launch._start import launch
from collie_lab.launch.errors import RankError
from collie_lab.launch.pool import Pool, pull
from collie_lab.launch.run import Run, attach, runs

__all__ = ["Pool", "RankError", "Run", "attach", "launch", "pull", "runs"]
