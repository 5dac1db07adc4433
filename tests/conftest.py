"""Shared by all tests: where real input lies, and processes that start few threads."""

from __future__ import annotations

import atexit
import gc
import os
from pathlib import Path

import pytest

gc.disable()  # until all modules are there
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["COLLIE_LAB_PLANS"] = "off"  # runs are planned where a test wants it
os.environ["COLLIE_LAB_DATA_CACHE"] = "off"  # tests leave no files behind; those of the cache name a folder

SHARED = Path(os.environ.get("COLLIE_LAB_SHARED", Path(__file__).parents[1] / ".." / "shared")).resolve()


#: The files that take longest begin first: with several workers none of them is the last, alone.
_LONG = (
    "training/test_parity.py", "planning/test_plan.py", "launch/test_nodes.py", "notebooks/test_quickstart.py",
    "parallel/test_deepspeed.py", "test_diagnosis.py", "optim/test_kernels.py", "launch/test_kernels.py",
    "test_main_job.py", "launch/test_pool.py", "launch/test_recovery.py", "launch/test_terminal.py",
    "launch/test_failures.py", "training/test_adapters.py", "training/test_resume.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files, and leave the tests of a file as they stand."""
    here = Path(__file__).parent
    ranks = {str(here / name): rank for rank, name in enumerate(_LONG)}
    items.sort(key=lambda item: ranks.get(str(item.path), len(ranks)))


def pytest_collection_finish() -> None:
    """All modules are there, and are never garbage: no collection looks at them."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models; `COLLIE_LAB_SHARED` names another place."""
    if not SHARED.is_dir():
        pytest.skip(f"real input is absent: {SHARED} (set COLLIE_LAB_SHARED)")
    return SHARED


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go to `./runs`: give every test a working directory of its own."""
    monkeypatch.chdir(tmp_path)
