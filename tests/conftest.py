"""Shared by all tests: where real input lies, and processes that start few threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["COLLIE_LAB_PLANS"] = "off"  # runs are planned where a test wants it
os.environ["COLLIE_LAB_DATA_CACHE"] = "off"  # tests leave no files behind; those of the cache name a folder

SHARED = Path(os.environ.get("COLLIE_LAB_SHARED", Path(__file__).parents[1] / ".." / "shared")).resolve()


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
