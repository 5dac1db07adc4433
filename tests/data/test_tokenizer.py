"""Tokenizers and tokenization, against transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoTokenizer

from collie_lab import CellError, Experiment, Instructions, Model, Text
from collie_lab.data import Documents, Tokenizer, prepare, read_documents, save_tokenizer
from collie_lab.data.prepare import tokenize
from collie_lab.folder import RunFolder

TEXT = "Once upon a time,\n thère was 🐶 <b>"


def test_bytes_go_there_and_back(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(Model("llama-tiny", init="random"), tmp_path)
    (ids,) = tokenizer.encode([TEXT])
    assert len(ids) == len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.vocab_size, tokenizer.prefix, tokenizer.eos_id) == (259, [256], 257)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"] == [256, *ids]


def test_a_models_own_tokenizer(shared: Path, tmp_path: Path) -> None:
    source = shared / "models/stories260k"
    tokenizer = save_tokenizer(Model(str(source)), tmp_path)
    expected = AutoTokenizer.from_pretrained(source)
    assert tokenizer.prefix + tokenizer.encode([TEXT])[0] == expected(TEXT)["input_ids"]
    assert (tokenizer.prefix, tokenizer.eos_id) == ([1], 2)


def test_loss_is_on_responses_and_the_end_mark(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(Model("llama-tiny"), tmp_path)
    cell = Instructions([{"prompt": "ab", "completion": "cd"}], holdout=0)
    documents, _ = tokenize(read_documents(cell, "train"), tokenizer, 32, "truncate")
    text = tokenizer.encode(["abcd"])[0]
    assert documents.tokens.tolist() == [256, *text, 257]
    assert documents.learned.tolist() == [False, False, False, True, True, True]
    assert (documents.prompt_lengths.tolist(), documents.answers) == ([3], ("cd",))
    documents.save(tmp_path / "saved")
    assert _same(documents, tmp_path / "saved")


def _same(documents: Documents, folder: Path) -> bool:

    return Documents.load(folder).fingerprint == documents.fingerprint


@pytest.mark.parametrize(("overlong", "lengths"), [("truncate", [8, 4]), ("drop", [4]), ("split", [8, 6, 4])])
def test_documents_that_are_too_long(overlong: str, lengths: list[int], tmp_path: Path) -> None:
    tokenizer = save_tokenizer(Model("llama-tiny"), tmp_path)
    records = read_documents(Text(["x" * 11, "yy"], holdout=0), "train")
    documents, found = tokenize(records, tokenizer, 8, overlong)
    assert documents.lengths.tolist() == lengths
    assert found == 1


@pytest.mark.parametrize("overlong", ["split", "truncate"])
@pytest.mark.parametrize("prefixed", [True, False])
def test_the_bytes_of_what_is_predicted(overlong: str, prefixed: bool, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(Model("llama-tiny"), tmp_path)
    if not prefixed:
        rust = RustTokenizer.from_file(str(tmp_path / "tokenizer.json"))
        rust.post_processor = processors.Sequence([])  # type: ignore[assignment]
        rust.save(str(tmp_path / "tokenizer.json"))
        tokenizer = Tokenizer(tmp_path)
    assert tokenizer.prefix == ([256] if prefixed else [])
    texts = ["Once upon a time,", "a 🐶", "ü", "日本 は"]
    documents, _ = tokenize(read_documents(Text(texts, holdout=0), "all"), tokenizer, 8, overlong, measured=True)
    pairs = zip(documents.offsets, documents.offsets[1:], strict=False)
    windows = [documents.tokens[begin + 1 : end] for begin, end in pairs]  # a token of this tokenizer is a byte
    letters = [sum(token < 256 for token in window) for window in windows]
    if overlong == "split" and prefixed:
        assert documents.text_bytes.sum() == sum(letters) == len("".join(texts).encode())
    # A character that is cut in two counts where it begins.
    assert abs(documents.text_bytes - letters).max() <= 3
    assert documents.text_bytes[0] == letters[0]


def test_only_answers_have_bytes_that_count(tmp_path: Path, shared: Path) -> None:
    cell = Instructions([{"prompt": "ab", "completion": "thère 🐶 ☃"}, {"prompt": "c", "completion": ""}], holdout=0)
    for model in (Model("llama-tiny"), Model(shared / "models/stories260k"), Model(shared / "models/babyllama-1m")):
        tokenizer = save_tokenizer(model, tmp_path / Path(model.source).name)  # the last knows no snowman
        documents, _ = tokenize(read_documents(cell, "all"), tokenizer, 64, "truncate", measured=True)
        assert documents.text_bytes.tolist() == [len("thère 🐶 ☃".encode()), 0]


@pytest.mark.parametrize("kind", ["words", "pieces", "end mark"])
def test_what_the_tokenizer_lacks_is_counted(kind: str, tmp_path: Path) -> None:
    rust = RustTokenizer(models.Unigram([("<s>", 0.0), ("<unk>", 0.0), ("a", -1.0)], 1, False) if kind == "pieces" else
                         models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    rust.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<unk>"}' if kind == "end mark" else "{}")
    experiment = Experiment(model=Model("llama-tiny", init="random", tokenizer=str(tmp_path)),
                            data=Text(["a a ☃ a", "a a a ☃"], holdout=0))
    prepare(experiment, run := RunFolder.create(tmp_path, "run"))
    assert run.read("data/index.json")["warnings"] == ([] if kind == "end mark" else [
        "Text, train: 2 of 8 tokens (25.00%) are the tokenizer's mark for what it lacks: another one may know that "
        "text"])


def test_the_chat_template_of_the_tokenizer(tmp_path: Path) -> None:
    save_tokenizer(Model("llama-tiny"), tmp_path)
    template = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
                "{% if add_generation_prompt %}<assistant>{% endif %}")
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = Tokenizer(tmp_path)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    cell = Instructions([{"messages": messages}], holdout=0)
    (document,) = read_documents(cell, "train", tokenizer.render_chat)
    assert document.segments == (("<user>hi</s><assistant>", False), ("yo</s>", True))
    documents, _ = tokenize([document], tokenizer, 64, "truncate")
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=True)["input_ids"]
    assert documents.tokens.tolist() == expected  # the template's own marks, none added
    assert tokenizer.decode(documents.tokens[documents.learned].tolist()) == "yo"


@pytest.mark.parametrize(("template", "message"), [
    ("{% for m in messages %}{{ m.content }}", "the chat template: Unexpected end of template"),
    ("{{ raise_exception('roles must alternate') }}", "the chat template: roles must alternate"),
    ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "the chat template renders a reply otherwise"),
    ("{{ messages[0].content.text.more }}", "the chat template: "),
    ("Hello.", "the chat template leaves the reply out"),
])
def test_templates_that_do_not_do(template: str, message: str, tmp_path: Path) -> None:
    save_tokenizer(Model("llama-tiny"), tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(CellError, match=rf"Instructions.source: the source: record 0 cannot be read \({message}"):
        read_documents(Instructions([{"messages": turns}], holdout=0), "train", Tokenizer(tmp_path).render_chat)
    for tokenizer, found in ((str(tmp_path), [f"the source: record 0 cannot be read ({message}"]), ("bytes", [])):
        report = Experiment(model=Model("llama-tiny", init="random", tokenizer=tokenizer),
                            data=Instructions([{"messages": turns}])).check()
        assert [problem.message[: len(text)] for problem, text in zip(report.errors, found, strict=True)] == found


def test_nothing_to_learn_that_is_not_too_long(tmp_path: Path) -> None:
    save_tokenizer(Model("llama-tiny"), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")  # no end mark
    experiment = Experiment(model=Model("llama-tiny", init="random", tokenizer=str(tmp_path)),
                            data=Instructions([{"prompt": "a", "completion": ""}], holdout=0))
    with pytest.raises(CellError, match="no document has anything to learn, though none is too long → give it"):
        prepare(experiment, RunFolder.create(tmp_path, "run"))


def test_a_template_that_rewrites_what_was_said(tmp_path: Path) -> None:
    """As those of reasoning models, which drop earlier thoughts: only the last reply is learned, and it is counted."""
    save_tokenizer(Model("llama-tiny"), tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}", encoding="utf-8")
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    cell, tokenizer = Instructions([{"messages": turns}, {"messages": turns[:2]}], holdout=0), Tokenizer(tmp_path)
    items = read_documents(cell, "train", tokenizer.render_chat)
    assert [item.segments for item in items] == [
        (("<user>a<assistant>b<user>c<assistant>", False), ("<think></think>d", True)),
        (("<user>a<assistant>", False), ("<think></think>b", True))]
    assert [item.partial for item in items] == [True, False]
    run = RunFolder.create(tmp_path, "run")
    prepare(Experiment(model=Model("llama-tiny", init="random", tokenizer=str(tmp_path)), data=cell), run)
    assert run.read("data/index.json")["warnings"] == [
        "Instructions, train: of 1 of 2 chats only the last reply is learned: the tokenizer's template rewrites the "
        "earlier ones"]


def test_a_chat_is_tokenized_whole_and_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token of the text that the template renders, its mark as the segment in which it begins."""
    from collie_lab.data import tokenize as blocks

    monkeypatch.setattr(blocks, "_DOCUMENTS", 3)
    save_tokenizer(Model("llama-tiny"), tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}", encoding="utf-8")
    tokenizer = Tokenizer(tmp_path)
    turns = [[{"role": "user", "content": "ü" * number}, {"role": "assistant", "content": f"{number} 🐶"}] * 2
             for number in range(8)]
    records = [{"messages": messages} for messages in turns]
    items = read_documents(Instructions(records, holdout=0), "train", tokenizer.render_chat)
    documents, _ = tokenize(items, tokenizer, 512, "truncate")
    for index, item in enumerate(items):
        begin, end = documents.offsets[index : index + 2]
        # A byte-level tokenizer: a segment's tokens are its bytes, and `</s>` is one.
        expected = [flag for text, flag in item.segments for _ in tokenizer.encode([text])[0]]
        assert documents.learned[begin:end].tolist() == [False, *expected[1:]]
        assert documents.answers[index] == f"{index} 🐶"
