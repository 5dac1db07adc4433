"""From runs to tables and figures."""

from collie_lab.study.results import Results

__all__ = ["Results"]
