"""Tokenizers made for an experiment, before it starts: trained from nothing, or a model's own with new tokens.

Each is kept in `~/.cache/collie_lab` (`XDG_CACHE_HOME`) under a hash of the texts and settings that it comes from, so
that variants of an experiment share it.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import tokenizers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from collie_lab.cells import CellError, Data, ExtendTokenizer, Model, Problem, TrainTokenizer
from collie_lab.data._merges import continue_merges
from collie_lab.data.hub import model_config, vocabulary_size
from collie_lab.data.records import read_documents
from collie_lab.data.tokenizer import Tokenizer, save_own, save_tokenizer
from collie_lab.folder import read_json, write_json
from collie_lab.machine import user_cache

__all__ = ["Extension", "MadeTokenizer", "expected_extension", "make_tokenizer"]

Texts = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Extension:
    """The rows that embedding and head get for new tokens."""

    first: int
    """The id of the first new token."""
    pieces: tuple[tuple[int, ...], ...]
    """Of every new token the old ones whose rows' mean it begins with; none: the mean of all."""
    rows_before: int
    """Rows of the checkpoint, some of which may be for no token."""
    rows: int
    """Rows of the model."""

    @classmethod
    def of(cls, mapping: Mapping[str, Any] | None) -> Self | None:
        """What JSON has made of one."""
        if mapping is None:
            return None
        return cls(**{**mapping, "pieces": tuple(map(tuple, mapping["pieces"]))})


class MadeTokenizer(NamedTuple):
    """A tokenizer in its folder, what it asks of the model, and what there is to say of it."""

    tokenizer: Tokenizer
    extension: Extension | None = None
    warnings: tuple[str, ...] = ()


def make_tokenizer(model: Model, data: Data, vocabulary: int | None, target: Path) -> MadeTokenizer:
    """Put the tokenizer that the model cell names, or asks to be made of the training documents, into `target`.

    `vocabulary` counts the rows of the model as its configuration has them.

    Raises:
        CellError: there is no tokenizer to begin with, or it cannot be extended so.
    """
    match model.tokenizer:
        case TrainTokenizer() as cell:
            return _trained(cell, data, target)
        case ExtendTokenizer() as cell:
            return _extended(cell, save_tokenizer(model.replace(tokenizer=None), target), data, vocabulary)
    return MadeTokenizer(save_tokenizer(model, target))


def _trained(cell: TrainTokenizer, data: Data, target: Path) -> MadeTokenizer:
    texts = _texts_of(data)
    target.mkdir(parents=True, exist_ok=True)
    made = _remembered(cell, "", texts, lambda: {"tokenizer": _train(cell, texts)})
    save_own(RustTokenizer.from_str(made["tokenizer"]), target)
    tokenizer = Tokenizer(target)
    few = f"TrainTokenizer: the training documents give {tokenizer.vocab_size:,} tokens; the other rows of the " \
          f"{cell.vocab_size:,} are never used"
    return MadeTokenizer(tokenizer, warnings=(few,) if tokenizer.vocab_size < cell.vocab_size else ())


def _extended(cell: ExtendTokenizer, old: Tokenizer, data: Data, vocabulary: int | None) -> MadeTokenizer:
    """`old` is changed in its folder."""
    texts = _texts_of(data, old) if cell.learn else lambda: iter(())
    made = _remembered(cell, old.fingerprint, texts, lambda: _extend(cell, old, texts))
    (old.folder / "tokenizer.json").write_text(made["tokenizer"], encoding="utf-8")
    first, new = made["first"], made["pieces"]
    before = vocabulary or first
    if first > before:
        raise CellError([Problem("Model", "tokenizer", f"it has {first:,} tokens, but the model's vocabulary has "
                                 f"{before:,}", "extend a model that has a row for each")])
    pieces = tuple(tuple(ids) if cell.rows == "pieces" else () for ids in new)
    extension = Extension(first, pieces, before, _rows(cell, max(before, first + len(new))))
    return MadeTokenizer(Tokenizer(old.folder), extension, tuple(made["warnings"]))


def expected_extension(model: Model) -> Extension | None:
    """What an `ExtendTokenizer` will ask of the model, for its size: known before any document is read, but for tokens
    to learn that the documents will not give. None without one.

    Raises:
        CellError: there is no tokenizer to begin with.
    """
    cell = model.tokenizer
    if not isinstance(cell, ExtendTokenizer):
        return None
    with tempfile.TemporaryDirectory() as folder:
        old = RustTokenizer.from_file(str(save_tokenizer(model.replace(tokenizer=None), Path(folder)).folder
                                          / "tokenizer.json"))
    before = old.get_vocab(with_added_tokens=True)
    new = cell.learn + sum(token not in before for token in cell.tokens + cell.special)
    had = vocabulary_size(model_config(model)) or len(before)
    return Extension(len(before), ((),) * new, had, _rows(cell, max(had, len(before) + new)))


def _rows(cell: ExtendTokenizer, least: int) -> int:
    return -(-least // cell.multiple) * cell.multiple


def _texts_of(data: Data, tokenizer: Tokenizer | None = None) -> Texts:
    """The texts of the training documents, as often as they are wanted, with the chat template of `tokenizer`."""
    chat = tokenizer.render_chat if tokenizer is not None and tokenizer.chat_template else None
    documents = read_documents(data, "train", chat)
    return lambda: (text for document in documents for text, _ in document.segments)


def _remembered(cell: TrainTokenizer | ExtendTokenizer, base: str, texts: Texts, make: Callable[[], Any]) -> Any:
    """What `make` made of the same cell, base tokenizer and texts before, else makes now."""
    digest = hashlib.sha256(repr((tokenizers.__version__, cell, base)).encode())
    for text in texts():
        digest.update(len(text).to_bytes(8, "big") + text.encode("utf-8", "surrogatepass"))
    cache = user_cache("tokenizers")
    file = cache / f"{digest.hexdigest()[:32]}.json"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(file, make())
    return read_json(file)


def _train(cell: TrainTokenizer, texts: Texts) -> str:
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=cell.vocab_size, min_frequency=cell.min_frequency, show_progress=False,
        special_tokens=[*cell.MARKS, *cell.special], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    marks = re.compile("|".join(map(re.escape, cell.MARKS + cell.special)))
    tokenizer.train_from_iterator((part for text in _counted(texts()) for part in marks.split(text)), trainer)
    return str(tokenizer.to_str())


def _extend(cell: ExtendTokenizer, old: Tokenizer, texts: Texts) -> dict[str, Any]:
    rust = RustTokenizer.from_file(str(old.folder / "tokenizer.json"))
    before = rust.get_vocab(with_added_tokens=True)
    if len(before) != max(before.values()) + 1:
        raise CellError([Problem("ExtendTokenizer", "", "the ids of the model's tokenizer have gaps: it cannot be "
                                 "extended", "leave the vocabulary as it is")])
    fresh = [token for token in cell.tokens + cell.special if token not in before]
    pieces = [old.encode([token])[0] for token in fresh]
    rust.add_tokens([token for token in fresh if token in cell.tokens])
    rust.add_special_tokens([token for token in fresh if token in cell.special])
    known = [token for token in cell.tokens + cell.special if token in before]
    warnings = [f"ExtendTokenizer: the model's tokenizer has {', '.join(known)} already"] if known else []
    if cell.learn:
        rust, learned = continue_merges(rust, cell.learn, cell.min_frequency, _counted(texts()))
        pieces += learned
        if len(learned) < cell.learn:
            warnings.append(f"ExtendTokenizer: the training documents give {len(learned):,} new tokens, not "
                            f"{cell.learn:,}")
    return {"tokenizer": rust.to_str(), "first": len(before), "pieces": pieces, "warnings": warnings}


def _counted(texts: Iterable[str]) -> Iterable[str]:
    """The texts, with a bar of how many there have been where it takes long."""
    from tqdm.auto import tqdm

    counted: Iterable[str] = tqdm(texts, desc="tokenizer", unit=" texts", delay=3, leave=False)
    return counted
