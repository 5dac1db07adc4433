"""Which model families train: two steps of a miniature of every causal LM that transformers registers, and its plan.

    python benchmarks/families.py [--json FILE] [--families llama mamba ...]

A miniature is the default configuration with small sizes. Where transformers' own model cannot take them (sizes
that depend on each other in a way of that family), nothing is learned about ours, and the family is counted apart.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _results import keep
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import collie_lab as lab

# What configurations call their sizes.
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads",
                     "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "head_dim", "v_head_dim", "linear_key_head_dim",
                     "linear_value_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "state_size", "mamba_d_state", "rotary_dim",
                     "hidden_size_per_layer_input", "mamba_n_heads"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "bos_token_id", "n_shared_experts"), 1),
    **dict.fromkeys(("num_experts_per_tok", "eos_token_id"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 320),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512), "pad_token_id": 0, "mamba_d_head": 16,
}
# Sizes that a family's configuration lacks until they are given, or that depend on each other.
OWN: dict[str, dict[str, Any]] = {
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 8},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 4},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
                   "linear_num_key_heads": 2},
    "xlstm": {"num_heads": 2},
}
_MOST = 2**27  # parameters: more is no miniature
# Lists with an entry a layer.
BY_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types")


def miniature(family: str, folder: Path) -> None:
    """Write the small configuration of a family."""
    whole = AutoConfig.for_model(family)
    text, default = whole.get_text_config(), vars(whole.get_text_config())
    sizes: dict[str, Any] = {name: size for name, size in SIZES.items() if default.get(name) is not None}
    sizes |= {name: default[name][:2] for name in BY_LAYER if isinstance(default.get(name), list)}
    if "qk_rope_head_dim" in sizes:  # latent attention: a head is what is turned
        sizes["head_dim"] = sizes["qk_rope_head_dim"]
    if getattr(text, "is_decoder", None) is False:  # else it sees the tokens that it is to predict
        sizes["is_decoder"] = True
    sizes |= OWN.get(family, {})
    if text is whole:
        small = AutoConfig.for_model(family, **sizes)
    else:
        for name, size in sizes.items():
            setattr(text, name, size)
        small = whole
    small.save_pretrained(folder)


def own_forward(folder: Path) -> None:
    """Transformers' own model of that configuration takes a few tokens, or raises."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MOST:
        raise ValueError(f"it has {size:,} parameters: other models in it have sizes of their own")
    model = AutoModelForCausalLM.from_config(config)
    model(input_ids=torch.ones(1, 8, dtype=torch.long), use_cache=False)


def try_family(family: str, folder: Path, pool: lab.Pool) -> dict[str, Any]:
    """What became of it."""
    folder.mkdir()
    try:
        miniature(family, folder)
        own_forward(folder)
    except Exception as error:  # whatever a family raises
        return {"end": "no miniature", "reason": _words(error)}
    experiment = lab.Experiment(
        model=lab.Model(folder, init="random", tokenizer="bytes"), data=lab.RandomTokens(length=48, documents=8),
        optimizer=lab.AdamW(lr=1e-3), training=lab.Training(steps=2, batch_size=2, export=False))
    try:
        summary = experiment.launch(folder=folder / "runs", show=False, pool=pool).summary
    except (lab.CellError, lab.RankError) as error:
        return {"end": "refused", "reason": _words(error)}
    row = {"end": "trains", "loss": summary["loss"], "measured": int(summary["peak_bytes"])}
    try:
        planned = experiment.plan().peak_bytes
    except (lab.CellError, lab.PlanError) as error:
        return {**row, "no plan": _words(error)}
    return {**row, "planned": planned, "error": planned / row["measured"] - 1}


def _words(error: Exception) -> str:
    said = str(error).split("\n\n")[0]  # a rank's error, without its traceback
    return f"{type(error).__name__}: {said}".replace("\n", " ")[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--families", nargs="+", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder, lab.Pool(1) as pool, _quiet():
        for family in options.families:
            found[family] = row = try_family(family, Path(folder) / family, pool)
            told = row.get("reason") or (f"planned {100 * row['error']:+.2f}%" if "error" in row else row["no plan"])
            print(f"{family:28s} {row['end']:12s} {told}", flush=True)
    errors = [abs(row["error"]) for row in found.values() if "error" in row]
    print(json.dumps(collections.Counter(row["end"] for row in found.values())),
          f"plans: {len(errors)}, within 0.1% {sum(error < 1e-3 for error in errors)}")
    keep(options.json, "families.py", found)


if __name__ == "__main__":
    main()
