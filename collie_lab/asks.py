"""Questions to a model in training. They are files of the run folder: there is no port that others could reach.

    asks/000001.json    {"prompt": "...", "max_new_tokens": 128, "temperature": 0.0}
    asks/000001.jsonl   {"text": "..."} for every piece of the answer, then {"end": true, "step": 12, "tokens": 30,
                        "error": "why there is no answer, or empty"}
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from collie_lab.folder import RunFolder, read_json

__all__ = ["Answer", "Asks"]


class Answer(str):
    """What the model said, and after which `step`. A notebook does not show it again: it has come piece by piece."""

    step: int

    @classmethod
    def of(cls, text: str, step: int) -> Self:
        """An answer."""
        answer = cls(text)
        answer.step = step
        return answer

    def _ipython_display_(self) -> None:
        """Show nothing."""


class Asks:
    """The questions of a run, numbered from 1."""

    def __init__(self, folder: RunFolder):
        self._place = folder.path / "asks"

    def put(self, question: Mapping[str, Any]) -> int:
        """Ask; the number of the question. Several processes may ask at once."""
        self._place.mkdir(exist_ok=True)
        handle, whole = tempfile.mkstemp(dir=self._place, prefix=".")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(dict(question), file)
        try:
            for number in itertools.count(1):
                with contextlib.suppress(FileExistsError):
                    os.link(whole, self._question(number))
                    return number
        finally:
            os.unlink(whole)
        raise AssertionError

    def waits(self, number: int) -> bool:
        """Whether there is a question of this number."""
        return self._question(number).exists()

    def question(self, number: int) -> dict[str, Any]:
        """A question."""
        return read_json(self._question(number))

    def answer(self, number: int) -> Path:
        """The JSONL file of an answer."""
        return self._place / f"{number:06d}.jsonl"

    def _question(self, number: int) -> Path:
        return self._place / f"{number:06d}.json"
