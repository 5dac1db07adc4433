"""collie_lab: a Jupyter-first workbench for experiments in training large language models."""

from collie_lab._version import __version__
from collie_lab.cells import *  # noqa: F403
from collie_lab.cells import __all__ as _cells

__all__ = ["__version__", *_cells]
