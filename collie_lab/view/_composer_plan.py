"""The composer's way to a plan: a GPU, and what the experiment as it stands will need on it; or what would fit."""

from __future__ import annotations

import asyncio
import functools
import html
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ipywidgets

from collie_lab.cells import CellError, Experiment
from collie_lab.view._entries import Widgets, notes

__all__ = ["PlanBar"]


class PlanBar:
    """A row of controls, and below it the answer. Dry runs take seconds: they are made by `threads`.

    Attributes:
        gpu: which; empty for a CPU.
        plan, fit: the buttons.
        answer: HTML.
        widget: all of it.
    """

    def __init__(self, make: Widgets, experiment: Callable[[], Experiment], threads: ThreadPoolExecutor):
        from collie_lab.planning import GPUS

        self._experiment, self._threads = experiment, threads
        self._task: asyncio.Task[None] | None = None
        self.gpu = make.make(ipywidgets.Dropdown, "", description="GPU", options=[("CPU", ""), *((n, n) for n in GPUS)],
                             tooltip="of which a plan is made")
        self.plan = make.make(ipywidgets.Button, "", description="Plan",
                              tooltip="memory, speed and whether it fits, by a dry run")
        self.fit = make.make(ipywidgets.Button, "", description="What fits",
                             tooltip="layouts and micro-batches for this method on as many GPUs as the layout has")
        self.answer = make.make(ipywidgets.HTML, "collie-answer")
        self.plan.on_click(lambda _: self._ask(self._planned))
        self.fit.on_click(lambda _: self._ask(self._fitting))
        self.widget = make.make(ipywidgets.VBox, "collie-plan", children=(
            make.make(ipywidgets.HBox, "collie-plan-row", children=(self.gpu, self.plan, self.fit)), self.answer))

    def close(self) -> None:
        """Wait for no answer any more."""
        if self._task is not None:
            self._task.cancel()

    def _ask(self, question: Callable[[Experiment, str], Any]) -> None:
        """Show the answer when it comes; without an event loop at once. A new question takes the place of the old."""
        try:
            experiment = self._experiment()
        except CellError as error:
            self.answer.value = notes(error.problems, lambda problem: f"{problem.cell}.{problem.field}".rstrip("."))
            return
        work = functools.partial(_answered, question, experiment, self.gpu.value)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.answer.value = work()
            return
        self.close()
        self.answer.value = '<span class="checking">a dry run …</span>'
        self._task = loop.create_task(self._wait(loop, work))

    async def _wait(self, loop: asyncio.AbstractEventLoop, work: Callable[[], str]) -> None:
        self.answer.value = await loop.run_in_executor(self._threads, work)

    @staticmethod
    def _planned(experiment: Experiment, gpu: str) -> Any:
        return experiment.plan(gpu or None)

    @staticmethod
    def _fitting(experiment: Experiment, gpu: str) -> Any:
        from collie_lab.planning import fit

        return fit(experiment, experiment.parallel.world_size, gpu or "H100", confirm=1, progress=False)


def _answered(question: Callable[[Experiment, str], Any], experiment: Experiment, gpu: str) -> str:
    """The answer as HTML, or why there is none."""
    try:
        return str(question(experiment, gpu)._repr_html_())
    except CellError as error:
        return notes(error.problems, lambda problem: f"{problem.cell}.{problem.field}".rstrip("."))
    except Exception as error:  # a dry run that fails must not end the form
        return f'<div class="error">{html.escape(str(error))}</div>'
