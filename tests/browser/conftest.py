"""One server and one browser for the tests of this folder; nothing of them is left behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.browser.lab import Lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """JupyterLab in Chromium; the tests are skipped where one of them is absent."""
    for module in ("jupyterlab", "playwright"):
        pytest.importorskip(module, reason=f"{module} is absent: pip install -e '.[browser]'")
    if shutil.which("chromium") is None:
        pytest.skip("there is no `chromium`: apt-get install chromium")
    from tests.browser.lab import jupyterlab

    with jupyterlab() as started:
        yield started
