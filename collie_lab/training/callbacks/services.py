"""TensorBoard, Weights & Biases and MLflow; each is imported in its sink's thread, when a run asks for it.

Figures of steps are named `train/loss`, those of evaluations `eval/perplexity`; a name with a `/` stays as it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from collie_lab import cells
from collie_lab.folder import finite
from collie_lab.training.callbacks.sinks import Kind, Opening, Sink, flat

__all__ = ["MLflowSink", "TensorBoardSink", "WandBSink"]


def _named(kind: Kind, figures: Mapping[str, float]) -> dict[str, float]:
    return {name if "/" in name else f"{kind}/{name}": value for name, value in figures.items()}


class TensorBoardSink(Sink):
    """Event files. What a run tells again from `step` on hides what was told of these steps before (`purge_step`)."""

    name = "TensorBoard"

    def __init__(self, cell: cells.TensorBoard):
        super().__init__()
        self._folder = cell.folder
        self._writer: Any = None

    @override
    def open(self, opening: Opening) -> None:
        import yaml
        from torch.utils.tensorboard import SummaryWriter

        folder = opening.place(self._folder, opening.folder.path / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=opening.step + 1 if any(folder.glob("events.*")) else None)
        text = yaml.safe_dump(opening.config, sort_keys=False, allow_unicode=True)
        self._writer.add_text("experiment", f"```yaml\n{text}```", opening.step)

    @override
    def write(self, kind: Kind, step: int, moment: float, figures: Mapping[str, float]) -> None:
        for name, value in _named(kind, figures).items():
            self._writer.add_scalar(name, value, step, walltime=moment)

    @override
    def close(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            text = json.dumps(finite(dict(result)), indent=1, ensure_ascii=False)
            self._writer.add_text("result", f"```json\n{text}\n```", result["steps"])
        self._writer.close()


class WandBSink(Sink):
    """A run of W&B with the run's own name as its id. Of steps that it has already it takes no second figures."""

    name = "W&B"

    def __init__(self, cell: cells.WandB):
        super().__init__()
        self._cell = cell
        self._session: Any = None

    @override
    def open(self, opening: Opening) -> None:
        import wandb

        self._session = wandb.init(
            project=self._cell.project, mode=self._cell.mode, id=opening.run, name=opening.run, resume="allow",
            config=opening.config, dir=str(opening.folder.path),
            settings=wandb.Settings(console="off"))  # logs are the run folder's

    @override
    def write(self, kind: Kind, step: int, moment: float, figures: Mapping[str, float]) -> None:
        self._session.log(_named(kind, figures), step=step)

    @override
    def close(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            self._session.summary.update({f"result/{name}": value for name, value in result.items()})
        self._session.finish(exit_code=0 if result is not None and result["status"] != "diverged" else 1)


class MLflowSink(Sink):
    """A run of MLflow, found again by a tag. Figures that it has already are left out."""

    name = "MLflow"
    _tag = "collie_lab.run"
    _most = 100  # parameters, or figures, of one call

    def __init__(self, cell: cells.MLflow):
        super().__init__()
        self._cell = cell
        self._client: Any = None
        self._id = ""
        self._done: dict[str, int] | None = None  # where the run goes on: the last step of every figure

    @override
    def open(self, opening: Opening) -> None:
        import mlflow
        from mlflow.entities import Param

        self._client = client = mlflow.MlflowClient(self._cell.uri)
        experiment = client.get_experiment_by_name(self._cell.experiment)
        number = experiment.experiment_id if experiment else client.create_experiment(self._cell.experiment)
        found = client.search_runs([number], f"tags.`{self._tag}` = '{opening.run}'", max_results=1)
        if found:
            self._id, self._done = found[0].info.run_id, {}
            client.update_run(self._id, "RUNNING")
            return
        self._id = client.create_run(number, run_name=opening.run, tags={self._tag: opening.run}).info.run_id
        params = [Param(name, str(value)) for name, value in flat(opening.config) if value is not None]
        for begin in range(0, len(params), self._most):
            client.log_batch(self._id, params=params[begin:begin + self._most])

    @override
    def write(self, kind: Kind, step: int, moment: float, figures: Mapping[str, float]) -> None:
        self._log(_named(kind, figures), step, moment)

    def _log(self, figures: Mapping[str, float], step: int, moment: float) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, int(moment * 1000), step) for name, value in figures.items()
                   if self._is_new(name, step)]
        for begin in range(0, len(metrics), self._most):
            self._client.log_batch(self._id, metrics=metrics[begin:begin + self._most])

    def _is_new(self, name: str, step: int) -> bool:
        if self._done is None:
            return True
        if name not in self._done:
            history = self._client.get_metric_history(self._id, name)
            self._done[name] = max((metric.step for metric in history), default=-1)
        return step > self._done[name]

    @override
    def close(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            numbers = {f"result/{name}": float(value) for name, value in result.items()
                       if isinstance(value, (int, float))}
            self._log(numbers, result["steps"], time.time())
            for name in ("status", "detail"):
                if name in result:
                    self._client.set_tag(self._id, f"collie_lab.{name}", result[name])
        ends = {"ok": "FINISHED", "stopped": "KILLED"}
        self._client.set_terminated(self._id, ends.get(result["status"], "FAILED") if result else "FAILED")
