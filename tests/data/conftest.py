"""What several tests of data watch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from collie_lab.data.prepare import _Maker

Watch = Callable[[str], list[str]]


@pytest.fixture
def splits_of(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """From a method of what makes documents to the splits that it is called for from now on."""
    def watch(method: str) -> list[str]:
        splits: list[str] = []
        original = getattr(_Maker, method)

        def note(self: Any, cell: Any, split: Any) -> Any:
            splits.append(split)
            return original(self, cell, split)

        monkeypatch.setattr(_Maker, method, note)
        return splits

    return watch
