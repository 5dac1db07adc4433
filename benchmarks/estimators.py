"""What others say of the memory of a step, beside a plan and the closed form.

    python benchmarks/estimators.py [--json experiments/results/estimators.json]

Three groups of cases: what CPU ranks and an H200 have measured (`plans_cpu.json`, `gpu_h200_memory_*.json`,
`gpu_h200_training_65b.json` among the results), and LLaMA-7B and 65B on 1 to 1,024 ranks, against the plan: nobody has
run those. The others: accelerate's `estimate-memory`, the estimators of DeepSpeed's ZeRO-2 and ZeRO-3, and
llm-analysis, which wants an older transformers and so is installed apart:

    pip install --no-deps --target FOLDER llm-analysis fire termcolor
    PYTHONPATH=FOLDER python benchmarks/estimators.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _results import RESULTS, h200_memory, keep
from gpu_memory import METHODS
from plans import CASES

import collie_lab as lab
from collie_lab.cells import RuleCell
from collie_lab.data.hub import model_config
from collie_lab.planning.plan import longest_document

#: Of `plans.CASES`: those that a formula of the closed form is for.
MEASURED = ("AdamW", "two micro-batches", "packing", "recompute", "autocast", "bf16 weights, master", "SGD, momentum",
            "Lion", "Adan", "Sophia", "LOMO", "AdaLomo", "LoRA", "LoRA, recompute", "dp 2", "ZeRO-2", "ZeRO-3",
            "ZeRO-3, autocast", "ZeRO-3 on 4", "tp 2")


def large(model: str, ranks: int) -> lab.Experiment:
    """Full fine-tuning by AdamW, a sequence of 2,048 tokens a rank, all layers recomputed."""
    return lab.Experiment(
        model=lab.Model(model, init="random"), data=lab.RandomTokens(length=2048), optimizer=lab.AdamW(),
        parallel=lab.Parallel(dp=ranks, zero=3 if ranks > 1 else 0),
        training=lab.Training(batch_size=ranks, precision="bf16", recompute="full"))


def on_gpu() -> dict[str, tuple[lab.Experiment, int]]:
    """What an H200 measured: the experiment, and bytes allocated at most."""
    found = {}
    for name, row in h200_memory().items():
        cells, weights = METHODS[row["method"]]
        found[name] = lab.Experiment(
            model=lab.Model(row["model"], init="random"), **cells, data=lab.RandomTokens(length=row["length"]),
            training=lab.Training(batch_size=row["batch_size"], recompute=row["recompute"], **weights)), \
            int(row["allocated"])
    arm, = json.loads((RESULTS / "gpu_h200_training_65b.json").read_text(encoding="utf-8"))["arms"].values()
    found["llama-65b, LOMO, recompute"] = lab.Experiment(
        model=lab.Model("llama-65b", init="random"), data=lab.RandomTokens(length=2048), optimizer=lab.Lomo(),
        training=lab.Training(batch_size=2, precision="bf16", weights="bf16", recompute="full")), arm[0]["peak_bytes"]
    return found


def accelerate(experiment: lab.Experiment) -> int | None:
    """`accelerate estimate-memory`: the most of weights, gradients, optimizer and step, for Adam."""
    from accelerate.commands.estimate import calculate_maximum_sizes, estimate_training_usage

    from collie_lab.training.weights import blueprint

    whole, _ = calculate_maximum_sizes(blueprint(experiment.model))
    dtype = "bfloat16" if experiment.training.precision == "bf16" else "float32"
    return int(max(estimate_training_usage(whole, dtype).values()))


def deepspeed(experiment: lab.Experiment) -> int | None:
    """`estimate_zero3_model_states_mem_needs` or ZeRO-2's; one rank as ZeRO-2 on one."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    from collie_lab.training.weights import blueprint

    layout = experiment.parallel
    if layout.tp * layout.pp > 1 or (layout.dp > 1 and not layout.zero):
        return None
    model = blueprint(experiment.model)
    total = sum(parameter.numel() for parameter in model.parameters())
    node = min(8, layout.dp)
    if layout.zero == 3:
        largest = max(sum(each.numel() for each in module.parameters(recurse=False)) for module in model.modules())
        return int(estimate_zero3_model_states_mem_needs(total, largest, node, layout.dp // node, False, False)[1])
    return int(estimate_zero2_model_states_mem_needs(total, node, layout.dp // node, False)[1])


def llm_analysis(experiment: lab.Experiment) -> int | None:
    """llm-analysis' training: weights, gradients, optimizer and activations."""
    try:
        from llm_analysis.analysis import ActivationRecomputation, DSZeRO, LLMAnalysis
        from llm_analysis.config import DtypeConfig, GPUConfig, ModelConfig, ParallelismConfig
    except ImportError:
        return None
    config, layout, training = model_config(experiment.model), experiment.parallel, experiment.training
    if training.precision != "bf16":
        return None  # it knows 16 bits and fewer
    model = ModelConfig(
        "llama", config["num_hidden_layers"], config["num_attention_heads"], config["hidden_size"],
        config["vocab_size"], config["max_position_embeddings"], config.get("num_key_value_heads"),
        ffn_embed_dim=config["intermediate_size"], model_type="llama",
        expansion_ratio=config["intermediate_size"] / config["hidden_size"])
    analysis = LLMAnalysis(
        model, GPUConfig("any", 100_000, 3350, 450, 1e-6, 989), DtypeConfig(),
        ParallelismConfig(tp_size=layout.tp, pp_size=layout.pp, dp_size=layout.dp), flops_efficiency=0.5,
        hbm_memory_efficiency=0.9)
    batch = layout.micro_batch_size(training.batch_size, training.micro_batch_size)
    with contextlib.redirect_stdout(io.StringIO()):
        found = analysis.training(
            batch_size_per_gpu=batch, seq_len=longest_document(experiment), mlp_gated_linear_units=True,
            gradient_accumulation_steps=max(1, training.batch_size // layout.dp // batch), ds_zero=DSZeRO(layout.zero),
            activation_recomputation=ActivationRecomputation.FULL if training.recompute == "full"
            else ActivationRecomputation.NONE)
    return int(found["(weight+op_state+grad+act)_memory_per_gpu"])


OTHERS: dict[str, Callable[[lab.Experiment], int | None]] = {
    "accelerate": accelerate, "DeepSpeed": deepspeed, "llm-analysis": llm_analysis}


def beside(experiment: lab.Experiment, truth: int | None, planned: int | None, gpu: str | None) -> dict[str, Any]:
    """Bytes, of each. The others take every optimizer for Adam."""
    planned = experiment.plan(gpu).peak_bytes if planned is None else planned
    row: dict[str, Any] = {"measured": truth, "plan": planned, "closed form": lab.estimate(experiment, gpu).peak_bytes}
    return row | {name: say(experiment) for name, say in OTHERS.items()}


def errors(row: dict[str, Any]) -> dict[str, float | None]:
    """Each beside what was measured, or else the plan."""
    truth = row["measured"] or row["plan"]
    return {name: None if size is None else size / truth - 1 for name, size in row.items() if name != "measured"}


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kept = json.loads((RESULTS / "plans_cpu.json").read_text(encoding="utf-8"))["results"]
    cases = [(f"CPU: {name}", CASES[name], kept["cases"][name]["measured"], kept["cases"][name]["planned"], None)
             for name in MEASURED]
    cases += [(f"H200: {name}", experiment, truth, kept["h200"].get(name, {}).get("planned"),
               "H200") for name, (experiment, truth) in on_gpu().items()]
    cases += [(f"{model} on {ranks:,}", large(model, ranks), None, None, "H100")
              for model in ("llama-7b", "llama-65b") for ranks in (1, 8, 64, 1024)]
    found = {}
    for name, experiment, truth, planned, gpu in cases:
        assert isinstance(experiment.optimizer, RuleCell)
        found[name] = beside(experiment, truth, planned, gpu)
        text = "  ".join(f"{key} {'–' if error is None else f'{100 * error:+.2f}%'}"
                         for key, error in errors(found[name]).items())
        print(f"{name:44s} {(truth or found[name]['plan']) / 1e9:9.3f} GB: {text}", flush=True)
        keep(options.json, "estimators.py", found)
    for group in ("CPU", "H200", "llama"):
        rows = [errors(row) for name, row in found.items() if name.startswith(group)]
        for name in rows[0]:
            sizes = [abs(error) for row in rows if (error := row[name]) is not None]
            if sizes:
                print(f"{group}: {name}: median {100 * statistics.median(sizes):.3f}%, worst {100 * max(sizes):.3f}% "
                      f"of {len(sizes)}")


if __name__ == "__main__":
    main()
