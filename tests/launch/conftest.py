from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

import psutil
import pytest
import toy


@pytest.fixture
def mark() -> Iterator[str]:
    """The mark of this test's processes; none of them outlives it."""
    value = uuid.uuid4().hex
    yield value
    left = toy.processes(value)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    assert not left, f"left behind: {left}"
