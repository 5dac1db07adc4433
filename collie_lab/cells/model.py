"""The model cell: a hub id, a local folder, or a named shape with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from collie_lab.cells._base import PATH_TEXT, Cell
from collie_lab.cells.tokenizer import NewTokenizer, TrainTokenizer

__all__ = ["SHAPES", "Model"]


def _llama(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int = 32_000,
           context: int = 2048, **more: Any) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocabulary,
            "max_position_embeddings": context, **more}


#: Named shapes. 7b–65b: Touvron et al. 2023 (arXiv 2302.13971), table 2; 1b: TinyLlama (Zhang et al. 2024,
#: arXiv 2401.02385). The smaller ones are ours, for CPUs; their 320-piece vocabulary holds the byte tokenizer.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-tiny": _llama(64, 172, 2, 4, vocabulary=320, context=512, tie_word_embeddings=True),
    "llama-1m": _llama(128, 344, 5, 8, vocabulary=320, context=512, tie_word_embeddings=True),
    "llama-5m": _llama(256, 688, 6, 8, vocabulary=320, context=1024, tie_word_embeddings=True),
    "llama-1b": _llama(2048, 5632, 22, 32, num_key_value_heads=4),
    "llama-7b": _llama(4096, 11_008, 32, 32),
    "llama-13b": _llama(5120, 13_824, 40, 40),
    "llama-30b": _llama(6656, 17_920, 60, 52),
    "llama-65b": _llama(8192, 22_016, 80, 64),
}


class Model(Cell):
    """A causal language model of transformers.

    `Model("meta-llama/Llama-3.2-1B")` loads a hub id, `Model("path/to/folder")` a local transformers
    folder, `Model("llama-1m", init="random")` builds a shape of `SHAPES` (or the configuration of a
    hub id or folder) with random weights.
    """

    source: str = Field(min_length=1)
    init: Literal["pretrained", "random"] = "pretrained"
    """`random`: fresh weights, drawn from `Training.seed`."""
    tokenizer: Annotated[str | NewTokenizer | None, PATH_TEXT] = None
    """Hub id or folder; `bytes` for the built-in byte tokenizer; `TrainTokenizer(...)` or `ExtendTokenizer(...)` makes
    one. Default: the model's own, `bytes` for a shape."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of the model's configuration to override, e.g. `{"num_hidden_layers": 2}` with random weights."""
    revision: str | None = None
    trust_remote_code: bool = False

    def __init__(self, source: str | Path, **fields: Any) -> None:
        super().__init__(source=str(source) if isinstance(source, Path) else source, **fields)

    @property
    def is_shape(self) -> bool:
        """Whether `source` is one of the named shapes (and no folder of that name exists)."""
        return self.source in SHAPES and not Path(self.source).exists()

    @property
    def location(self) -> str:
        """`source` as transformers takes it, to which a `~` is a folder's name."""
        return str(Path(self.source).expanduser()) if self.source.startswith("~") else self.source

    @property
    def overrides(self) -> dict[str, Any]:
        """`config`, with what a tokenizer that is to be trained says of the vocabulary."""
        return {**self.config, **(self.tokenizer.config if isinstance(self.tokenizer, TrainTokenizer) else {})}
