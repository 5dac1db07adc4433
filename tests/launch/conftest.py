from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.processes import marked


@pytest.fixture
def mark() -> Iterator[str]:
    """The mark of this test's processes; none of them outlives it."""
    with marked() as mark:
        yield mark
