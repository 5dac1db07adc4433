"""Under what conditions a run took place: what must be equal among arms that are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from collie_lab.study.outcomes import FINISHED, whole_metrics
from collie_lab.view.units import count_text

if TYPE_CHECKING:
    from collie_lab.launch import Run

__all__ = ["ASPECTS", "Aspect", "Conditions"]

Settings = Mapping[str, Any]


class Conditions:
    """The files of a run, each read once."""

    def __init__(self, run: Run):
        self.run = run

    @cached_property
    def experiment(self) -> Settings:
        """As it was launched."""
        path = self.run.folder.path / "experiment.yaml"
        return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}

    @cached_property
    def environment(self) -> Settings:
        """Versions, commit, hardware; empty before the ranks have started."""
        return self.run.folder.read("env.json")

    @cached_property
    def data(self) -> Settings:
        """The fingerprint of the training tokens, and the counts of every split."""
        return self.run.folder.read("data/index.json")

    @cached_property
    def ranks(self) -> int | None:
        """How many there were."""
        return self.run.folder.read("launch.json").get("world_size") or self.run.result.get("world_size")

    @cached_property
    def tokens_per_step(self) -> float | None:
        """Useful tokens of a step over all ranks, the mean of its steps; None of a run that did not finish them."""
        tokens = whole_metrics(self.run)["tokens"]
        return float(tokens.mean()) if self.run.status in FINISHED and len(tokens) else None

    def cell(self, slot: str) -> Settings:
        """A cell of the experiment; empty where there is none."""
        return self.experiment.get(slot) or {}


@dataclass(frozen=True)
class Aspect:
    """One condition.

    Attributes:
        name: as a note calls it.
        fields: what decides it in an experiment. Arms compared by such a field are meant to differ here.
        read: its value in a run; None where that cannot be known.
        text: the value in words.
        tolerance: numbers nearer than this share are equal.
    """

    name: str
    fields: tuple[str, ...]
    read: Callable[[Conditions], Any]
    text: Callable[[Any], str] = str
    tolerance: float = 0.0

    def is_compared_by(self, axis: str) -> bool:
        """Whether arms that differ on this axis are meant to differ here. By a whole cell (`optimizer`) they are where
        it decides first of all: not in the precision, of which an optimizer decides the rounding alone."""
        return axis == self.name or any(axis == field or axis.startswith(f"{field}.") for field in self.fields) \
            or any(field.startswith(f"{axis}.") for field in self.fields[:1])

    def equal(self, one: Any, two: Any) -> bool:
        """Whether two values are the same condition."""
        if self.tolerance and one is not None and two is not None:
            return bool(abs(one - two) <= self.tolerance * max(abs(one), abs(two)))
        return bool(one == two)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _batch(run: Conditions) -> tuple[int, int] | None:
    """Sequences of a step, and those of one forward pass on a rank."""
    training, layout = run.cell("training"), run.cell("parallel")
    if "batch_size" not in training:
        return None
    whole = int(training["batch_size"])
    return whole, int(training.get("micro_batch_size") or max(1, whole // int(layout.get("dp") or 1)))


def _steps(run: Conditions) -> int | None:
    """Those it took, which stopping early may have made fewer; of a run that failed, those it was to take."""
    return run.run.steps if run.run.status in FINISHED else run.cell("training").get("steps")


def _order(run: Conditions) -> str | None:
    data = run.cell("data")
    words = [f"{key} {data[key]}" for key in ("shuffle", "group_by_length", "packing", "seed") if key in data]
    return ", ".join(words) or None


def _precision(run: Conditions) -> str | None:
    training, rounding = run.cell("training"), run.cell("optimizer").get("rounding")
    if "precision" not in training:
        return None
    weights = training.get("weights", "fp32")
    words = f"{training['precision']} with {weights} weights"
    return words + (f" ({rounding})" if rounding and weights != "fp32" else "")  # fp32 weights are not rounded


def _compilation(run: Conditions) -> str | None:
    training = run.cell("training")
    return ("compiled" if training.get("compile") else "not compiled") if training else None


def _evaluation(run: Conditions) -> str | None:
    """What is asked of the model, on what; how often and in what batches does not matter."""
    cells = run.experiment.get("evaluate")
    if not cells:
        return None
    asked = [{key: value for key, value in cell.items() if key not in ("every", "batch_size")} for cell in cells]
    counts = {name: split for name, split in (run.data.get("summary") or {}).items() if not name.endswith(", train")}
    source = {key: value for key, value in run.cell("data").items() if key not in ("packing", "shuffle",
                                                                                   "group_by_length", "limit")}
    held_out = source if any(cell.get("data") is None for cell in asked) else None
    return _canonical({"asked": asked, "held out": held_out, "counts": counts})


def _evaluation_text(value: str) -> str:
    known = json.loads(value)
    asked = [cell.get("name") or cell.get("kind", "?") for cell in known["asked"]]
    limits = [f"{cell['limit']} " if cell.get("limit") else "" for cell in known["asked"]]
    counts = [f"{name}: {split.get('documents', split.get('questions', '?'))}"
              for name, split in known["counts"].items()]
    words = ", ".join(limit + name for limit, name in zip(limits, asked, strict=True))
    return words + (f" on {'; '.join(counts)}" if counts else "") + f" [{_short(value)}]"


def _hardware(run: Conditions) -> str | None:
    known = run.environment
    if not known:
        return None
    return str(known.get("gpu") or f"CPU ({known.get('cores')} cores)")


def _ranks(run: Conditions) -> str | None:
    """How many there are, and the threads of each."""
    return f"{run.ranks}, {run.environment.get('threads')} threads each" if run.environment and run.ranks else None


def _versions(run: Conditions) -> str | None:
    known = run.environment
    if not known:
        return None
    packages = {"python": known.get("python"), **known.get("packages", {}), "cuda": known.get("cuda")}
    return ", ".join(f"{name} {version}" for name, version in packages.items() if version)


def _commit(run: Conditions) -> str | None:
    known = run.environment
    if not known:
        return None
    git = known.get("collie_lab_git")
    if not git:
        return f"collie_lab {known.get('collie_lab')}"
    return str(git["commit"])[:9] + (f" with changes {git['diff'][:6]}" if git.get("diff") else "")


def _model(run: Conditions) -> str | None:
    model = {key: value for key, value in run.cell("model").items() if value and key != "kind"}
    return _canonical(model) if model else None


def _model_text(value: str) -> str:
    known = json.loads(value)
    source, start = str(known.pop("source", "?")), known.pop("init", "pretrained")
    words = [f"{Path(source).name if Path(source).is_absolute() else source} ({start})"]
    for key, each in known.items():
        settings = each if isinstance(each, dict) else {"kind": each}
        words.append(f"{key} (" + ", ".join(str(setting) if name == "kind" else f"{name} {setting}"
                                            for name, setting in settings.items() if setting not in (None, [])) + ")")
    return ", ".join(words)


def _schedule(run: Conditions) -> str | None:
    training = run.cell("training")
    words = [f"{training['schedule']}"] if "schedule" in training else []
    words += [f"{key} {training[key]}" for key in ("warmup", "final_lr") if training.get(key)]
    words += [f"decay {training['decay']}"] if training.get("schedule") == "wsd" and "decay" in training else []
    return ", ".join(words) or None


def _loss(run: Conditions) -> str | None:
    training = run.cell("training")
    return (training.get("loss") or "cross-entropy") if training else None


def _clipping(run: Conditions) -> str | None:
    training = run.cell("training")
    words = [f"{key.removeprefix('clip_grad_')} {training[key]}" for key in ("clip_grad_norm", "clip_grad_value")
             if training.get(key)]
    return (", ".join(words) or "none") if training else None


#: What is compared, the gravest first. The tuning budget no single run knows.
ASPECTS: Final = (
    Aspect("tokens per step", ("training.batch_size", "data", "model"), lambda run: run.tokens_per_step,
           count_text, tolerance=0.01),
    Aspect("batch size", ("training.batch_size", "training.micro_batch_size", "parallel"), _batch,
           lambda value: f"{value[0]} sequences, {value[1]} a forward pass"),
    Aspect("steps", ("training.steps",), _steps, lambda value: f"{value:,}"),
    Aspect("model", ("model",), _model, _model_text),
    Aspect("training data", ("data", "model"), lambda run: run.data.get("fingerprint")),
    Aspect("data order", ("data",), _order),
    Aspect("seed", ("training.seed",), lambda run: run.cell("training").get("seed")),
    Aspect("recomputation", ("training.recompute",), lambda run: run.cell("training").get("recompute")),
    Aspect("compilation", ("training.compile",), _compilation),
    Aspect("precision", ("training.precision", "training.weights", "optimizer.rounding"), _precision),
    Aspect("learning-rate schedule", ("training.schedule", "training.warmup", "training.decay",
                                      "training.final_lr"), _schedule),
    Aspect("loss", ("training.loss",), _loss),
    Aspect("gradient clipping", ("training.clip_grad_norm", "training.clip_grad_value"), _clipping),
    Aspect("evaluation set", ("evaluate", "data"), _evaluation, _evaluation_text),
    Aspect("hardware", (), _hardware),
    Aspect("ranks", ("parallel",), _ranks),
    Aspect("versions", (), _versions),
    Aspect("commit", (), _commit),
)
