"""Tasks of lm-evaluation-harness, looked up and loaded before a run starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from collie_lab.cells import CellError, LMEval, Problem

__all__ = ["check_tasks", "load_tasks", "task_manager"]


def check_tasks(cell: LMEval) -> None:
    """Load the tasks and their data once; ranks then find them in the cache of `datasets`.

    Raises:
        CellError: lm-eval is not installed, has no such task, cannot load it, or would run what the model writes.
    """
    try:
        manager = task_manager(cell)
    except ImportError as error:
        raise _error("", f"lm-eval does not import: {error}", "pip install collie-lab[eval]") from None
    known = set(manager.all_tasks)
    if unknown := [name for name in cell.tasks if name not in known]:
        raise _error("tasks", f"lm-eval knows no task {unknown[0]!r}",
                     "`lm-eval ls tasks` lists them; include_path names a folder of others")
    try:
        loaded = load_tasks(cell.tasks, manager, cell.shots)
    except Exception as error:  # data sets raise many types, from broken files to closed networks
        raise _error("tasks", f"{', '.join(cell.tasks)} does not load: {error!r:.300}") from error
    if unsafe := [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]:
        raise _error("tasks", f"{unsafe[0]} runs what the model has written, outside of any sandbox",
                     "use the cell HumanEval")


def load_tasks(tasks: Sequence[str | dict[str, Any]], manager: Any, shots: int | None = None) -> dict[str, Any]:
    """lm-eval's `tasks` and `groups` by the names or definitions of some of them, ready to be evaluated.

    The tasks are in the order of their names, the same on all ranks. Examples are drawn with lm-eval's own default
    seed. Its function `simple_evaluate` does no more, but lists the installed packages each time, in a process.
    """
    loaded: dict[str, Any] = manager.load(list(tasks))
    loaded["tasks"] = dict(sorted(loaded["tasks"].items()))
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=own if own == 0 or shots is None else shots)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    return loaded


def task_manager(cell: LMEval) -> Any:
    """lm-eval's index of tasks: of the cell's own folder, where that has all it names. To read all that lm-eval ships,
    14,000 files, takes many seconds."""
    from lm_eval.tasks import TaskManager

    if cell.include_path is not None:
        own = TaskManager(include_path=cell.include_path, include_defaults=False)
        if set(cell.tasks) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=cell.include_path)


def _error(field: str, message: str, remedy: str = "") -> CellError:
    return CellError([Problem("LMEval", field, message, remedy)])
