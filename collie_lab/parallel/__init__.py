"""Layouts over ranks: what each rank holds, and what it tells the others. One `Strategy` face for the loop."""

from collie_lab.parallel.strategy import Strategy, TorchStrategy, build_strategy
from collie_lab.parallel.tensor import TensorParallel

__all__ = ["Strategy", "TensorParallel", "TorchStrategy", "build_strategy"]
