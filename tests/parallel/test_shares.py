"""What a rank holds: its share of weights, gradients and optimizer state, in bytes; and shards that generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from collie_lab import AdamW, ExactMatch, Experiment, Model, Parallel, Skills, Training
from collie_lab.folder import RunFolder
from tests.ranks import losses, run_here, run_ranks

# Untied, 4 layers; C = 64 hidden, I = 172, V = 320; all of these are even, and dp cuts rows alone.
LAYERS, C, INTERMEDIATE, V = 4, 64, 172, 320
EXP = Experiment(
    model=Model("llama-tiny", init="random", config={"num_hidden_layers": LAYERS, "tie_word_embeddings": False}),
    data=Skills(size=60, test_size=5, packing=True, max_length=96), optimizer=AdamW(lr=3e-3),
    training=Training(steps=2, batch_size=8, export=False),
)
MATRICES = LAYERS * (4 * C * C + 3 * C * INTERMEDIATE)
VOCABULARY = 2 * V * C
NORMS = (2 * LAYERS + 1) * C
WHOLE = MATRICES + VOCABULARY + NORMS

#: Elements of the weights that each rank holds (its gradients and each of AdamW's two states have as many).
EXPECTED: dict[str, tuple[Parallel, list[int]]] = {
    "dp2": (Parallel(dp=2), [WHOLE] * 2),
    "dp2 zero2": (Parallel(dp=2, zero=2), [WHOLE // 2] * 2),
    "dp2 zero3": (Parallel(dp=2, zero=3), [WHOLE // 2] * 2),
    "tp2": (Parallel(tp=2), [(MATRICES + VOCABULARY) // 2 + NORMS] * 2),
    # Two layers and the embedding; two layers, the last norm and the head.
    "pp2": (Parallel(pp=2), [(MATRICES + VOCABULARY + NORMS - C) // 2, (MATRICES + VOCABULARY + NORMS - C) // 2 + C]),
    "tp2 dp2 zero3": (Parallel(tp=2, dp=2, zero=3), [(MATRICES + VOCABULARY) // 4 + NORMS // 2] * 4),
    "pp2 tp2": (Parallel(pp=2, tp=2), [(MATRICES + VOCABULARY) // 4 + (NORMS - C) // 2] * 2
                + [(MATRICES + VOCABULARY) // 4 + (NORMS - C) // 2 + C] * 2),
}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _measure(folder: str, name: str) -> None:
    """Bytes of weights, gradients and states of this rank, into a file."""
    found: dict[str, int] = {}

    def look(trainer: Any) -> None:
        parameters = list(trainer.model.parameters())
        if trainer.step == 1:
            found["gradients"] = 0
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(count)
        else:
            found["weights"] = sum(_local(parameter).nbytes for parameter in parameters)
            found["states"] = sum(_local(state).nbytes for entries in trainer.optimizer.state.values()
                                  for state in entries.values() if state.ndim)

    seen: dict[int, int] = {}

    def count(parameter: Tensor) -> None:
        assert parameter.grad is not None
        seen[id(parameter)] = _local(parameter.grad).nbytes
        found["gradients"] = sum(seen.values())

    run_here(EXP.replace(parallel=EXPECTED[name][0], callbacks=(look,)), Path(folder) / name)
    (Path(folder) / name / f"held-{dist.get_rank()}.json").write_text(json.dumps(found))


def _measure_all(folder: str, names: list[str]) -> None:
    for name in names:
        _measure(folder, name)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_holds_its_share(ranks: int, tmp_path: Path) -> None:
    names = [name for name, (cell, _) in EXPECTED.items() if cell.world_size == ranks]
    run_ranks(_measure_all, ranks, str(tmp_path), names)
    for name in names:
        for rank, count in enumerate(EXPECTED[name][1]):
            found = json.loads((tmp_path / name / f"held-{rank}.json").read_text())
            assert found == {"weights": 4 * count, "gradients": 4 * count, "states": 8 * count}, (name, rank)


UNEVEN = EXP.replace(training=Training(steps=4, batch_size=4, export=False),
                     evaluate=[ExactMatch(batch_size=1, every=2, max_new_tokens=6)])


def _generate_unevenly(folder: str) -> None:
    for zero in (2, 3):
        run_here(UNEVEN.replace(parallel=Parallel(dp=2, zero=zero)), Path(folder) / f"zero{zero}")


@pytest.mark.ranks
def test_shards_generate_unequally_often_and_train_on(tmp_path: Path) -> None:
    """Five documents on two ranks: one generates three times, the other twice."""
    alone = run_here(UNEVEN, tmp_path / "alone")
    run_ranks(_generate_unevenly, 2, str(tmp_path))
    for zero in (2, 3):
        run = RunFolder(tmp_path / f"zero{zero}")
        assert losses(run) == pytest.approx(losses(alone), abs=1e-5)
        assert run.read("result.json")["exact_match"] == alone.read("result.json")["exact_match"]
