"""Where a run happened and with what: enough to repeat it."""

from __future__ import annotations

from typing import Any

import torch

from collie_lab.provenance import provenance as provenance_without_torch

__all__ = ["provenance"]


def provenance(seed: int) -> dict[str, Any]:
    """What is known without torch, and the seed, threads and GPU of a run."""
    gpu = torch.cuda.is_available()
    return {
        **provenance_without_torch(), "seed": seed, "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None, "cuda": torch.version.cuda if gpu else None,
    }
