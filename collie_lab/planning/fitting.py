"""What fits: layouts, methods and micro-batches for a model on some GPUs, ranked; and why the others do not."""

from __future__ import annotations

import functools
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from collie_lab.cells import (
    AdaLomo,
    AdamW,
    CellError,
    Data,
    Experiment,
    Lion,
    Lomo,
    LoRA,
    Model,
    Problem,
    RandomTokens,
    Training,
)
from collie_lab.data.hub import context_length, holds_weights, model_config
from collie_lab.gpus import GPU, find_gpu
from collie_lab.planning._rough import Shape
from collie_lab.planning._search import Goal, Option, Refusal, Search
from collie_lab.planning._texts import uncompiled_text
from collie_lab.planning.calibration import find_rates
from collie_lab.planning.plan import longest_document
from collie_lab.planning.rates import published
from collie_lab.view.units import bytes_text, count_text, percent_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["METHODS", "Fit", "fit"]

#: What is tried by default: groups of changes by name, as in a study's grid.
METHODS: Final[Mapping[str, Mapping[str, Any]]] = {
    "AdamW": {"optimizer": AdamW(), "adapter": None, "training.weights": "fp32"},
    "Lion": {"optimizer": Lion(), "adapter": None, "training.weights": "fp32"},
    "AdaLomo": {"optimizer": AdaLomo(), "adapter": None, "training.weights": "bf16"},
    "LOMO": {"optimizer": Lomo(), "adapter": None, "training.weights": "bf16"},
    "LoRA": {"optimizer": AdamW(lr=2e-4), "adapter": LoRA(r=16), "training.weights": "bf16"},
}
_LENGTH: Final = 2048  # tokens, where the model's context is not shorter
_BATCH: Final = 64  # sequences of a step, or the next multiple of the GPUs
_TRIES: Final = 4  # dry runs for a method of which the first do not fit after all


@dataclass(frozen=True)
class Fit(Sequence[Option]):
    """What fits, the best first: those whose figures are of a dry run before those that are estimated.

    `fit.best.experiment` is ready to launch, as is `fit[3].experiment`.

    Attributes:
        title: what was asked.
        options: ranked.
        refused: layouts that do not do, with the reason.
    """

    title: str
    options: tuple[Option, ...]
    refused: tuple[Refusal, ...]

    @property
    def best(self) -> Option:
        """The first.

        Raises:
            CellError: nothing fits; why.
        """
        if not self.options:
            raise CellError([Problem("fit", "", f"nothing fits: {self.title}",
                                     "; ".join(f"{each.method}, {each.layout}: {each.reason}"
                                               for each in self.refused[-3:]))])
        return self.options[0]

    @property
    def frame(self) -> pd.DataFrame:
        """A row an option, in base units; `confirmed`: by a dry run."""
        import pandas as pd

        rows = [{"method": each.method, "settings": each.settings, "process_bytes": each.process_bytes,
                 "tokens_per_second": each.tokens_per_second, "mfu": each.mfu,
                 "confirmed": each.confirmed} for each in self.options]
        return pd.DataFrame(rows, columns=["method", "settings", "process_bytes", "tokens_per_second", "mfu",
                                           "confirmed"])

    @property
    def reasons(self) -> pd.DataFrame:
        """Why the others do not fit: a row a layout of a method."""
        import pandas as pd

        return pd.DataFrame([vars(each) for each in self.refused], columns=["method", "layout", "reason"])

    def table(self) -> pd.DataFrame:
        """The frame as one reads it; `~` before what no dry run has confirmed."""
        import pandas as pd

        rows = []
        for each in self.options:
            about = "" if each.confirmed else "~"
            rows.append({"method": each.method, "settings": each.settings,
                         "a GPU": about + bytes_text(each.process_bytes),
                         "of its memory": about + percent_text(each.process_bytes / each.gpu.memory),
                         "tokens/s": about + count_text(each.tokens_per_second), "MFU": percent_text(each.mfu)})
        columns = ["method", "settings", "a GPU", "of its memory", "tokens/s", "MFU"]
        return pd.DataFrame(rows, columns=columns)

    def __len__(self) -> int:
        return len(self.options)

    def __getitem__(self, index: Any) -> Any:
        return self.options[index]

    def __iter__(self) -> Iterator[Option]:
        return iter(self.options)

    def __repr__(self) -> str:
        lines = [self.title, *(f"  {each!r}" for each in self.options[:12])]
        if len(self.options) > 12:
            lines.append(f"  and {len(self.options) - 12} more")
        if self.refused:
            lines.append(f"{'and' if self.options else 'nothing fits;'} {len(self.refused)} layouts do not do; "
                         "`reasons` says why")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        why = f"<details><summary>{len(self.refused)} layouts do not do</summary>" \
              f"{self.reasons.to_html(index=False)}</details>" if self.refused else ""
        table = self.table().to_html(index=False) if self.options else "<p>Nothing fits.</p>"
        return f"<p><b>{html.escape(self.title)}</b></p>{table}{why}"


def fit(model: Model | str | Path | Experiment, gpus: int = 8, gpu: GPU | str = "H100", *, goal: Goal = "throughput",
        data: Data | None = None, length: int | None = None, batch_size: int | None = None,
        methods: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None, confirm: int = 3,
        progress: bool = True) -> Fit:
    """How a model can be trained on so many GPUs: layouts, methods, micro-batches and recomputation, ranked by `goal`.

    Hundreds of combinations are weighed by arithmetic: memory by the closed form where there is one. The best of the
    methods, and the best beside them, are then run on tensors without values, as plans are; the figures of the others
    are marked as rough (`~`), and `option.plan` makes them exact. An experiment lends all its cells, and is then the
    one method.

    Args:
        goal: the most tokens per second, or the least memory of a GPU.
        data: what it is trained on; its `max_length` counts. Default: random tokens of `length`.
        length: tokens of a sequence. Default: 2,048, or the model's context.
        batch_size: sequences of an optimizer step on all GPUs. Default: 64, or the next multiple of the GPUs.
        methods: names of `METHODS`, or groups of changes of one's own by name, as in a study's grid:
            `{"Muon": {"optimizer": lab.Muon(), "training.weights": "bf16"}}`.
        confirm: how many options are run on tensors without values.
        progress: print them as they come.

    Raises:
        CellError: no such GPU, method or goal; a number that is none; a model without a configuration.
    """
    chosen = find_gpu(gpu)
    _check(gpus, goal, batch_size, confirm)
    base = _base(model, chosen, gpus, data, length, batch_size)
    named = {type(base.adapter or base.optimizer).__name__: base} if methods is None and isinstance(model, Experiment) \
        else _methods(base, METHODS if methods is None else methods, chosen)
    config = model_config(base.model)
    search = Search(Shape.of(base.model, config), chosen, gpus, longest_document(base),
                    find_rates(chosen, gpus) or published(chosen), goal)
    options, refused = [], []
    for name, experiment in named.items():
        found, not_found = search.options(name, experiment)
        options += found
        refused += not_found
    say = functools.partial(print, flush=True) if progress else lambda *_: None
    say(f"{base.model.source} on {gpus} x {chosen.name}: {len(options)} options of {len(named)} methods may fit; "
        f"dry runs of the best")
    dropped = _confirm(search, options, list(named), confirm, say)
    dropped += [Refusal(each.method, each.settings, f"about {bytes_text(each.process_bytes)}, which is too much; only "
                        "a plan could tell") for each in options if not each.fits]
    ranked = sorted(filter(lambda each: each.fits, options), key=lambda each: (not each.confirmed, each.score(goal)))
    title = (f"{base.model.source} on {gpus} x {chosen.name} ({bytes_text(chosen.memory)}), batches of "
             f"{base.training.batch_size} x {search.length} tokens, ranked by {goal}"
             + uncompiled_text(base))
    return Fit(title, tuple(ranked), (*refused, *dropped))


def _confirm(search: Search, options: list[Option], names: list[str], count: int, say: Any) -> list[Refusal]:
    """Dry runs of the best of each method, then of the best of all. What does not fit after all leaves `options`, and
    its next smaller micro-batch comes in its place."""
    dropped: list[Refusal] = []

    def attempt(option: Option) -> bool:
        reason = search.try_out(option)
        say(f"  {option!r}" if not reason else f"  {option.method}, {option.settings}: {reason}")
        if not reason:
            return True
        options.remove(option)
        smaller = search.smaller(option) if search.goal == "throughput" else None
        if smaller is not None:
            options.append(smaller)
        else:
            dropped.append(Refusal(option.method, option.settings, reason))
        return False

    def best(method: str | None) -> Option | None:
        left = [each for each in options if not each.confirmed and method in (None, each.method)
                and each.experiment.parallel.pp == 1]  # of pipelines every stage has to run: minutes
        return min(left, key=lambda each: (not each.fits, each.score(search.goal)), default=None)

    found = [(option.score(search.goal), name) for name in names if (option := best(name)) is not None]
    made = 0
    for _, name in sorted(found)[:count]:
        for _ in range(_TRIES):
            if (option := best(name)) is None or attempt(option):
                break
        made += 1
    while made < count and (option := best(None)) is not None:
        attempt(option)
        made += 1
    return dropped


def _check(gpus: int, goal: str, batch_size: int | None, confirm: int) -> None:
    for field, value in (("gpus", gpus), ("batch_size", batch_size), ("confirm", confirm)):
        if value is not None and value < 1:
            raise CellError([Problem("fit", field, f"{value} is no number of {field.replace('_', ' ')}", "1 or more")])
    if goal not in ("throughput", "memory"):
        raise CellError([Problem("fit", "goal", f"no goal {goal!r}", "there are: throughput, memory")])


def _base(model: Model | str | Path | Experiment, gpu: GPU, gpus: int, data: Data | None, length: int | None,
          batch_size: int | None) -> Experiment:
    """The cells that all options share."""
    if data is not None and length is not None:
        raise CellError([Problem("fit", "length", "the data have a length of their own", "give one of the two")])
    if isinstance(model, Experiment):
        base = model.replace(model=_buildable(model.model))
        base = base if data is None else base.replace(data=data)
        base = base if length is None else base.replace(data=RandomTokens(length=length))
        return base if batch_size is None else base.with_("training.batch_size", batch_size)
    cell = _buildable(model if isinstance(model, Model) else Model(model))
    room = context_length(model_config(cell)) or _LENGTH
    if length is not None and length > room:
        raise CellError([Problem("fit", "length", f"{length} tokens do not fit the model's context of {room}",
                                 f"at most {room}")])
    batch = batch_size or -(-_BATCH // gpus) * gpus
    precision = "bf16" if gpu.bf16 else "fp32"
    return Experiment(model=cell, data=data or RandomTokens(length=length or min(_LENGTH, room)), name="fit",
                      training=Training(batch_size=batch, precision=precision))


def _buildable(model: Model) -> Model:
    """With trained weights where there are any, else with random ones: a configuration is enough, as for a plan."""
    return model if holds_weights(model) else model.replace(init="random")


def _methods(base: Experiment, methods: Sequence[str] | Mapping[str, Mapping[str, Any]], gpu: GPU
             ) -> dict[str, Experiment]:
    """The experiment of each method, without a layout yet."""
    groups: dict[str, Mapping[str, Any]] = {}
    for name in methods:
        given = methods[name] if isinstance(methods, Mapping) else METHODS.get(name)
        if given is None:
            raise CellError([Problem("fit", "methods", f"no method {name!r}", "there are: " + ", ".join(METHODS)
                                     + "; or a mapping of names to changes: {'Muon': {'optimizer': lab.Muon()}}")])
        groups[name] = given
    made = {}
    for name, changes in groups.items():
        experiment = base
        for path, value in changes.items():
            value = "fp32" if path == "training.weights" and not gpu.bf16 else value
            experiment = experiment.with_(path, value)
        made[name] = experiment
    return made
