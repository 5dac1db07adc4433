"""An adapter merged into its model: one transformers folder that needs peft no longer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from collie_lab.cells import CellError, Problem

__all__ = ["merge"]

_WITHOUT_WEIGHTS = {"PROMPT_TUNING": "Prompt", "P_TUNING": "PTuning", "PREFIX_TUNING": "Prefix"}


def merge(adapter: str | Path, target: str | Path, base: str | Path | None = None) -> Path:
    """Write the model with the adapter in its weights to the folder `target`, with the same logits; return it.

    It is a model like any other: `Model(target)` takes the next adapter, so that adapters stack. The model is held
    whole in the host's memory, in the type of its files.

    Args:
        adapter: a peft folder, `run.model_path`, say.
        target: a folder that does not exist yet.
        base: the adapted model, a folder or hub id. Default: the one that the adapter names.

    Raises:
        CellError: no adapter there, one without weights to merge (virtual tokens), no base, or `target` exists.
    """
    folder, target = Path(adapter).expanduser(), Path(target).expanduser()
    config = _config(folder)
    if name := _WITHOUT_WEIGHTS.get(config["peft_type"]):
        raise _error("adapter", f"{name} changes no weights: its tokens stand before every document",
                     "serve it with peft.PeftModel.from_pretrained")
    revision = None if base else config.get("revision")
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise _error("base", "the adapter names no model: the one it was trained on had random weights",
                     "merge(..., base=...)")
    if target.exists():
        raise _error("target", f"{target} exists", "another name; nothing is overwritten")

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(base, revision=revision or "main")
    model: Any = PeftModel.from_pretrained(whole, folder)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.merge_and_unload().save_pretrained(partial)
    for file in folder.iterdir():
        if file.is_file() and not file.name.startswith("adapter_") and file.name != "README.md":
            shutil.copyfile(file, partial / file.name)  # the tokenizer
    partial.rename(target)
    return target


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise _error("adapter", f"{folder} is no peft folder: it has no adapter_config.json",
                     "run.model_path of a run with an adapter")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def _error(field: str, message: str, remedy: str) -> CellError:
    return CellError([Problem("merge", field, message, remedy)])
