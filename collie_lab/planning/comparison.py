"""Plans side by side: bytes by component, speed and verdict, as a table and as bars against the GPU's memory."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from collie_lab.cells import CellError, Problem
from collie_lab.planning._figure import ROLE_COLORS
from collie_lab.planning._texts import batches_text, layout_text
from collie_lab.view.figures import Picture, png
from collie_lab.view.style import INK, MUTED, STATUS_COLORS, style
from collie_lab.view.units import bytes_text, count_text, percent_text

if TYPE_CHECKING:
    import pandas as pd

    from collie_lab.planning.plan import Plan

__all__ = ["PlanComparison", "compare_plans"]

#: How the bars name what a process takes beyond its tensors: gaps between them, and CUDA's context.
_BEYOND: Final = "beyond tensors"
_MEMORY: Final = "the GPU's memory"


@dataclass(frozen=True)
class PlanComparison:
    """Some plans by their labels; the last line of a notebook's cell shows a table and bars."""

    plans: dict[str, Plan]

    @property
    def frame(self) -> pd.DataFrame:
        """A row a plan, in base units: bytes of the worst rank's peak by component, `peak`, `reserved`, `process`,
        `memory` (of the GPU), `fits`, `tokens_per_second` of all ranks, `mfu`."""
        import pandas as pd

        rows = {label: {**_components(plan), "peak": plan.peak_bytes, "reserved": plan.reserved_bytes,
                        "process": plan.process_bytes, "memory": plan.gpu.memory if plan.gpu else None,
                        "fits": plan.fits, "tokens_per_second": plan.tokens_per_second, "mfu": plan.mfu}
                for label, plan in self.plans.items()}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("plan")

    def table(self) -> pd.DataFrame:
        """The frame as one reads it; components that no plan has are left out."""
        import pandas as pd

        frame, columns = self.frame, {}
        for name in (*ROLE_COLORS, "peak", "process", "memory"):
            if frame[name].fillna(0).any():
                columns[name] = [bytes_text(value) for value in frame[name]]
        if any(plan.gpu for plan in self.plans.values()):
            columns["fits"] = ["" if fits is None else "yes" if fits else "no" for fits in frame["fits"]]
        if frame["tokens_per_second"].notna().any():
            columns["tokens/s"] = [count_text(value) for value in frame["tokens_per_second"]]
            columns["MFU"] = [percent_text(value) for value in frame["mfu"]]
        return pd.DataFrame(columns, index=frame.index)

    def figure(self) -> Figure:
        """A bar a plan: the worst rank's process by component, beside the memory of its GPU."""
        with style():
            picture = Picture(figsize=(8.6, 1.1 + 0.42 * len(self.plans)), layout="constrained")
            axes = picture.add_subplot()
            for row, plan in enumerate(self.plans.values()):
                _draw_bar(axes, row, plan)
            axes.set_yticks(range(len(self.plans)), list(self.plans), color=INK)
            axes.set(xlim=(0, 1.45 * axes.get_xlim()[1]), ylim=(len(self.plans) - 0.4, -0.6),
                     title="memory of the worst rank's process")
            axes.xaxis.set_major_formatter(EngFormatter("B", sep=" "))
            axes.grid(visible=False)
            handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one of each name
            names = [name for name in (*ROLE_COLORS, _BEYOND, _MEMORY) if name in handles]
            axes.legend([handles[name] for name in names], names, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return picture

    def __repr__(self) -> str:
        return str(self.table().to_string())

    def _repr_html_(self) -> str:
        picture = base64.b64encode(png(self.figure())).decode()
        return f"{self.table().to_html()}<img alt='memory by component' src='data:image/png;base64,{picture}'>"


def compare_plans(plans: Sequence[Plan], labels: Sequence[str] | None = None) -> PlanComparison:
    """Plans by `labels`, or by what differs between them.

    Raises:
        CellError: too few or too many labels, or the same one twice.
    """
    names = _labels(plans) if labels is None else list(labels)
    if len(names) != len(plans) or len(set(names)) != len(names):
        raise CellError([Problem("compare", "labels", f"{len(set(names))} labels for {len(plans)} plans",
                                 "one a plan, each its own")])
    return PlanComparison(dict(zip(names, plans, strict=True)))


def _labels(plans: Sequence[Plan]) -> list[str]:
    """What differs, in words; numbers where that does not tell them apart."""
    parts = [[experiment.model.source, type(experiment.adapter or experiment.optimizer).__name__,
              layout_text(experiment.parallel), f"{experiment.training.weights} weights",
              *batches_text(experiment), "compiled (not forecast)" if experiment.training.compile else "not compiled",
              f"{plan.length} tokens", plan.gpu.name if plan.gpu else "CPU"]
             for plan in plans for experiment in [plan.experiment]]
    differing = [column for column in range(len(parts[0])) if len({row[column] for row in parts}) > 1]
    names = [", ".join(row[column] for column in differing) or row[1] for row in parts]
    return [name if names.count(name) == 1 else f"{name} ({names[:index + 1].count(name)})"
            for index, name in enumerate(names)]


def _components(plan: Plan) -> dict[str, int]:
    found = {**plan.worst["components"], "workspace": plan.gpu.workspace if plan.gpu else 0}
    return {name: found.get(name, 0) for name in ROLE_COLORS}


def _draw_bar(axes: Axes, row: int, plan: Plan) -> None:
    left = 0
    for name, size in _components(plan).items():
        if size:
            axes.barh(row, size, left=left, height=0.62, color=ROLE_COLORS[name], label=name)
        left += size
    end = plan.process_bytes or left
    if end > left:
        axes.barh(row, end - left, left=left, height=0.62, facecolor="none", edgecolor="#9CA3AF", hatch="////",
                  linewidth=0.5, label=_BEYOND)
    words = bytes_text(end)
    if plan.tokens_per_second is not None:
        words += f", {count_text(plan.tokens_per_second)} tokens/s"
    if plan.gpu is not None:
        axes.plot([plan.gpu.memory] * 2, [row - 0.46, row + 0.46], color=INK, linewidth=1.4, label=_MEMORY)
        end = max(end, plan.gpu.memory) if end > 0.6 * plan.gpu.memory else end
    axes.annotate(words, (end, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8,
                  color=STATUS_COLORS["cuda_oom"] if plan.fits is False else MUTED)
