"""Reusable conformance suites: what every implementation of an interface must satisfy. Needs no test framework."""

from collie_lab.testing.optimizers import check_engine, check_rule
from collie_lab.testing.shards import check_fsdp, check_mesh, check_tensor_parallel

__all__ = ["check_engine", "check_fsdp", "check_mesh", "check_rule", "check_tensor_parallel"]
