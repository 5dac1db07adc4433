"""Tokenizers without torch: the `tokenizers` library on a folder, so that the kernel and ranks start fast."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from collie_lab.cells import CellError, Model, Problem
from collie_lab.data.hub import fetch

__all__ = ["Tokenizer", "save_own", "save_tokenizer"]

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Tokenizer:
    """A tokenizer read from a folder with a `tokenizer.json`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._rust = RustTokenizer.from_file(str(folder / "tokenizer.json"))
        self._rust.no_padding()
        self._rust.no_truncation()
        config = {name: value for file in ("special_tokens_map.json", "tokenizer_config.json")
                  if (folder / file).is_file()
                  for name, value in json.loads((folder / file).read_text(encoding="utf-8")).items()}
        self.eos_id = self._special(config.get("eos_token"))
        self.pad_id = self._special(config.get("pad_token"))
        self.chat_template: Any = config.get("chat_template") or (folder / "chat_template.jinja").is_file()
        # What the tokenizer itself puts before a text: a beginning-of-sequence token, or nothing.
        bare = self._rust.encode("a", add_special_tokens=False).ids
        marked = self._rust.encode("a").ids
        self.prefix = marked[: marked.index(bare[0])] if bare else []
        self.unk_id = self._unknown()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return 1 + max(self._rust.get_vocab(with_added_tokens=True).values(), default=-1)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that the folder holds."""
        digest = hashlib.sha256()
        for file in sorted(self.folder.iterdir()):
            digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens at either end; in parallel over the cores."""
        return [encoding.ids for encoding in self._rust.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_measured(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """Token ids of each text, as `encode` gives them, and the UTF-8 bytes that each token stands for."""
        encodings = self._rust.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, _sizes(text, encoding.offsets)) for text, encoding in zip(texts, encodings, strict=True)]

    def encode_marked(self, documents: Sequence[Sequence[tuple[str, bool]]]
                      ) -> list[tuple[list[int], NDArray[np.bool_], list[int]]]:
        """Token ids of the joined segments of each document, for each whether it begins in a segment with the flag, and
        its UTF-8 bytes, none for special tokens; in parallel over the cores."""
        texts = ["".join(text for text, _ in segments) for segments in documents]
        encodings = self._rust.encode_batch(texts, add_special_tokens=False)
        special = {id_ for id_, token in self._rust.get_added_tokens_decoder().items() if token.special}
        return [(encoding.ids, _flags(encoding.offsets, segments), [
                    0 if id_ in special else size
                    for id_, size in zip(encoding.ids, _sizes(text, encoding.offsets), strict=True)])
                for text, encoding, segments in zip(texts, encodings, documents, strict=True)]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, special tokens left out."""
        return str(self._rust.decode(ids, skip_special_tokens=True))

    def pieces(self, ids: list[int]) -> list[tuple[str, bool]]:
        """The text that each token adds, and whether it is a special token. A character of several tokens is that of
        its last one."""
        special = {id_: token.content for id_, token in self._rust.get_added_tokens_decoder().items() if token.special}
        stream, pieces = decoders.DecodeStream(skip_special_tokens=False), []
        for id_ in ids:
            if id_ in special:
                pieces.append((special[id_], True))
                stream = decoders.DecodeStream(skip_special_tokens=False)
            else:
                pieces.append((stream.step(self._rust, id_) or "", False))
        return pieces

    def render_chat(self, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
        """Messages as segments by the tokenizer's own chat template; the assistant's are to be learned.

        Where the template rewrites earlier messages (as those that drop earlier reasoning do), only the last one is:
        what a model says later then follows on another text than what it said before.

        Raises:
            ValueError: the template is none, refuses the conversation, or a reply does not begin where the template
                asks for it.
        """
        from jinja2 import TemplateError

        try:
            return self._render_chat(messages)
        except TemplateError as error:
            raise ValueError(f"the chat template: {error}") from None

    @cached_property
    def _chat(self) -> Any:
        # Rendering needs transformers (Jinja with its extensions), and that imports torch: only on demand.
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def _render_chat(self, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
        turns = [self._turn(messages[: index + 1]) for index, message in enumerate(messages)
                 if message["role"] == "assistant"]
        before = ["", *(whole for _, whole in turns[:-1])]
        if not all(prompt.startswith(done) for (prompt, _), done in zip(turns, before, strict=True)):
            turns, before = turns[-1:], [""]
        return [segment for (prompt, whole), done in zip(turns, before, strict=True)
                for segment in ((prompt[len(done):], False), (whole[len(prompt):], True))]

    def _turn(self, messages: list[dict[str, str]]) -> tuple[str, str]:
        """The text up to where the assistant's last message begins, and all of it."""
        prompt = self._chat.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = self._chat.apply_chat_template(messages, tokenize=False)
        if not whole.startswith(prompt):
            raise ValueError("the chat template renders a reply otherwise than it asks for one")
        if messages[-1]["content"].strip() and not whole[len(prompt):].strip():
            raise ValueError("the chat template leaves the reply out")
        return prompt, whole

    def _unknown(self) -> int | None:
        """The token for what the vocabulary lacks. None where there is none, or it is a mark too (as GPT-2's is)."""
        model: Any = self._rust.model
        if isinstance(model, models.Unigram):  # has no attribute for it
            found = json.loads((self.folder / "tokenizer.json").read_text(encoding="utf-8"))["model"].get("unk_id")
        else:
            found = self._special(getattr(model, "unk_token", None))
        return None if found in (self.eos_id, self.pad_id, *self.prefix) else found

    def _special(self, token: Any) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        return None if content is None else self._rust.token_to_id(content)


def _sizes(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """UTF-8 bytes of a text by the tokens at `offsets`, in characters; together they are the bytes of the text.

    A character counts where the first of its tokens is, what no token stands for with the one that follows it.
    """
    if not offsets:
        return []
    until = np.zeros(len(text) + 1, dtype=np.int64)
    code = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    np.cumsum(1 + (code > 0x7F) + (code > 0x7FF) + (code > 0xFFFF), out=until[1:])
    ends = np.maximum.accumulate(until[[end for _, end in offsets]])
    ends[-1] = until[-1]
    return list(np.diff(ends, prepend=0).tolist())


def _flags(offsets: list[tuple[int, int]], segments: Sequence[tuple[str, bool]]) -> NDArray[np.bool_]:
    """The flag of the segment in which each token begins."""
    ends = np.cumsum([len(text) for text, _ in segments])
    begins = np.array(offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
    inside = np.minimum(np.searchsorted(ends, begins, side="right"), len(ends) - 1)
    flags: NDArray[np.bool_] = np.array([flag for _, flag in segments], dtype=np.bool_)[inside]
    return flags


def save_tokenizer(model: Model, target: Path) -> Tokenizer:
    """Put the model's tokenizer into the folder `target` and return it.

    Raises:
        CellError: the model has no tokenizer, or it cannot be fetched.
    """
    assert model.tokenizer is None or isinstance(model.tokenizer, str)  # others: `vocabulary.make_tokenizer`
    source = model.tokenizer or ("bytes" if model.is_shape else model.source)
    target.mkdir(parents=True, exist_ok=True)
    if source == "bytes":
        _save_bytes(target)
        return Tokenizer(target)
    named = model.replace(source=source)
    folder = fetch(named, _FILES, field="tokenizer")
    if (folder / "tokenizer.json").is_file():
        for name in _FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
        if not (target / "tokenizer_config.json").is_file():
            (target / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    else:
        _convert(named, target)
    return Tokenizer(target)


def _convert(model: Model, target: Path) -> None:
    """A tokenizer of another format (SentencePiece, a Python one), converted by transformers."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.location, revision=model.revision,
                                                  trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise CellError([Problem("Model", "tokenizer", f"{model.source} has no tokenizer that loads: {error}",
                                 "name one: Model(..., tokenizer=...), `bytes` for the built-in one")]) from None
    tokenizer.save_pretrained(target)


def _save_bytes(target: Path) -> None:
    """The built-in tokenizer: one token a byte, then <s>, </s> and <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = RustTokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    save_own(tokenizer, target)


def save_own(tokenizer: RustTokenizer, target: Path) -> None:
    """Write a tokenizer that knows <s>, </s> and <pad>; it puts <s> before every text."""
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
              "pad_token": "<pad>"}
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
