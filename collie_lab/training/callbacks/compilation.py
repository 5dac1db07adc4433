"""What a run that compiles its blocks tells: that it compiles, and that the compiler has given up."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from torch._dynamo import callback
from typing_extensions import override

from collie_lab.cells import Callback

__all__ = ["Compilation"]


class Compilation(Callback):
    """A phase for every step that waits for the compiler, with signs of life; and a warning where torch compiles no
    more: it would go on without a word, as slowly as without compilation."""

    def __init__(self) -> None:
        self._trainer: Any = None
        self._told = -1  # the step whose phase has been told
        self._limit = _Limit(self._give_up)

    @override
    def on_start(self, trainer: Any) -> None:
        self._trainer = trainer
        callback.on_compile_start(self._begin)
        self._limit.logger.addHandler(self._limit)

    @override
    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self._close()

    @override
    def on_end(self, trainer: Any, result: Mapping[str, Any]) -> None:
        self._close()

    def _close(self) -> None:
        if self._trainer is not None:
            self._trainer = None
            self._limit.logger.removeHandler(self._limit)
            if self._begin in callback.callback_handler.start_callbacks:  # torch.compiler.reset() forgets them
                callback.callback_handler.remove_start_callback(self._begin)

    def _begin(self, *_: Any) -> None:
        """Before a piece of a block is compiled: several in a step, seconds each."""
        self._trainer._beat.say("step")
        if self._trainer.step > self._told:
            self._told = self._trainer.step
            self._trainer.event("phase", text="compiling the model")

    def _give_up(self, reason: str) -> None:
        text = (f"Training.compile: from step {self._trainer.step} on a part of the model runs uncompiled, as torch "
                "has compiled it as often as it would for one run; Training(compile=False) spends no time on it "
                f"({reason})")
        if self._trainer.rank == 0:
            self._trainer.event("warning", text=text)
        else:  # it has other documents, or other layers; its log tells
            print(text, file=sys.stderr, flush=True)


class _Limit(logging.Handler):
    """Hears of the limit from torch's log, the only place that tells of it without making it an error."""

    logger = logging.getLogger("torch._dynamo.convert_frame")

    def __init__(self, tell: Any):
        super().__init__(logging.WARNING)
        self._tell = tell

    @override
    def emit(self, record: logging.LogRecord) -> None:
        if "hit config." in record.msg:
            self._tell(" ".join(record.getMessage().split("last reason:")[-1].split("\n")[0].split())[:200])
