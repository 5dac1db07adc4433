"""A study in a process of its own, to be killed: `python -m tests.study.runner_process RESULTS ARMS`; fake arms."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import collie_lab as lab
from tests.study.grids import fake_command, toy_grid


def main() -> None:
    with mock.patch("collie_lab.study.executor.command", fake_command):
        study = lab.Study(toy_grid(range(int(sys.argv[2]))), results=Path(sys.argv[1]))
        study.run(slots=2, progress=False)


if __name__ == "__main__":
    main()
