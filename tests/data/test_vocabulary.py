"""Tokenizers made for an experiment: against the `tokenizers` library by hand, and against the tokenizer extended."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from collie_lab import CellError, Experiment, ExtendTokenizer, Instructions, Model, Perplexity, Text, TrainTokenizer
from collie_lab.cells import Data
from collie_lab.data import make_tokenizer, prepare, read_documents
from collie_lab.data.vocabulary import MadeTokenizer
from collie_lab.folder import RunFolder, read_json

STRANGE = "Thère\x00 was 🐶\u2028a 日本 </s> \t\n  dog's 1234<|user|>"
STORIES = Text([f"One day, Lily number {n} went to the zebra park. She was happy." for n in range(40)], holdout=0.25)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "collie_lab" / "tokenizers"


def _trained(folder: Path, data: Data = STORIES, size: int = 300, **fields: object) -> MadeTokenizer:
    cell = TrainTokenizer(vocab_size=size, **fields)
    return make_tokenizer(Model("llama-tiny", init="random", tokenizer=cell), data, size, folder)


def _texts(data: Data, split: str = "train") -> list[str]:
    return [text for document in read_documents(data, split) for text, _ in document.segments]  # type: ignore[arg-type]


def test_a_trained_tokenizer_is_the_librarys_of_the_training_texts(tmp_path: Path) -> None:
    tokenizer, extension, warnings = _trained(tmp_path / "made", special=("<|user|>",))
    byhand = RustTokenizer(models.BPE())
    byhand.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    byhand.train_from_iterator(_texts(STORIES), trainers.BpeTrainer(
        vocab_size=300, min_frequency=2, special_tokens=["<pad>", "<s>", "</s>", "<|user|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    assert json.loads((tmp_path / "made/tokenizer.json").read_text())["model"] == json.loads(byhand.to_str())["model"]
    assert (extension, warnings, tokenizer.vocab_size) == (None, (), 300)
    assert (tokenizer.prefix, tokenizer.eos_id, tokenizer.pad_id) == ([1], 2, 0)
    again = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert again(STRANGE)["input_ids"] == [1, *tokenizer.encode([STRANGE])[0]]
    assert again.convert_tokens_to_ids(["<pad>", "<s>", "</s>", "<|user|>"]) == [0, 1, 2, 3]
    plain = STRANGE.replace("</s>", "").replace("<|user|>", "")
    assert tokenizer.decode(tokenizer.encode([plain])[0]) == plain


def test_training_is_repeatable_and_made_once(tmp_path: Path, cache: Path) -> None:
    first = _trained(tmp_path / "a").tokenizer.fingerprint
    (file,) = cache.iterdir()
    file.unlink()
    assert _trained(tmp_path / "b").tokenizer.fingerprint == first  # trained anew
    other = (_trained(tmp_path / "other", size=290).tokenizer.folder / "tokenizer.json").read_text()
    file.write_text(json.dumps({"tokenizer": other}))
    assert _trained(tmp_path / "c").tokenizer.fingerprint != first  # not trained again
    _trained(tmp_path / "d", STORIES.replace(limit=20))  # other documents
    _trained(tmp_path / "e", size=301)
    assert len(list(cache.iterdir())) == 4


def test_nothing_held_out_is_learned_from(tmp_path: Path) -> None:
    unseen = "qqjj"
    held_out = set(_texts(STORIES, "test"))
    data = STORIES.replace(source=[f"{text} {unseen * 9}" if text in held_out else text for text in STORIES.source])
    assert set(_texts(data)) == set(_texts(STORIES))
    experiment = Experiment(model=Model("llama-tiny", init="random", tokenizer=TrainTokenizer(vocab_size=300)),
                            data=data, evaluate=[Perplexity(data=Text([unseen * 99]))])
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    prepare(experiment, run)
    expected = _trained(tmp_path / "made").tokenizer
    assert (run.path / "tokenizer/tokenizer.json").read_text() == (expected.folder / "tokenizer.json").read_text()


def test_what_the_training_documents_are_too_few_for_is_said(tmp_path: Path) -> None:
    _, _, (warning,) = _trained(tmp_path, Text(["a b", "a b"], holdout=0), 400)
    assert "the training documents give 260 tokens" in warning  # " b" is learned


def test_marks_are_no_text_to_learn_from(tmp_path: Path) -> None:
    records = [{"prompt": "<|user|>hi", "completion": "<|user|>hi"}] * 3
    tokenizer, *_ = _trained(tmp_path, Instructions(records, holdout=0), 280, special=("<|user|>",))
    assert not any("user" in token for token in AutoTokenizer.from_pretrained(tmp_path).get_vocab() if token[0] != "<")
    assert tokenizer.encode(["<|user|>hi"])[0][0] == 3


# --- extension ---------------------------------------------------------------------------------------------------


def _bytelevel(folder: Path) -> Model:
    """A model folder that has nothing but a GPT-2-like tokenizer, with a mark after the learned tokens."""
    _trained(folder, size=280)
    rust = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    rust.add_special_tokens(["<|end|>"])
    rust.save(str(folder / "tokenizer.json"))
    return Model(folder)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_new_tokens_stand_for_neighbours_of_old_ones(kind: str, tmp_path: Path, shared: Path) -> None:
    model = _bytelevel(tmp_path / "old") if kind == "bytes" else Model(shared / "models/stories260k")
    text = (shared / "data/wikitext-2/valid.txt").read_text(encoding="utf-8")[:100_000]
    data = Text([text[start : start + 4000] for start in range(0, len(text), 4000)])
    old = AutoTokenizer.from_pretrained(model.source)
    before = len(old)
    cell = ExtendTokenizer(learn=60, special=("<|user|>",), multiple=16)
    tokenizer, extension, _ = make_tokenizer(model.replace(tokenizer=cell), data, before, tmp_path / "new")
    new = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert extension is not None
    assert (extension.first, extension.rows_before, len(extension.pieces)) == (before, before, 61)
    assert extension.rows == -(-(before + 61) // 16) * 16
    assert new.convert_ids_to_tokens(range(before)) == old.convert_ids_to_tokens(range(before))
    assert new.convert_tokens_to_ids("<|user|>") == before
    for sample in (*_texts(data, "test"), STRANGE.replace("<|user|>", " ")):
        ids = new(sample)["input_ids"]
        assert ids == tokenizer.prefix + tokenizer.encode([sample])[0]
        assert old(sample)["input_ids"] == [piece for token in ids for piece in (
            [token] if token < before else extension.pieces[token - before])]
        assert new.decode(ids) == old.decode(old(sample)["input_ids"])
    assert len(new(text[:9000])["input_ids"]) < 0.9 * len(old(text[:9000])["input_ids"])


def test_the_most_frequent_neighbours_within_a_word_are_merged(tmp_path: Path, shared: Path) -> None:
    source = shared / "models/stories260k"
    text = "xqx xqx xqx, 77 77 77 xqx 77 <0x0A>\n\n\n\n\n"
    old, data = AutoTokenizer.from_pretrained(source), Text([text], holdout=0)
    pairs: Counter[tuple[str, str]] = Counter()
    for word in text.split()[:3]:
        pairs.update(itertools.pairwise(old.tokenize(word)))
    model = Model(source, tokenizer=ExtendTokenizer(learn=9))
    _, extension, (warning,) = make_tokenizer(model, data, 512, tmp_path)
    assert extension is not None
    learned = [old.convert_ids_to_tokens(list(pieces)) for pieces in extension.pieces]
    assert tuple(learned[0]) in pairs
    assert "▁xqx" in ["".join(tokens) for tokens in learned]
    joined = "".join("".join(tokens) for tokens in learned)
    assert "," not in joined  # not with letters
    assert "77" not in joined  # nor two digits
    assert "0x0A" not in joined  # nor bytes
    assert f"give {len(learned)} new tokens, not 9" in warning


def test_tokens_that_are_there_already_are_named(tmp_path: Path) -> None:
    model = _bytelevel(tmp_path / "old").replace(tokenizer=ExtendTokenizer(special=("<s>", "<a>"), rows="mean"))
    _, extension, warnings = make_tokenizer(model, STORIES, 300, tmp_path / "new")
    assert warnings == ("ExtendTokenizer: the model's tokenizer has <s> already",)
    assert extension is not None
    assert (extension.first, extension.pieces, extension.rows) == (281, ((),), 300)  # a row that was for no token


def test_what_cannot_learn_more(tmp_path: Path) -> None:
    model = _bytelevel(tmp_path / "old")
    unigram = RustTokenizer(models.Unigram([("a", -1.0), ("b", -2.0)]))
    unigram.save(str(tmp_path / "old/tokenizer.json"))
    with pytest.raises(CellError, match=r"ExtendTokenizer\.learn: the model's tokenizer is a Unigram"):
        make_tokenizer(model.replace(tokenizer=ExtendTokenizer(learn=1)), STORIES, 2, tmp_path / "new")
    with pytest.raises(CellError, match=r"it has 2 tokens, but the model's vocabulary has 1"):
        make_tokenizer(model.replace(tokenizer=ExtendTokenizer(tokens=("ab",))), STORIES, 1, tmp_path / "new")
    holed = RustTokenizer(models.BPE(vocab={"a": 0, "b": 2}, merges=[]))
    holed.save(str(tmp_path / "old/tokenizer.json"))
    with pytest.raises(CellError, match="have gaps"):
        make_tokenizer(model.replace(tokenizer=ExtendTokenizer(tokens=("c",))), STORIES, 3, tmp_path / "new")


def test_the_index_tells_the_ranks(tmp_path: Path) -> None:
    model = _bytelevel(tmp_path / "old").replace(tokenizer=ExtendTokenizer(learn=3, special=("<a>",)))
    (tmp_path / "old/config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 281}))
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    prepared = prepare(Experiment(model=model, data=STORIES), run)
    assert prepared.extension is not None
    assert prepared.extension.of(read_json(run.path / "data/index.json")["extension"]) == prepared.extension
