"""The main job through the real chain: kernel, supervisor, torchrun, ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import collie_lab as lab
from tests.ranks import losses, run_here

EXPERIMENT = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), data=lab.Skills(size=100, test_size=20, packing=True, max_length=96),
    optimizer=lab.AdamW(lr=3e-3), training=lab.Training(steps=6, batch_size=4, checkpoint_every=3),
    evaluate=[lab.Perplexity(every=3), lab.ExactMatch(limit=4, max_new_tokens=4)],
)


@pytest.mark.ranks
def test_two_launched_ranks_give_table_and_figures_of_one_process(tmp_path: Path) -> None:
    run = EXPERIMENT.replace(parallel=lab.Parallel(dp=2, zero=3)).launch(show=False)
    here = run_here(EXPERIMENT, tmp_path / "here")
    assert run.status == "ok"
    assert run.metrics["loss"].tolist() == pytest.approx(losses(here), abs=1e-5)
    assert run.evaluations["step"].tolist() == [3, 6, 6]
    assert run.summary["perplexity"] == pytest.approx(here.read("result.json")["perplexity"], rel=1e-5)
    assert run.summary["peak_bytes"] < here.read("result.json")["peak_bytes"]  # sharded, half the batch each
    environment = run.folder.read("env.json")
    assert environment["packages"]["torch"]
    assert environment["seed"] == 0

    resumed = EXPERIMENT.launch(show=False, resume=run.folder.checkpoints / "step-000003")
    assert resumed.metrics["loss"].tolist() == pytest.approx(losses(here)[3:], abs=1e-5)
    files = lab.Results({"two": run, "one": resumed}).export("out")
    assert all(file.stat().st_size > 200 for file in files)
    assert sorted(json.loads(Path("out/arms.json").read_text(encoding="utf-8"))) == ["one", "two"]


def test_callables_of_the_caller_travel(tmp_path: Path) -> None:
    secret = 7

    def records() -> list[dict[str, str]]:
        return [{"prompt": f"say {secret + n} ", "completion": str(n)} for n in range(20)]

    def halve(logits: object, labels: object) -> object:
        import torch.nn.functional as F  # noqa: N812

        return F.cross_entropy(logits, labels, reduction="none") / 2

    def note(trainer: object) -> None:
        (trainer.folder.path / f"note-{trainer.step}").write_text(str(secret))

    plain = EXPERIMENT.replace(data=lab.Instructions(records), callbacks=(note,),
                               evaluate=[lab.ExactMatch(score=lambda answer, reference: 1.0, max_new_tokens=2)],
                               training=lab.Training(steps=2, batch_size=2, export=False))
    run = plain.with_("training.loss", halve).launch(show=False)
    assert run.summary["exact_match"] == 1.0
    assert (run.folder.path / "note-2").read_text() == "7"
    reference = run_here(plain, tmp_path / "here")
    assert run.metrics["loss"].iloc[0] == pytest.approx(losses(reference)[0] / 2, abs=1e-6)
