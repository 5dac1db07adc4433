"""The benchmark cells: public question sets, from local files in the form in which their authors publish them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from collie_lab.cells._base import PATH_TEXT
from collie_lab.cells.evaluation import Better, Evaluation

__all__ = ["BBH", "GSM8K", "MMLU", "Benchmark", "HumanEval", "LMEval"]


class Benchmark(Evaluation):
    """What the benchmarks from local files share."""

    kind: ClassVar[str] = ""

    path: str
    """The folder, or file, of the benchmark's own repository."""
    overlong: Literal["drop_shots", "truncate"] = "drop_shots"
    """Where a prompt does not fit the model's context: leave examples out, the last first, as MMLU's authors do, and
    cut on the left what is still too long; or cut on the left at once, as lm-eval does. Both are counted and said."""

    def __init__(self, path: str | Path, **fields: Any) -> None:
        super().__init__(path=str(path), **fields)  # type: ignore[call-arg]


class MMLU(Benchmark):
    """Multiple choice over 57 subjects, by the likelihood of A, B, C and D (Hendrycks et al., arXiv 2009.03300).

    `path` holds `test/<subject>_test.csv` and `dev/<subject>_dev.csv`. Figures: `mmlu`, the share of right answers over
    all questions, and `mmlu_macro`, the mean over subjects.
    """

    better: ClassVar[Better | None] = {"mmlu": "max", "mmlu_macro": "max"}

    subjects: tuple[str, ...] = ()
    """Default: all."""
    shots: int = Field(default=5, ge=0)


class GSM8K(Benchmark):
    """Grade-school mathematics (Cobbe et al., arXiv 2110.14168); `path` holds `test.jsonl` and `train.jsonl`.

    The first `shots` training problems stand before each question. Figures: `gsm8k`, the share of answers whose number
    after `####` is right, and `gsm8k_flexible`, that of the last number in the answer.
    """

    better: ClassVar[Better | None] = {"gsm8k": "max", "gsm8k_flexible": "max"}

    shots: int = Field(default=5, ge=0)
    max_new_tokens: int = Field(default=256, ge=1)
    stop: tuple[str, ...] = ("Question:", "</s>", "<|im_end|>")


class BBH(Benchmark):
    """BIG-Bench Hard, 27 files of 23 tasks (Suzgun et al., arXiv 2210.09261); `path` holds `bbh/` and `cot-prompts/`.

    Three examples stand before each question: with their chain of thought (`style="cot"`; the answer is what follows
    "the answer is"), or with the answer alone (`"direct"`). Figures: `bbh`, the share of right answers over all
    questions, and `bbh_macro`, the mean over files.
    """

    better: ClassVar[Better | None] = {"bbh": "max", "bbh_macro": "max"}

    tasks: tuple[str, ...] = ()
    """Default: all."""
    style: Literal["cot", "direct"] = "cot"
    max_new_tokens: int = Field(default=512, ge=1)
    stop: tuple[str, ...] = ("</s>", "Q", "\n\n")


class HumanEval(Benchmark):
    """Functional correctness of completed Python functions (Chen et al., arXiv 2107.03374).

    `path` is `HumanEval.jsonl` or its `.gz`. Figures: `humaneval_pass_at_<k>`, the paper's unbiased estimate from
    `samples` completions of each problem. Completions are programs that a model wrote: they run only with
    `execute=True`, each in a process of its own that can neither write, connect nor start another one
    (`collie_lab.sandbox`); without it they are kept, and there is no figure.
    """

    kind: ClassVar[str] = "humaneval"

    execute: bool = False
    samples: int = Field(default=1, ge=1)
    k: tuple[int, ...] = Field(default=(1,), min_length=1)
    temperature: float = Field(default=0.0, ge=0.0)
    """0: greedy. The paper draws with 0.2 for pass@1 and 0.8 for pass@100, and `top_p=0.95`."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_new_tokens: int = Field(default=512, ge=1)
    stop: tuple[str, ...] = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    seconds: float = Field(default=3.0, gt=0.0)
    """How long a program may run."""
    memory: float = Field(default=1.0, ge=0.125)
    """GiB that a program may map."""

    @field_validator("k")
    @classmethod
    def _positive(cls, k: tuple[int, ...]) -> tuple[int, ...]:
        if min(k) < 1:
            raise ValueError("pass@k needs k of 1 or more")
        return k


class LMEval(Evaluation):
    """Any tasks of EleutherAI's lm-evaluation-harness, on the model in training and its layout.

    Needs the extra `eval`. Figures: `<task>_<metric>`, with the filter's name behind it where there is one.
    """

    kind: ClassVar[str] = "lm_eval"

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks, groups or tags."""
    include_path: Annotated[str | None, PATH_TEXT] = None
    """A folder of further task definitions."""
    shots: int | None = Field(default=None, ge=0)
    """Default: each task's own."""

    def __init__(self, tasks: str | tuple[str, ...] | list[str], **fields: Any) -> None:
        super().__init__(tasks=(tasks,) if isinstance(tasks, str) else tasks, **fields)  # type: ignore[call-arg]
