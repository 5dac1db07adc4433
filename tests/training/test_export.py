"""Exports: from any layout a folder that `from_pretrained` loads, with the same logits."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from collie_lab.cells import Model, Parallel
from collie_lab.data import Tokenizer, save_tokenizer
from collie_lab.folder import RunFolder, read_json
from collie_lab.parallel import Strategy
from collie_lab.training import export
from collie_lab.training.export import export_model
from tests.ranks import run_ranks
from tests.training.layouts import LAYOUTS, lay_out, tiny

IDS = torch.arange(20)[None]


def mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=2, num_key_value_heads=2, vocab_size=320, num_local_experts=2,
                                  num_experts_per_tok=1, max_position_embeddings=64)
    return AutoModelForCausalLM.from_config(config)


def adapted() -> nn.Module:
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros, as it is made
            nn.init.normal_(parameter, std=0.1)
    return model


def send(model: nn.Module, path: Path) -> Path:
    """Export into a run folder; the model's folder."""
    run = RunFolder(path)
    if not dist.is_initialized() or dist.get_rank() == 0:
        run.path.mkdir(parents=True, exist_ok=True)
        save_tokenizer(Model("llama-tiny", init="random"), run.path / "tokenizer")
    if dist.is_initialized():
        dist.barrier()
    export_model(model, Tokenizer(run.path / "tokenizer"), run, Strategy(Parallel(), torch.device("cpu"), "fp32"))
    assert (run.path / "model").is_dir()  # on every rank
    return run.path / "model"


def assert_same_logits(model: nn.Module, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder)  # an adapter is loaded upon its base by peft
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        torch.testing.assert_close(loaded.eval()(input_ids=IDS).logits, expected, atol=1e-5, rtol=0)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()  # each is stored once
        found |= tensors
    return found


@pytest.mark.parametrize("make", [tiny, mixtral])
def test_one_process_writes_what_transformers_writes(make: object, tmp_path: Path) -> None:
    model = make()  # type: ignore[operator]
    folder = send(model, tmp_path)
    assert_same_logits(model, folder)
    model.save_pretrained(tmp_path / "reference")
    expected, found = tensors_in(tmp_path / "reference"), tensors_in(folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert read_json(folder / "config.json") == read_json(tmp_path / "reference" / "config.json")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert read_json(folder / "generation_config.json")["eos_token_id"] == Tokenizer(folder).eos_id
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"] == [256, *Tokenizer(folder).encode(["a"])[0]]


def test_large_models_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_FILE_BYTES", 100_000)
    model = tiny()
    folder = send(model, tmp_path)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 2
    assert all(path.stat().st_size < 110_000 for path in folder.glob("*.safetensors"))
    index = read_json(folder / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_in(folder).values())
    assert_same_logits(model, folder)


def test_buffers_are_kept_and_what_transformers_leaves_out_is_not(tmp_path: Path) -> None:
    model = tiny()
    model.model.register_buffer("counts", torch.ones(3))
    model.model.register_buffer("scratch", torch.ones(3))
    model._keys_to_ignore_on_save = {"model.scratch"}
    found = tensors_in(send(model, tmp_path))
    assert "model.counts" in found
    assert "model.scratch" not in found
    assert "lm_head.weight" not in found  # tied


def test_an_older_export_is_replaced(tmp_path: Path) -> None:
    send(tiny(), tmp_path)
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    (tmp_path / ".model.partial").mkdir()  # of a run that was killed
    assert_same_logits(model, send(model, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokenizer"]


def _from_layouts(folder: str, layouts: list[str]) -> None:
    for layout in layouts:
        send(lay_out(tiny(), layout), Path(folder, layout, "whole"))
        send(lay_out(adapted(), layout), Path(folder, layout, "adapter"))
        send(lay_out(mixtral(), layout), Path(folder, layout, "mixtral"))


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 4])
def test_from_any_layout(ranks: int, tmp_path: Path) -> None:
    layouts = [layout for layout, size in LAYOUTS.items() if size == ranks]
    run_ranks(_from_layouts, ranks, str(tmp_path), layouts)
    for layout in layouts:
        assert_same_logits(tiny(), tmp_path / layout / "whole" / "model")
        adapter = tmp_path / layout / "adapter" / "model"
        loaded, expected = peft.PeftModel.from_pretrained(tiny(), adapter), adapted().eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(input_ids=IDS).logits, expected(input_ids=IDS).logits,
                                       atol=1e-5, rtol=0)
        assert_same_logits(mixtral(), tmp_path / layout / "mixtral" / "model")
        if layout.startswith("pipeline"):  # each stage has written its own
            assert len(list((tmp_path / layout / "whole" / "model").glob("*.safetensors"))) == 2


def test_an_adapter_from_one_process(tmp_path: Path) -> None:
    model = adapted()
    folder = send(model, tmp_path)
    model.save_pretrained(tmp_path / "reference")
    expected = load_file(tmp_path / "reference" / "adapter_model.safetensors")
    found = load_file(folder / "adapter_model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
