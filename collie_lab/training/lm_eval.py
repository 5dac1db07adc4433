"""Tasks of lm-evaluation-harness on the model in training: lm-eval asks and judges, this project's engines answer."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import torch.distributed as dist
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray
from transformers import PreTrainedModel

from collie_lab.cells import LMEval, VirtualTokens
from collie_lab.data import Tokenizer
from collie_lab.data.lm_eval_tasks import load_tasks, task_manager
from collie_lab.data.questions import Pieces, Question, Room, arrange, continuation
from collie_lab.parallel import Strategy
from collie_lab.training.generate import Draw, generate
from collie_lab.training.judge import Sample
from collie_lab.training.likelihood import score

__all__ = ["run_tasks"]

#: Tokens of an answer where the task does not say, as lm-eval's own models have it.
_ANSWER: Final = 256
#: Where the model's configuration names no context, as there.
_CONTEXT: Final = 2048


def run_tasks(cell: LMEval, model: PreTrainedModel, tokenizer: Tokenizer, strategy: Strategy, *, flat: bool,
              virtual: VirtualTokens | None, tick: Callable[[], None]) -> tuple[list[Sample], dict[str, float]]:
    """All samples and figures of the tasks; all ranks call it together, and get the same."""
    asked = _Model(cell, model, tokenizer, strategy, flat, virtual, tick)
    tasks = load_tasks(cell.tasks, task_manager(cell), cell.shots)
    results = evaluate(asked, tasks, limit=cell.limit, bootstrap_iters=0, log_samples=True)
    samples = [{"index": index, "task": task, **sample} for index, (task, sample) in enumerate(
        (task, sample) for task, found in results["samples"].items() for sample in found)]
    return json.loads(json.dumps(samples, default=str)), _figures(results)


def _figures(results: dict[str, Any]) -> dict[str, float]:
    """`<task>_<metric>`, with the filter behind it unless that is `none`; standard errors of means over samples."""
    figures = {}
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, _, chosen = key.partition(",")
            if not isinstance(value, (int, float)) or not chosen or metric.endswith("_stderr"):
                continue
            name = f"{task}_{metric}" + (f"_{chosen}" if chosen != "none" else "")
            figures[name] = float(value)
            values = [sample.get(metric) for sample in results["samples"].get(task, ()) if sample["filter"] == chosen]
            numbers = [float(each) for each in values if isinstance(each, (int, float))]
            if len(numbers) > 1 and math.isclose(statistics.fmean(numbers), value):
                figures[f"{name}_se"] = statistics.stdev(numbers) / math.sqrt(len(numbers))
    return figures


class _Model(LM):  # type: ignore[misc]
    """The model as lm-eval sees it: on each rank all requests, of which it answers its share and learns the others'."""

    def __init__(self, cell: LMEval, model: PreTrainedModel, tokenizer: Tokenizer, strategy: Strategy, flat: bool,
                 virtual: VirtualTokens | None, tick: Callable[[], None]):
        super().__init__()
        self._cell, self._causal_lm, self._tokenizer, self._strategy = cell, model, tokenizer, strategy
        self._flat, self._virtual, self._tick = flat, virtual, tick
        self._context: int = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _CONTEXT
        self._context -= virtual.tokens if virtual is not None else 0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether it is greedy decoding's."""
        return self._score(continuation([request.args for request in requests], self._tokenizer))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of the model's context."""
        prefix = self._tokenizer.prefix
        first = prefix[-1] if prefix else self._tokenizer.eos_id
        # The text with the tokenizer's own first token, which is so predicted from itself: as lm-eval's models do.
        windows = [[make_disjoint_window(window) for window in get_rolling_token_windows(
            token_list=prefix + ids, prefix_token=first, max_seq_len=self._context, context_len=1)]
            for ids in self._tokenizer.encode([request.args[0] for request in requests])]
        found = iter(self._score([window for text in windows for window in text]))
        return [sum(next(found)[0] for _ in text) for text in windows]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string. Requests with the same settings are answered together."""
        settings = [_Settings(request.args[1]) for request in requests]
        if too_long := [each.tokens for each in settings if each.tokens >= self._context]:
            raise ValueError(f"{max(too_long)} tokens of answer leave nothing of the model's context of "
                             f"{self._context} for a prompt: give the task another `max_gen_toks`")
        texts = self._tokenizer.encode([request.args[0] for request in requests])
        prompts = [np.array((self._tokenizer.prefix + ids)[-(self._context - each.tokens):], dtype=np.int32)
                   for ids, each in zip(texts, settings, strict=True)]
        kinds = [repr(each) for each in settings]
        order = sorted(range(len(requests)), key=lambda place: (kinds[place], len(prompts[place])))
        mine = order[self._strategy.place.dp :: self._strategy.cell.dp]
        answers: dict[int, str] = {}
        with self._strategy.whole(self._causal_lm):
            for batch in _batches(mine, kinds, self._cell.batch_size):
                self._tick()
                one = settings[batch[0]]
                found = generate(self._causal_lm, [prompts[place] for place in batch], self._tokenizer,
                                 self._strategy.device, one.tokens, one.temperature, stop=one.stop,
                                 draw=Draw(batch, one.top_p), tick=self._tick)
                answers |= zip(batch, found, strict=True)
        everyone = self._all(answers)
        return [everyone[place] for place in range(len(requests))]

    def _score(self, pieces: Sequence[Pieces]) -> list[tuple[float, bool]]:
        questions, _ = arrange([[piece] for piece in pieces], [Question("", 0, ("",))] * len(pieces),
                               Room(self._context))
        # Continuations of one text stay together: those of one token share a pass.
        texts: dict[tuple[int, ...], int] = {}
        owner = np.array([texts.setdefault(tuple(prompt), len(texts)) for prompt, _ in pieces], dtype=np.int64)
        mine: NDArray[np.int64] = np.flatnonzero(owner % self._strategy.cell.dp == self._strategy.place.dp)
        found, greedy = score(self._causal_lm, questions, mine, self._strategy, batch_size=self._cell.batch_size,
                              flat=self._flat, virtual=self._virtual, tick=self._tick)
        everyone = self._all(dict(zip(mine.tolist(), zip(found.tolist(), greedy.tolist(), strict=True), strict=True)))
        return [everyone[place] for place in range(len(pieces))]

    def _all(self, answers: dict[int, Any]) -> dict[int, Any]:
        """Those of all ranks, on each of them."""
        if not dist.is_initialized():
            return answers
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, answers if self._strategy.counts else {})
        return {place: answer for part in parts for place, answer in part.items()}


class _Settings:
    """How a task wants its answers generated."""

    def __init__(self, given: dict[str, Any]):
        given = dict(given)
        until = given.pop("until", ())
        self.stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        self.tokens = int(given.pop("max_gen_toks", _ANSWER))
        draws = given.pop("do_sample", None)
        self.temperature = float(given.pop("temperature", 1.0 if draws else 0.0)) if draws is not False else 0.0
        self.top_p = float(given.pop("top_p", 1.0))
        if given:
            raise ValueError(f"these generation settings of a task are not known here: {', '.join(map(str, given))}")

    def __repr__(self) -> str:
        return repr((self.stop, self.tokens, self.temperature, self.top_p))


def _batches(places: Iterable[int], kinds: Sequence[str], size: int) -> Iterable[list[int]]:
    """Runs of at most `size` places of one kind."""
    batch: list[int] = []
    for place in places:
        if batch and (len(batch) == size or kinds[place] != kinds[batch[0]]):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
