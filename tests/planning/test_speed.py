"""The work that a dry run counts beside the formulas of it, and the seconds that are made of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import schedules
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import collie_lab as lab
from collie_lab import machine
from collie_lab.planning import Plan, Rates, calibration
from collie_lab.planning._patches import _DryEngine
from collie_lab.planning._work import Work
from collie_lab.planning.rates import Curve, published
from collie_lab.planning.speed import bubble, forecast_speed, wire_bytes
from collie_lab.planning.summary import Summary, forecast

LAYERS, HIDDEN, HEADS, INNER, VOCABULARY = 2, 64, 4, 172, 320  # llama-tiny
BLOCKS = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
PARAMETERS = BLOCKS + VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN
BATCH, LENGTH = 4, 96
TOKENS = BATCH * LENGTH
BASE = lab.Experiment(
    model=lab.Model("llama-tiny", init="random"), data=lab.RandomTokens(length=LENGTH), optimizer=lab.AdamW(lr=1e-3),
    training=lab.Training(steps=4, batch_size=BATCH))

SHARDS = BASE.replace(parallel=lab.Parallel(dp=4, zero=3))


def work(experiment: lab.Experiment) -> Summary:
    return _work(experiment.to_yaml())


@functools.cache
def _work(text: str) -> Summary:
    return forecast(lab.Experiment.from_yaml(text), LENGTH)


def total(summary: Summary, field: int, **wanted: str) -> float:
    """The sum of FLOPs (3), bytes (4) or calls (6) over the operations of a phase, of a kind."""
    places = {"phase": 0, "kind": 1}
    rows = [row for row in summary.work if all(row[places[name]] == value for name, value in wanted.items())]
    return sum(row[6] * (1 if field == 6 else row[field]) for row in rows)


@functools.cache
def angles() -> int:
    """The FLOPs of the rotary angles, once for all layers: a matrix product in some versions of transformers."""
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS))
    with FlopCounterMode(display=False) as counter:
        rotary(torch.zeros(BATCH, LENGTH, HIDDEN), torch.arange(LENGTH).expand(BATCH, -1))
    return counter.get_total_flops()


def test_flops_are_those_of_the_formula() -> None:
    base = work(BASE)
    head = VOCABULARY * HIDDEN * (TOKENS - BATCH)  # the last token of a document predicts nothing
    scores = LAYERS * HIDDEN * LENGTH * TOKENS  # a product of a half, in all layers
    assert total(base, 3, phase="forward", kind="matmul") == 2 * BLOCKS * TOKENS + angles()
    assert total(base, 3, phase="backward", kind="matmul") == 4 * BLOCKS * TOKENS
    assert total(base, 3, phase="loss") == 6 * head
    assert total(base, 3, kind="attention") == 2 * scores
    assert total(base, 3, kind="attention_backward") == 5 * scores
    per_token, per_attended = base.flops
    assert per_token * TOKENS + per_attended * BATCH * LENGTH**2 == \
        6 * (BLOCKS + VOCABULARY * HIDDEN) * TOKENS + 6 * LAYERS * HIDDEN * LENGTH * TOKENS


def test_recomputation_is_a_forward_pass_more() -> None:
    base, again = work(BASE), work(BASE.with_("training.recompute", "full"))
    last = 2 * LAYERS * HIDDEN * INNER * TOKENS  # a block's last product: nothing wants its result again
    assert total(again, 3, phase="recompute") == total(base, 3, phase="forward") - last - angles()
    assert total(again, 3) - total(base, 3) == total(again, 3, phase="recompute")
    assert again.flops == base.flops


def test_frozen_weights_want_no_gradient() -> None:
    found = work(BASE.replace(adapter=lab.LoRA(r=4, targets=("q_proj",))))
    pieces = LAYERS * 4 * 2 * HIDDEN
    first = 2 * TOKENS * (HIDDEN**2 + 4 * HIDDEN)  # of the first layer's query nothing asks for the input's gradient
    assert total(found, 3, phase="forward", kind="matmul") == 2 * (BLOCKS + pieces) * TOKENS + angles()
    backward = total(found, 3, phase="backward", kind="matmul")
    assert 2 * BLOCKS * TOKENS + 4 * pieces * TOKENS - 4 * first <= backward <= (2 * BLOCKS + 4 * pieces) * TOKENS
    assert found.flops[0] == 4 * (BLOCKS + VOCABULARY * HIDDEN) + 6 * pieces


@pytest.mark.parametrize(("optimizer", "dtype", "each"), [
    (lab.AdamW(), torch.float32, 28), (lab.SGD(), torch.float32, 12), (lab.Adan(), torch.float32, 44),
    (lab.Sophia(rounding="stochastic"), torch.bfloat16, 18), (lab.AdamW(rounding="stochastic"), torch.bfloat16, 22),
    (lab.AdamW(rounding="master"), torch.bfloat16, 28), (lab.SGD(rounding="kahan"), torch.bfloat16, 10),
], ids=["AdamW", "SGD", "Adan", "Sophia", "AdamW stochastic", "AdamW master", "SGD Kahan"])
def test_an_update_moves_the_bytes_of_its_rule(optimizer: lab.Optimizer, dtype: torch.dtype, each: int,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    counted, module = Work(), torch.nn.Linear(48, 32, dtype=dtype)
    monkeypatch.setattr("collie_lab.optim.optimizer.choose_engine", lambda _, device: _DryEngine(counted, device))
    made = lab.optim.build(optimizer, module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    assert sum(operation.bytes * count for operation, count in counted.calls.items()) == each * (48 + 1) * 32


def test_sophias_hessian_counts_as_often_as_it_is_refreshed() -> None:
    rates = _ideal(lab.GPU("mine", 10**12, 1e18, 1e12, 1e11))
    often, seldom = (BASE.replace(optimizer=lab.Sophia(lr=1e-4, hessian_every=every)) for every in (1, 4))
    summaries = [work(often).to_json()]
    fast, slow = (forecast_speed(each, summaries, rates, 8) for each in (seldom, often))
    assert fast is not None
    assert slow is not None
    flops = fast.parts["matrix products"], slow.parts["matrix products"]
    assert flops[1] / flops[0] == pytest.approx(2 / 1.25, rel=0.02)


def test_messages_are_those_of_the_layout() -> None:
    whole = 4 * PARAMETERS
    replicas = work(BASE.replace(parallel=lab.Parallel(dp=2)))
    assert total(replicas, 4, phase="backward", kind="all_reduce") == pytest.approx(whole, rel=1e-6)
    shards = work(SHARDS)
    assert [total(shards, 4, phase=phase, kind="all_gather") for phase in ("forward", "backward")] == [whole, whole]
    assert total(shards, 4, kind="reduce_scatter") == whole
    cut = work(BASE.replace(parallel=lab.Parallel(tp=2)))
    hidden = 4 * TOKENS * HIDDEN  # of a micro-batch, fp32: two messages a layer in each direction, and the embedding's
    assert total(cut, 4, phase="forward", kind="all_reduce") == (2 * LAYERS + 1) * hidden
    assert {tuple(row[5]) for row in cut.work if row[1] == "all_reduce"} == {(0, 1, 2)}


def _actions(schedule: Any, ranks: int, micro_batches: int) -> dict[int, list[Any]]:
    """The order in which torch's schedule lets each rank act."""
    made = object.__new__(schedule)
    made.pp_group_size, made._n_microbatches, made.n_local_stages = ranks, micro_batches, 2
    made._num_stages = made.num_stages = 2 * ranks
    made.number_of_rounds = max(1, micro_batches // ranks)
    made.microbatches_per_round = micro_batches // made.number_of_rounds
    return {rank: [action for action in made._calculate_single_rank_operations(rank) if action is not None]
            for rank in range(ranks)}


def _waiting(orders: dict[int, list[Any]], stages: int) -> float:
    """The share in which a rank waits: forward and both halves of backward take the same time."""
    seconds = {"FORWARD": 1, "BACKWARD_INPUT": 1, "BACKWARD_WEIGHT": 1, "FULL_BACKWARD": 2}
    done: dict[tuple[bool, int, int], int] = {}
    clock, left = dict.fromkeys(orders, 0), {rank: list(actions) for rank, actions in orders.items()}
    while any(left.values()):
        for rank, actions in left.items():
            stage, kind, batch = actions[0][:3] if actions else (0, None, 0)
            while actions:
                stage, kind, batch = actions[0][:3]
                forward, weights = kind.name == "FORWARD", kind.name == "BACKWARD_WEIGHT"
                before = stage - 1 if forward else stage + 1
                needed = [] if weights or not 0 <= before < stages else [(forward, before, batch)]
                if any(each not in done for each in needed):
                    break
                clock[rank] = max([clock[rank], *(done[each] for each in needed)]) + seconds[kind.name]
                if not weights:
                    done[forward, stage, batch] = clock[rank]
                actions.pop(0)
    busy = sum(seconds[action[1].name] for action in orders[0])
    return 1 - busy / max(clock.values())


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 2), (2, 4), (4, 4), (4, 8), (4, 16), (8, 16)])
def test_bubbles_are_those_of_torchs_schedules(ranks: int, micro_batches: int) -> None:
    for name, schedule in (("interleaved", schedules.ScheduleInterleaved1F1B),
                           ("zero_bubble", schedules.ScheduleZBVZeroBubble)):
        found = _waiting(_actions(schedule, ranks, micro_batches), 2 * ranks)
        assert bubble(name, ranks, micro_batches) == pytest.approx(found), name
    for name in ("gpipe", "1f1b"):
        assert bubble(name, ranks, micro_batches) == (ranks - 1) / (micro_batches + ranks - 1)


@pytest.mark.parametrize(("kind", "sent"), [("all_reduce", 1.5), ("all_gather", 0.75), ("reduce_scatter", 0.75),
                                            ("send", 1.0)])
def test_a_ring_sends_what_is_known_of_it(kind: str, sent: float) -> None:
    assert wire_bytes(kind, 1000.0, 4) == 1000 * sent


def test_a_curve_goes_through_its_points_and_on_in_proportion() -> None:
    curve = Curve((1e3, 1e6), (1e-6, 1e-4))
    assert [curve(size) for size in (0, 500, 1e3, 1e6, 2e6)] == pytest.approx([0, 5e-7, 1e-6, 1e-4, 2e-4])
    assert curve(10**4.5) == pytest.approx(1e-5)
    known = {"attention fp32 16": Curve.at(1e9), "attention fp32 64": Curve.at(4e9), "attention bf16": Curve.at(8e9)}
    rates = _ideal(lab.GPUS["H100"], device=known)
    kinds = ("fp32 16", "fp32 24", "fp32 80", "bf16 80", "fp16 64")
    assert [rates.seconds("attention", each, 8e9) for each in kinds] == pytest.approx([8.0, 8.0, 2.0, 1.0, None])
    assert Curve.at(1e9)(5e9) == pytest.approx(5.0)


def planned(experiment: lab.Experiment, gpu: lab.GPU | None) -> Plan:
    """A plan without the process that makes its summaries."""
    return Plan(experiment, gpu, LENGTH, (work(BASE).to_json(),))


def _ideal(gpu: lab.GPU, **changes: Any) -> Rates:
    """Rates at the peak, without starts."""
    device = {"memory": Curve.at(gpu.bandwidth), **{
        f"{kind} {dtype}": Curve.at(gpu.flops) for kind in ("matmul", "attention", "attention_backward")
        for dtype in ("fp32", "bf16")}}
    plain: dict[str, Any] = {
        "source": "ideal", "margin": 0.0, "device": device,
        "host": dict.fromkeys(("forward", "backward", "update"), 0.0), "asynchronous": True, "overlap": 0.5,
        "links": {"": Curve.at(gpu.link)}, "network": Curve.at(gpu.network)}
    return Rates(**{**plain, **changes})


def test_seconds_are_work_over_rates() -> None:
    gpu = lab.GPU("mine", 10**12, 1e18, 1e12, 1e11, network=1e9)
    summaries = [work(SHARDS).to_json()]
    flops = sum(row[3] * row[6] for row in summaries[0]["work"])
    inside, across = (forecast_speed(SHARDS, summaries, _ideal(gpu), machine) for machine in (4, 2))
    assert inside is not None
    assert across is not None
    assert inside.parts["matrix products"] + inside.parts["attention"] == pytest.approx(flops / 1e12, rel=1e-3)
    sent = 3 * 4 * PARAMETERS * 3 / 4  # gathered twice, scattered once
    assert inside.high == pytest.approx(flops / 1e12 + sent / 1e11, rel=1e-2)
    assert inside.seconds == pytest.approx(flops / 1e12 + sent / 1e11 / 2, rel=1e-2)
    assert inside.low == pytest.approx(flops / 1e12, rel=1e-2)
    assert across.low == pytest.approx(sent / 2 / 1e9, rel=1e-2)  # each rank of a machine has its part of the network
    assert across.high == pytest.approx(flops / 1e12 + sent / 2 / 1e9, rel=1e-2)
    host = {"forward": 1e-3, "backward": 1e-3, "update": 0.0}
    waiting = forecast_speed(SHARDS, summaries, _ideal(gpu, host=host), 4)
    assert waiting is not None
    calls = sum(row[6] for row in summaries[0]["work"] if row[1] not in ("view", "update") and not row[5])
    assert sum(waiting.parts.values()) - waiting.parts["communication"] == pytest.approx(calls * 1e-3, rel=0.05)


def test_a_plan_has_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = dataclasses.replace(lab.GPUS["H200"], name="mine")
    monkeypatch.setattr(sys.modules[Plan.__module__], "find_rates", lambda *_: _ideal(gpu))
    found = planned(BASE, gpu)
    speed = found.speed
    assert speed is not None
    assert found.seconds_per_step == speed.seconds == pytest.approx(sum(speed.parts.values()))
    assert found.tokens_per_second == TOKENS / speed.seconds
    assert found.gpu_hours == pytest.approx(4 * speed.seconds / 3600)  # of four steps
    assert found.cost(2.0) == 2 * found.gpu_hours
    model = 6 * (BLOCKS + VOCABULARY * HIDDEN) * TOKENS + 6 * LAYERS * HIDDEN * LENGTH * TOKENS
    assert found.mfu == pytest.approx(model / speed.seconds / gpu.flops)
    assert speed.components["share"].sum() == pytest.approx(1.0)
    assert "tokens/s" in repr(found)
    assert "MFU" in repr(found)


def test_what_is_not_known_is_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = planned(BASE, None)
    assert here.speed is here.tokens_per_second is here.mfu is here.gpu_hours is here.cost(1.0) is None
    assert "calibrate" in repr(here)
    old = planned(BASE.with_("training.precision", "bf16"), lab.GPUS["V100"])
    assert old.tokens_per_second is None
    assert "no bf16" in repr(old)
    assert planned(BASE, lab.GPUS["V100"]).tokens_per_second


def test_a_calibration_is_used_by_later_plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rates, asked = published(lab.GPUS["H100"]), []

    def measured(ranks: int) -> tuple[str | None, Rates]:
        asked.append(ranks)
        return (None if ranks == 1 else "NVIDIA H100 80GB HBM3"), rates

    monkeypatch.setattr(calibration, "_measured", measured)
    found = lab.calibrate([1, 2])
    assert asked == [1, 2]
    here = calibration.find_rates(None, 1)
    assert here is not None
    assert here.device == rates.device
    assert here.source.startswith("calibration of")
    assert here == found[1]
    assert calibration.find_rates(None, 2) is None  # two ranks share what one had
    there = calibration.find_rates(lab.GPUS["H100"], 64)
    assert there is not None
    assert "NVIDIA H100" in there.source
    other = calibration.find_rates(lab.GPUS["H100 PCIe"], 1)
    assert other is not None
    assert "published" in other.source
    for file in machine.user_cache("calibration").iterdir():
        json.loads(file.read_text())


@pytest.mark.parametrize("ranks", [0, [], [2, 0]])
def test_a_calibration_wants_ranks(ranks: Any) -> None:
    with pytest.raises(ValueError, match="at least one"):
        lab.calibrate(ranks)


@pytest.mark.parametrize(("name", "dtype", "peak"), [
    ("V100", "bf16", None), ("T4", "fp16", 65e12), ("A100", "bf16", 312e12), ("A100", "fp32", 19.5e12)])
def test_peaks_by_type(name: str, dtype: str, peak: float | None) -> None:
    assert lab.GPUS[name].peak(dtype) == peak


def test_a_run_and_a_plan_go_by_the_same_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    from collie_lab.training.flops import peak_flops

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 PCIe")
    assert peak_flops(torch.device("cuda", 0)) == lab.GPUS["H100 PCIe"].flops == 756e12
    assert peak_flops(torch.device("cpu")) is None
