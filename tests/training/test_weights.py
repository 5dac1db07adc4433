"""Weights in slices: against `from_pretrained`, against `from_config`, and one layout against another."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from collie_lab import Model
from collie_lab.data.tensor_names import parameter_names
from collie_lab.training import weight_files
from collie_lab.training.memory import CpuMemory
from collie_lab.training.probe import ModelWarning
from collie_lab.training.weights import blueprint, fill
from tests.ranks import run_ranks

CPU = torch.device("cpu")
TINY = Model("llama-tiny", init="random")
UNEVEN = TINY.replace(config={"tie_word_embeddings": False, "vocab_size": 321})  # rows that no layout shares evenly
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 320, "max_position_embeddings": 64,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {"llama": {}, "gpt_neox": {}, "qwen3": {}, "mixtral": {"num_local_experts": 4}, "gemma": {}, "gpt2": {}}


def _filled(cell: Model, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = blueprint(cell)
    fill(model, cell, seed, CPU, dtype)
    return model


def _saved(folder: Path, family: str = "llama", **fields: Any) -> PreTrainedModel:
    """A model of random weights, written to `folder`."""
    torch.manual_seed(1)
    size = fields.pop("max_shard_size", "5GB")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **fields}))
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # else norms are all alike
    model.save_pretrained(folder, max_shard_size=size)
    return model


@pytest.mark.parametrize("config", [{}, {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3}])
@pytest.mark.parametrize("family", ["shape", "llama", "qwen3"])
def test_the_names_that_are_known_before_a_model_is_built(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    cell = Model(tmp_path)
    if family == "shape":
        cell = TINY.replace(config=config)
    else:
        _saved(tmp_path, family, **config)
    built = blueprint(cell).named_parameters(remove_duplicate=False)
    assert {*(parameter_names(cell) or ())} == {name for name, _ in built}


def test_a_model_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved = _saved(tmp_path / "mine")
    for name, values in _filled(Model("~/mine")).state_dict().items():
        assert torch.equal(values, saved.state_dict()[name])


def _assert_same(found: nn.Module, expected: nn.Module) -> None:
    here, there = found.state_dict(), expected.state_dict()
    assert here.keys() == there.keys()
    for name, values in there.items():
        assert torch.equal(here[name], values), name


def test_blueprint_holds_no_weights() -> None:
    cell = Model("llama-65b", init="random")
    model = blueprint(cell)
    assert all(parameter.is_meta and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == 65_285_660_672  # as Meta's own checkpoint
    expected = 10_000 ** -(torch.arange(0, 128, 2) / 128)
    assert torch.allclose(model.get_buffer("model.rotary_emb.inv_freq"), expected)
    assert not any(buffer.is_meta for buffer in model.buffers())
    tied = blueprint(TINY)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    with pytest.raises(ValueError, match="LlamaConfig has no field 'n_layer'"):
        blueprint(TINY.replace(config={"n_layer": 2}))


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_are_the_familys(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = SMALL if family != "gpt2" else {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 320}
    config = AutoConfig.for_model(family, **fields, **FAMILIES[family])
    config.save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    before = torch.get_rng_state()
    model = _filled(Model(tmp_path, init="random"))
    assert torch.equal(torch.get_rng_state(), before)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        close = 6 * float(wanted.detach().std()) / math.sqrt(wanted.numel())  # several standard errors
        assert float(found.detach().mean()) == pytest.approx(float(wanted.detach().mean()), abs=close), name
        assert float(found.detach().std()) == pytest.approx(float(wanted.detach().std()), abs=close), name
    for (name, found), wanted in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(found, wanted), name


def test_random_weights_follow_seed_and_unit_alone() -> None:
    model, again, other = _filled(UNEVEN), _filled(UNEVEN), _filled(UNEVEN, seed=1)
    _assert_same(again, model)
    first, second = (model.get_parameter(f"model.layers.{n}.mlp.up_proj.weight") for n in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(other.get_parameter("lm_head.weight"), model.get_parameter("lm_head.weight"))
    cut = blueprint(UNEVEN)  # the second stage of a pipeline
    cut.model.embed_tokens = nn.Identity()
    cut.model.layers[0] = nn.Identity()
    fill(cut, UNEVEN, 0, CPU)
    for name, parameter in cut.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    half = _filled(UNEVEN, dtype=torch.bfloat16)
    assert all(torch.equal(p, model.get_parameter(name).bfloat16()) for name, p in half.named_parameters())
    assert half.get_buffer("model.rotary_emb.inv_freq").dtype == torch.float32


def test_the_head_of_a_later_stage_is_the_tied_embedding() -> None:
    whole, cut = _filled(TINY), blueprint(TINY)
    cut.model.embed_tokens = nn.Identity()
    fill(cut, TINY, 0, CPU)
    assert torch.equal(cut.lm_head.weight, whole.model.embed_tokens.weight)


def test_a_weight_that_nobody_initialises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PreTrainedModel._init_weights

    def leave_out(kind: str) -> None:
        monkeypatch.setattr(PreTrainedModel, "_init_weights", lambda self, module: None
                            if type(module).__name__ == kind else original(self, module))

    leave_out("LlamaRMSNorm")
    with pytest.raises(ValueError, match=r"does not initialise model\.layers\.0, LlamaRMSNorm\.weight"):
        _filled(TINY)
    leave_out("Linear")
    weight = _filled(TINY).get_parameter("model.layers.0.mlp.up_proj.weight")  # by `nn.Linear.reset_parameters`
    assert 0.9 / 8 < weight.detach().abs().max() <= 1 / 8


# --- layouts -----------------------------------------------------------------------------------------------------


def _shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2 as the strategy does it."""
    for block in [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _cut(model: nn.Module, mesh: DeviceMesh) -> None:
    """Matrices along one dimension as tensor parallelism cuts them, the rest along their only one; ties kept."""
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            dim = 1 if name.rpartition(".")[2] in ("o_proj", "down_proj") else 0
            made.setdefault(id(parameter), nn.Parameter(
                distribute_tensor(parameter.detach(), mesh, [Shard(dim)], src_data_rank=None)))
            module.register_parameter(leaf, made[id(parameter)])


def _layouts() -> dict[str, Callable[[nn.Module], None]]:
    if dist.get_world_size() == 2:
        mesh = init_device_mesh("cpu", (2,))
        return {"sharded": lambda model: _shard(model, mesh), "cut": lambda model: _cut(model, mesh)}
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def both(model: nn.Module) -> None:
        _cut(model, square["tp"])
        _shard(model, square["dp"])

    return {"both": both, "hybrid": lambda model: _shard(model, square)}


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _fill_in_layouts(cells: list[Model]) -> None:
    ids = torch.arange(24).reshape(2, 12)
    for cell in cells:
        expected = _filled(cell, seed=3)
        for name, place in _layouts().items():
            model, placed = blueprint(cell), _filled(cell, seed=3)
            place(model)
            place(placed)  # the layout cuts real weights itself
            fill(model, cell, 3, CPU)
            found, wanted = dict(model.named_parameters()), dict(placed.named_parameters())
            assert found.keys() == wanted.keys()
            for key, parameter in wanted.items():
                assert found[key].placements == parameter.placements
                assert torch.equal(_local(found[key]), _local(parameter)), (name, key)
                assert torch.equal(found[key].full_tensor(), expected.get_parameter(key)), (name, key)
            tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
            assert tied == model.config.tie_word_embeddings
            if name in ("sharded", "hybrid"):  # FSDP2 gathers, and shards gradients, as if nothing had happened
                model(input_ids=ids, labels=ids).loss.backward()
                expected.zero_grad()
                expected(input_ids=ids, labels=ids).loss.backward()
                for key, parameter in model.named_parameters():
                    assert torch.allclose(parameter.grad.full_tensor(), expected.get_parameter(key).grad,
                                          atol=1e-6), (name, key)


def _fill_adapted() -> None:
    expected = _filled(TINY)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if dist.is_initialized() else None
    model = peft.get_peft_model(blueprint(TINY), peft.LoraConfig(r=2, target_modules="all-linear"))
    adapters = {}
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):  # peft makes adapters where the base layer is: on meta
            module.lora_A.to_empty(device="cpu")
            module.lora_B.to_empty(device="cpu")
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            adapters[name] = nn.init.constant_(parameter, number).detach().clone()
    assert adapters
    if mesh is not None:
        _shard(model, mesh)
    fill(model, TINY, 0, CPU)
    for name, parameter in model.named_parameters():
        found = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        assert torch.equal(found, adapters[name] if name in adapters else expected.get_parameter(plain)), name


def _fill_all(cells: list[Model]) -> None:
    _fill_in_layouts(cells)
    _fill_adapted()


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_layout_has_the_weights_of_one_process(ranks: int, tmp_path: Path) -> None:
    _saved(tmp_path / "files", max_shard_size="60KB", vocab_size=321)
    _saved(tmp_path / "experts", "mixtral", num_local_experts=4)  # converted, one rank after another
    run_ranks(_fill_all, ranks, [TINY, UNEVEN, Model(tmp_path / "files"), Model(tmp_path / "experts")])


def test_adapters_keep_their_values() -> None:
    _fill_adapted()
    model = peft.get_peft_model(blueprint(TINY), peft.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"lora_A\.default\.weight has no values, and is no weight of Llama"):
        fill(model, TINY, 0, CPU)


# --- pretrained --------------------------------------------------------------------------------------------------

def test_real_weights_equal_from_pretrained(shared: Path) -> None:
    folder = shared / "models" / "stories260k"
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = _filled(Model(folder))
    _assert_same(model, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    ids = torch.arange(40)[None]
    assert torch.equal(model.eval()(ids).logits, expected(ids).logits)
    _assert_same(_filled(Model(folder), dtype=torch.bfloat16),
                 AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))


@pytest.mark.parametrize("tied", [True, False])
def test_many_files_equal_from_pretrained(tied: bool, tmp_path: Path) -> None:
    saved = _saved(tmp_path, tie_word_embeddings=tied, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model = _filled(Model(tmp_path))
    _assert_same(model, saved)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_buffers_that_are_weights_are_read(tmp_path: Path) -> None:
    """The MoE router of GLM-4 keeps a correction in a buffer."""
    fields = {"n_routed_experts": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    saved = _saved(tmp_path, "glm4_moe", **fields)
    buffer = saved.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    buffer.copy_(torch.arange(4.0))
    saved.save_pretrained(tmp_path)
    with pytest.warns(ModelWarning, match="has to convert"):
        _assert_same(_filled(Model(tmp_path)), saved)


def test_a_checkpoint_of_the_base_model(tmp_path: Path) -> None:
    saved = _saved(tmp_path, tie_word_embeddings=True)
    saved.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    _assert_same(_filled(Model(tmp_path)), saved)


def test_experts_are_fused_by_transformers(tmp_path: Path) -> None:
    saved = _saved(tmp_path, "mixtral", num_local_experts=4)
    assert any("experts.0" in name for name in load_file(tmp_path / "model.safetensors"))
    with pytest.warns(ModelWarning, match="every rank holds the whole model"):
        _assert_same(_filled(Model(tmp_path)), saved)


def _change(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_wrong_checkpoints_are_refused(tmp_path: Path) -> None:
    cell = Model(tmp_path)
    _saved(tmp_path, tie_word_embeddings=False)
    _change(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
    with pytest.raises(ValueError, match=r"another shape .* model\.norm\.weight \(65,\) instead of \(64,\)"):
        _filled(cell)
    _change(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"holds no weights for model\.norm\.weight$"):
        _filled(cell)
    _change(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}))
    with pytest.raises(ValueError, match=r"other values for lm_head\.weight than for model\.embed_tokens\.weight"):
        _filled(cell.replace(config={"tie_word_embeddings": True}))
    _change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 0}))
    _filled(cell.replace(config={"tie_word_embeddings": True}))  # two copies of one tensor are no contradiction


# --- memory ------------------------------------------------------------------------------------------------------

class _Reads:
    """`safe_open` that adds up the bytes of the slices it gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.bytes = 0
        original = weight_files.safe_open
        reads = self

        class Slice:
            def __init__(self, source: Any):
                self.get_shape, self._source = source.get_shape, source

            def __getitem__(self, region: Any) -> Tensor:
                values: Tensor = self._source[region]
                reads.bytes += values.nbytes
                return values

        class Handle(contextlib.ExitStack):
            def __init__(self, path: Path, framework: str):
                super().__init__()
                self._file = self.enter_context(original(path, framework=framework))
                self.keys = self._file.keys

            def get_slice(self, key: str) -> Slice:
                return Slice(self._file.get_slice(key))

        monkeypatch.setattr(weight_files, "safe_open", Handle)


def _fill_measured(cells: list[Model]) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for cell in cells:
        with pytest.MonkeyPatch.context() as patch:
            reads, meter = _Reads(patch), CpuMemory()
            model = blueprint(cell)
            _shard(model, mesh)
            with meter.step():
                fill(model, cell, 0, CPU)
        part = sum(parameter.to_local().nbytes for parameter in model.parameters())
        whole = sum(parameter.nbytes for parameter in model.parameters())
        block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
        assert whole > 1.9 * part > 5 * block  # so that the bound below says something
        assert meter.peak_bytes is not None
        # A mapped file does not count: its pages belong to the system. 8 KB: buffers and indices.
        assert part <= meter.peak_bytes <= part + block + 8192
        assert reads.bytes == (part if cell.init == "pretrained" else 0)


@pytest.mark.ranks
def test_a_rank_loads_in_the_room_of_its_shard_and_a_block(tmp_path: Path) -> None:
    _saved(tmp_path, num_hidden_layers=8, max_shard_size="200KB")
    run_ranks(_fill_measured, 2, [Model(tmp_path), TINY.replace(config={"num_hidden_layers": 8})])
