"""Callbacks: the protocol that a notebook's own follow, and the cells of those that are built in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, field_validator

from collie_lab.cells._base import PATH_TEXT, Cell
from collie_lab.cells.evaluation import Evaluation

__all__ = [
    "CSV", "BestCheckpoint", "Callback", "CallbackCell", "EarlyStopping", "GradientStatistics", "MLflow", "Monitor",
    "Profile", "Statistics", "SystemMeters", "TensorBoard", "WandB", "WeightStatistics",
]

_Mode = Literal["min", "max"]
_MONITOR: Final = "perplexity"


class Callback:
    """What a run calls on every rank while it trains. All hooks do nothing by default; a subclass has those it wants.

    `trainer` is the rank's `Trainer`: its `step`, `model`, `optimizer`, `rank`, `folder` and `experiment` may be looked
    at, and `log`, `event`, `stop`, `finish` and `save_checkpoint` called. What is raised ends the run as an error.
    """

    def on_start(self, trainer: Any) -> None:
        """Everything is there, a checkpoint is loaded; the first step comes next."""

    def before_step(self, trainer: Any) -> None:
        """`trainer.step` begins."""

    def before_update(self, trainer: Any) -> None:
        """The gradients of the step are complete, and not clipped yet. In backward there is no such moment."""

    def after_step(self, trainer: Any) -> None:
        """`trainer.step` is done, on a GPU perhaps still under way."""

    def on_metrics(self, trainer: Any, metrics: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`: the figures of the step `metrics["step"]`; on a GPU one step late.

        They are the same on every rank, save speed, memory and what `trainer.log` was given.
        """

    def on_evaluation(self, trainer: Any, figures: Mapping[str, float]) -> None:
        """All figures of the evaluations after this step, by name; the same on every rank."""

    def on_checkpoint(self, trainer: Any, written: Any) -> None:
        """A checkpoint is complete: `written.step`, `written.path`."""

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        """The run fails, here or in another callback. What this raises is printed, and does not hide the error."""

    def on_end(self, trainer: Any, result: Mapping[str, Any]) -> None:
        """The run is over, and `result` written; not called where it fails."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint is to keep of it, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, before `on_start`."""

    def __call__(self, trainer: Any) -> None:
        """A plain function in the place of a callback is called after every step; so a callback can be."""
        self.after_step(trainer)


class CallbackCell(Cell):
    """A callback that is built in."""

    kind = ""


class Monitor(CallbackCell):
    """What looks at one figure of the evaluations."""

    kind = ""
    monitor: str = _MONITOR
    """The figure, as `run.evaluations` names it."""
    mode: _Mode | None = None
    """Whether less or more is better. Default: as the evaluation says that gives the figure."""

    def __init__(self, monitor: str = _MONITOR, **fields: Any) -> None:
        super().__init__(**{"monitor": monitor, **fields})

    def direction(self, evaluations: Iterable[Evaluation]) -> _Mode | None:
        """Whether less or more is better; None where neither this cell nor an evaluation says."""
        known = {name: mode for cell in evaluations for name, mode in (cell.figures or {}).items()}
        return self.mode or known.get(self.monitor)


class EarlyStopping(Monitor):
    """Ends the run when a figure no longer improves.

    The run is then complete: the evaluations of the end run, the model is written, the status is `ok`, and `run.detail`
    says why it ended.
    """

    patience: int = Field(default=3, ge=1)
    """So many evaluations in a row without an improvement are too many."""
    min_delta: float = Field(default=0.0, ge=0.0)
    """An improvement is a change by more than this."""


class BestCheckpoint(Monitor):
    """Keeps the checkpoints with the best figures, apart from the rolling ones: `run.best_checkpoint`."""

    keep: int = Field(default=1, ge=1)
    """So many, the best first."""
    restore: bool = False
    """At the end the run goes back to the best weights: `run.model_path` holds these, and `run.summary` their figures.
    Without, both are of the last step."""


class Statistics(CallbackCell):
    """Figures of tensors, as columns of `run.metrics`: norm, root mean square (rms), largest magnitude (max), share of
    zeros and of what is not finite."""

    kind = ""
    columns: ClassVar[str] = ""
    every: int = Field(default=10, ge=1)
    groups: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    """Parameters to look at apart from all, by a name: `{"attention": "*self_attn*"}`; `*` and `?` as in file names."""

    @field_validator("groups")
    @classmethod
    def _plain_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        if bad := [name for name in value if not name.replace("_", "").replace(".", "").isalnum()]:
            raise ValueError(f"{bad[0]!r} becomes part of a column's name: letters, digits, `_` and `.`")
        return value


class GradientStatistics(Statistics):
    """Figures of the gradients before clipping: columns `gradients/norm`, `gradients/<group>/norm`, ..."""

    columns = "gradients"


class WeightStatistics(Statistics):
    """Figures of the trained weights after a step: columns `weights/norm`, `weights/<group>/norm`, ..."""

    columns = "weights"


class SystemMeters(CallbackCell):
    """Processor, memory, disk, network and GPUs of every machine: `run.system`."""

    every_seconds: float = Field(default=10.0, gt=0.0)


class Profile(CallbackCell):
    """Records some steps with torch's profiler: a trace of every rank for https://ui.perfetto.dev or chrome://tracing,
    and `run.profile`, a table of the operators. These steps are slower than others."""

    first: int = Field(default=4, ge=1)
    """The first of them, counted from where the run starts or goes on; those before warm up."""
    steps: int = Field(default=2, ge=1)


class TensorBoard(CallbackCell):
    """Writes a run's figures for TensorBoard."""

    kind = "tensorboard"
    package: ClassVar[str] = "tensorboard"

    folder: Annotated[str | None, PATH_TEXT] = None
    """Default: `tensorboard` in the run folder, of which `tensorboard --logdir runs` shows all. Else `<folder>/<run>`,
    which a resumed run goes on with."""


class WandB(CallbackCell):
    """Sends a run's figures to Weights & Biases. A resumed run goes on with the same one there."""

    package: ClassVar[str] = "wandb"

    project: str | None = None
    """Default: as W&B is set up."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Default: `WANDB_MODE`, else online. `offline` writes to the run folder, for `wandb sync`."""


class MLflow(CallbackCell):
    """Sends a run's figures to an MLflow server or store. A resumed run goes on with the same one there."""

    kind = "mlflow"
    package: ClassVar[str] = "mlflow"

    uri: str | None = None
    """Default: `MLFLOW_TRACKING_URI`, else as MLflow is set up."""
    experiment: str = "collie_lab"
    """MLflow's name for a set of runs."""


class CSV(CallbackCell):
    """Writes `metrics.csv` and `evaluations.csv`."""

    folder: Annotated[str | None, PATH_TEXT] = None
    """Default: the run folder. Else `<folder>/<run>`, which a resumed run goes on with."""
