"""Layouts over ranks, one Strategy each."""

from collie_lab.parallel.strategy import Replicated, Sharded, Single, Strategy, build_strategy

__all__ = ["Replicated", "Sharded", "Single", "Strategy", "build_strategy"]
