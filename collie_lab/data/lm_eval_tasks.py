"""Tasks of lm-evaluation-harness, looked up and loaded before a run starts."""

from __future__ import annotations

from typing import Any

from collie_lab.cells import CellError, LMEval, Problem

__all__ = ["check_tasks", "task_manager"]


def check_tasks(cell: LMEval) -> None:
    """Load the tasks and their data once; ranks then find them in the cache of `datasets`.

    Raises:
        CellError: lm-eval is not installed, has no such task, cannot load it, or would run what the model writes.
    """
    try:
        from lm_eval.tasks import get_task_dict
    except ImportError as error:
        raise _error("", f"lm-eval does not import: {error}", "pip install collie-lab[eval]") from None
    manager = task_manager(cell)
    known = set(manager.all_tasks)
    if unknown := [name for name in cell.tasks if name not in known]:
        raise _error("tasks", f"lm-eval knows no task {unknown[0]!r}",
                     "`lm-eval ls tasks` lists them; include_path names a folder of others")
    try:
        loaded = get_task_dict(list(cell.tasks), manager)
    except Exception as error:  # data sets raise many types, from broken files to closed networks
        raise _error("tasks", f"{', '.join(cell.tasks)} does not load: {error!r:.300}") from error
    if unsafe := [name for name, task in _flattened(loaded) if getattr(task, "UNSAFE_CODE", False)]:
        raise _error("tasks", f"{unsafe[0]} runs what the model has written, outside of any sandbox",
                     "use the cell HumanEval")


def task_manager(cell: LMEval) -> Any:
    """lm-eval's index of tasks: of the cell's own folder, where that has all it names. To read all that lm-eval ships,
    14,000 files, takes many seconds."""
    from lm_eval.tasks import TaskManager

    if cell.include_path is not None:
        own = TaskManager(include_path=cell.include_path, include_defaults=False)
        if set(cell.tasks) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=cell.include_path)


def _flattened(loaded: dict[object, object]) -> list[tuple[object, object]]:
    """The tasks of groups within groups."""
    return [pair for name, task in loaded.items()
            for pair in (_flattened(task) if isinstance(task, dict) else [(name, task)])]


def _error(field: str, message: str, remedy: str = "") -> CellError:
    return CellError([Problem("LMEval", field, message, remedy)])
