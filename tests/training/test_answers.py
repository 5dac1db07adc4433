"""A model in training answers between two steps, and trains on as if nobody had asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

import collie_lab as lab
from collie_lab.asks import Asks
from collie_lab.data import Tokenizer, question_tokens, read_documents
from collie_lab.data.prepare import tokenize
from collie_lab.folder import RunFolder
from collie_lab.training import answers

RECORDS = [{"instruction": f"Say {number}.", "input": "", "output": f"It is {number}."} for number in range(40)]


@pytest.fixture(scope="module")
def pool() -> Iterator[lab.Pool]:
    with lab.Pool(2) as made:
        yield made


def waits_for_questions(trainer: Any) -> None:
    """After the third step nothing goes on until there are as many questions as the file says."""
    import time

    wanted = int((trainer.folder.path / "questions").read_text()) if (trainer.folder.path / "questions").exists() else 0
    while trainer.step == 3 and len(list((trainer.folder.path / "asks").glob("*.json"))) < wanted:
        time.sleep(0.01)


def experiment(parallel: lab.Parallel, lr: float = 1e-12) -> lab.Experiment:
    return lab.Experiment(
        model=lab.Model("llama-tiny", init="random"), data=lab.Instructions(RECORDS, holdout=0.0), parallel=parallel,
        optimizer=lab.AdamW(lr=lr, in_backward=parallel.pp == 1), training=lab.Training(steps=6, batch_size=4),
        callbacks=(waits_for_questions,))


@pytest.mark.parametrize("parallel", [
    lab.Parallel(dp=2), lab.Parallel(dp=2, zero=3), lab.Parallel(tp=2, sequence_parallel=True), lab.Parallel(pp=2),
], ids=["dp", "zero", "tp", "pp"])
def test_the_answer_is_that_of_the_model_alone(pool: lab.Pool, tmp_path: Path, parallel: lab.Parallel) -> None:
    """The learning rate is next to nothing, so that the exported model is still the one that was asked."""
    run = experiment(parallel).launch(pool=pool, folder=tmp_path, wait=False, show=False)
    (run.folder.path / "questions").write_text("1")
    pieces: list[str] = []
    answer = run.ask("Say 7.", max_new_tokens=12, on_text=pieces.append, timeout=120)
    assert run.wait(timeout=120) == "ok"
    tokenizer = Tokenizer(run.folder.path / "tokenizer")
    prompt = tokenizer.prefix + tokenizer.encode(["### Instruction:\nSay 7.\n\n### Response:\n"])[0]
    model = AutoModelForCausalLM.from_pretrained(run.model_path)
    output = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_id,
                            pad_token_id=tokenizer.pad_id)
    assert answer == tokenizer.decode(output[0, len(prompt):].tolist())
    assert "".join(pieces) == answer
    assert len(pieces) > 1
    assert 1 <= answer.step <= 6


def test_training_goes_on_as_if_nobody_had_asked(pool: lab.Pool, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """Dropout draws what it would have drawn, though answers are drawn in between."""
    trained = experiment(lab.Parallel(dp=2), lr=1e-2).replace(
        adapter=lab.LoRA(r=2, dropout=0.2), optimizer=lab.AdamW(lr=1e-2))
    quiet = trained.launch(pool=pool, folder=tmp_path, show=False)
    run = trained.launch(pool=pool, folder=tmp_path, wait=False, show=False)
    (run.folder.path / "questions").write_text("2")
    first = run.ask("Say 7.", max_new_tokens=8, temperature=1.0, timeout=120)
    second = run.ask("Say 7.", max_new_tokens=8, temperature=1.0, timeout=120)
    assert capsys.readouterr().out == f"{first}\n{second}\n"
    assert run.wait(timeout=120) == "ok"
    assert run.metrics["loss"].tolist() == quiet.metrics["loss"].tolist()
    with pytest.raises(RuntimeError, match="has ended"):
        run.ask("And now?")


def test_a_question_that_cannot_be_answered_loses_nothing(pool: lab.Pool, tmp_path: Path) -> None:
    run = experiment(lab.Parallel(dp=2)).launch(pool=pool, folder=tmp_path, wait=False, show=False)
    (run.folder.path / "questions").write_text("1")
    with pytest.raises(RuntimeError, match="could not answer"):
        run.ask("long " * 1000, max_new_tokens=8, timeout=120)
    assert run.wait(timeout=120) == "ok"
    with pytest.raises(ValueError, match="max_new_tokens"):
        run.ask("Say 7.", max_new_tokens=0)


def test_all_ranks_draw_alike_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rank 0 sees that the first question was answered before it."""
    folder, seeds, sent = RunFolder(tmp_path), list[int](), list[Any]()
    for number in (1, 2):
        Asks(folder).put({"prompt": "Say 7.", "max_new_tokens": 1, "temperature": 1.0})
        if number == 1:
            Asks(folder).answer(number).touch()

    def broadcast(found: list[Any], src: int) -> None:
        if rank == src:
            sent.append(found[0])
        else:
            found[0] = sent.pop(0)

    monkeypatch.setattr(answers.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(answers.dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(answers, "question_tokens", lambda *_: [1])
    monkeypatch.setattr(answers, "generate", lambda *_: seeds.append(torch.initial_seed()))
    model = torch.nn.Linear(1, 1)
    model.config = mock.Mock(**{"get_text_config.return_value.max_position_embeddings": None})
    strategy = mock.Mock(device=torch.device("cpu"), compute=contextlib.nullcontext, whole=contextlib.nullcontext)
    for rank in (0, 1):
        answers.Answers(folder, rank, mock.Mock(), mock.Mock(), seed=0).give(5, model, strategy, lambda: None)
    assert len(seeds) == 2
    assert seeds[0] == seeds[1]


CHAT = [{"messages": [{"role": "user", "content": "Say 7."}, {"role": "assistant", "content": "It is 7."}]}] * 2


@pytest.mark.parametrize(("data", "text"), [
    (lab.Instructions([{"instruction": "Say 7.", "input": "", "output": "It is 7."}] * 2, holdout=0.0), "Say 7."),
    (lab.Instructions([{"prompt": "Say 7.", "completion": "It is 7."}] * 2, holdout=0.0), "Say 7."),
    (lab.Instructions(CHAT, holdout=0.0), "Say 7."),
    (lab.Skills(tasks=("copy",), size=2, test_size=1), None),
], ids=["alpaca", "plain", "chat", "skills"])
def test_a_question_stands_as_the_documents_have_theirs(tmp_path: Path, data: lab.Data, text: str | None) -> None:
    from collie_lab.data import save_tokenizer

    tokenizer = save_tokenizer(lab.Model("llama-tiny", init="random"), tmp_path)
    document = read_documents(data, "train")[0]
    whole = tokenize([document], tokenizer, 512, "error")[0]
    asked = question_tokens(text or document.segments[0][0].removesuffix("\n"), document.style, tokenizer)
    assert asked == whole.tokens[: whole.prompt_lengths[0]].tolist()
