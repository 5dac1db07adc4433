"""What ranks of tests share: imported once, by the process that all of them are forked from (`tests/ranks.py`)."""

from __future__ import annotations

import atexit
import gc

gc.disable()

import peft  # noqa: E402, F401
import pytest  # noqa: E402, F401
import torch.distributed.fsdp  # noqa: E402
import torch.distributed.pipelining  # noqa: E402, F401
from transformers.models.llama import modeling_llama  # noqa: E402, F401

import collie_lab.launch  # noqa: E402
import collie_lab.training.trainer  # noqa: E402, F401

gc.freeze()  # no rank's collections look at half a million objects of modules, for half a second each time
gc.enable()
atexit.register(gc.unfreeze)
