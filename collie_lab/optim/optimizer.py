"""The optimizer that applies a rule: step by step after the backward pass, or inside it."""

from __future__ import annotations

import contextlib
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from collie_lab.optim._checks import check_names, check_options
from collie_lab.optim.clip import clip_coefficient, gradient_norms
from collie_lab.optim.engine import Engine, choose_engine
from collie_lab.optim.rule import Rule
from collie_lab.optim.rules import SophiaG
from collie_lab.optim.shards import global_norm, local_gradient
from collie_lab.optim.slot import Ready, Slot, claim, make_slot, release
from collie_lab.optim.updates import Gatherer
from collie_lab.optim.waves import Waiting, waves

__all__ = ["RuleOptimizer"]

ClipBy = Literal["two_passes", "previous_norm"]
Accumulate = Literal["hold", "each"]
_Phase = Literal["update", "measure", "hold", "refresh"]


class RuleOptimizer(torch.optim.Optimizer):
    """Applies a `Rule` to parameters of any shape, sharded or not; real parameter groups, schedulers, `state_dict`.

    With `in_backward` each parameter is updated as soon as its gradient is there, and the gradient is freed:
    `loss.backward()` does the work and `step()` closes it. Both ways give the same weights bit for bit.

    Args:
        params: parameters, or groups of them with hyper-parameters of their own.
        rule: the update rule.
        in_backward: update inside the backward pass.
        max_norm: largest norm of the whole gradient; it is scaled down to it. In backward the norm must be known
            before: see `clip_by`.
        max_value: largest absolute value of an element, after `max_norm`.
        clip_by: how `max_norm` works in backward. `two_passes`: a first pass inside `measure()`, exact.
            `previous_norm`: by the norm of the step before; only the first step takes two passes.
        accumulate: more than one backward pass a step, in backward. None: refused. `hold`: gradients pile up under
            `hold()`, the last pass updates; exact, saves nothing before that. `each`: every pass updates with its
            part; for rules that are linear in the gradient, later parts see weights that have moved already.
        rounding: how bf16 weights are kept: stochastic, kahan or master; None: the rule's own. What is beside the
            weights (master, compensation) knows of no other writer: load weights before, or with `load_state_dict`.
        record_norm: find the gradient norm of every step (`norm`) even where nothing is clipped.
        reduce: in backward, called with each gradient before anything else: averages it over replicas.
        engine: auto, eager, compile, native (C++, CPU) or triton (CUDA).
        lazy: states are not made now, but by `adopt` or with the first update: for DeepSpeed, which puts flat pieces of
            its own in the place of the parameters.
        seed: of stochastic rounding.
        stages: the ranks that train the other parameters of the same model (a pipeline): one gradient norm for all.
        copies: parameters whose gradient another of these ranks counts.
        hyper: `lr`, `weight_decay` and what the rule reads besides; all of them, and nothing else.

    Raises:
        TypeError: a hyper-parameter that the rule does not know, or one that is missing.
        ValueError: a combination that would be wrong.
    """

    def __init__(self, params: Any, rule: Rule, *, in_backward: bool = False, max_norm: float | None = None,
                 max_value: float | None = None, clip_by: ClipBy = "two_passes", accumulate: Accumulate | None = None,
                 rounding: str | None = None, record_norm: bool = False,
                 reduce: Callable[[Tensor], None] | None = None, engine: str = "auto", lazy: bool = False,
                 seed: int = 0, stages: dist.ProcessGroup | None = None, copies: Collection[Tensor] = (), **hyper: Any):
        self.rule, self.in_backward = rule, in_backward
        self.norm: Tensor | None = None
        self._max_norm, self._max_value, self._clip_by = max_norm, max_value, clip_by
        self._accumulate = accumulate if in_backward else None  # out of it, gradients add up anyway
        self._rounding, self._reduce = rounding or rule.rounding, reduce
        # With parts of a gradient there is no moment at which the whole could be measured.
        self._record_norm = (record_norm or max_norm is not None) and self._accumulate != "each"
        self._phase: _Phase = "update"
        self._slots: dict[Tensor, Slot] = {}
        self._numbers: dict[Tensor, int] = {}
        self._fired: dict[Tensor, int] = {}  # how many gradients came in this step
        self._norms: list[tuple[Tensor, Slot]] = []
        self._scale: Tensor | None = None
        self._stages, self._copies = stages, {id(parameter) for parameter in copies}
        self._engine, self._engines, self._lazy = engine, dict[torch.device, Engine](), lazy
        self._waiting, self._gather = Waiting(), Gatherer(seed)
        self._hessian_tokens = 0
        self._since_refresh = 0
        check_options(rule, rounding=self._rounding, accumulate=self._accumulate, max_norm=max_norm,
                      max_value=max_value)
        check_names(rule, hyper, "", required=True)
        super().__init__(params, hyper)
        if not self._numbers:
            raise ValueError("there is no parameter to train")

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their states.

        Raises:
            TypeError: an unknown hyper-parameter.
            ValueError: a parameter that cannot be trained here.
        """
        check_names(self.rule, {name: value for name, value in param_group.items()
                                if name not in ("params", "initial_lr", "param_names")}, " in a group", required=False)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        names = group.get("param_names", [None] * len(group["params"]))
        for parameter, name in zip(group["params"], names, strict=True):
            # By name where there is one: the same on the stages of a pipeline, which have some parameters each.
            self._numbers[parameter] = len(self._numbers) if name is None else zlib.crc32(name.encode())
            if parameter.requires_grad and not self._lazy:  # what is frozen takes no memory
                self._add(parameter, len(self.param_groups) - 1)

    def _add(self, parameter: Tensor, group: int) -> Slot:
        if self.in_backward and self._reduce is None and not isinstance(parameter, DTensor) and _replicated():
            raise ValueError("in backward on several ranks: replicas drift apart unless gradients are averaged "
                             "before the update. Give `reduce`, or shard the model (FSDP2)")
        release(parameter)
        if parameter.device not in self._engines:
            self._engines[parameter.device] = choose_engine(self._engine, parameter.device)
        index = self._numbers.setdefault(parameter, len(self._numbers))
        slot, entries = make_slot(parameter, self.rule, self._rounding, index=index, group=group,
                                  engine=self._engines[parameter.device])
        self._slots[parameter] = slot
        self.state[parameter].update(entries)
        if self.in_backward:
            claim(parameter, self._on_gradient)
        return slot

    # --- one step ---------------------------------------------------------------------------------

    @override
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; in backward: close the step that the backward pass made."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.in_backward:
            self._update_all([(parameter, self.adopt(parameter, index), local_gradient(parameter, gradient))
                              for index, group in enumerate(self.param_groups) for parameter in group["params"]
                              if (gradient := parameter.grad) is not None])
        else:
            self._take_leftovers()
            self._waiting.flush(self._update_fresh)
            if self._norms:
                self._close_norm()
        self.set_norm(self.norm)
        self._fired.clear()
        self._warn_if_stale()
        return loss

    def adopt(self, parameter: Tensor, group: int) -> Slot:
        """What is kept of a parameter of that group; made now where it is new."""
        slot = self._slots.get(parameter) or self._add(parameter, group)
        slot.group = group  # DeepSpeed steps through the groups one by one, each as if it were the only one
        return slot

    def _take_leftovers(self) -> None:
        """With `hold`: parameters (experts) that got gradients from earlier micro-batches, but not from the last."""
        for parameter in [parameter for group in self.param_groups for parameter in group["params"]
                          if parameter.grad is not None]:
            if self._accumulate != "hold" or parameter not in self._slots:
                raise RuntimeError("in backward, a gradient was left: its parameter was frozen when the optimizer was "
                                   "made, or another optimizer has taken it over")
            if self._reduce is not None:
                raise RuntimeError("a parameter got no gradient in the last micro-batch of this rank, but before: "
                                   "replicas would average it at different times. in_backward=False")
            self._on_gradient(parameter)

    def _update_all(self, ready: list[Ready]) -> None:
        """The step outside of backward."""
        if self._record_norm:
            norms = gradient_norms([gradient for _, _, gradient in ready])
            self._norms = [(norm, slot) for norm, (parameter, slot, _) in zip(norms, ready, strict=True)
                           if id(parameter) not in self._copies]
            self._close_norm()
        if self._max_norm is not None and self.norm is not None:
            self._scale = clip_coefficient(self.norm, self._max_norm)
        for wave in waves(ready) if any(engine.together for engine in self._engines.values()) else [ready]:
            self._update(wave)

    @property
    def _norm_is_measured(self) -> bool:
        """Whether the norm comes from a pass of its own, not from the updating one."""
        return self.in_backward and self._max_norm is not None and self._clip_by == "two_passes"

    def _on_gradient(self, parameter: Tensor) -> None:
        """The hook of every parameter in backward: its gradient is complete."""
        if self._phase == "hold":
            return
        with torch.no_grad():
            slot = self._slots[parameter]
            if parameter in self._fired and self._accumulate != "each":
                raise RuntimeError("a parameter got a second gradient before `step()`: gradients are not accumulated "
                                   "in backward unless accumulate= says how, and reentrant checkpointing gives shared "
                                   "weights several (use_reentrant=False)")
            gradient = parameter.grad
            assert gradient is not None
            if self._reduce is not None:
                self._reduce(gradient)
            if self._phase == "refresh":
                self._refresh(slot, local_gradient(parameter, gradient))
                self._fired[parameter] = 1
            else:
                self._take(parameter, slot, local_gradient(parameter, gradient))
            parameter.grad = None

    def _take(self, parameter: Tensor, slot: Slot, gradient: Tensor) -> None:
        """Update with a gradient, now or together with others; in the measuring pass only measure it."""
        part, each = self._fired.get(parameter, 0), (parameter, slot, gradient)
        if self._phase == "measure":
            self._measure([each])
        elif self._max_norm is not None and self._scale is None:
            raise RuntimeError("clipping by norm in backward needs the norm first: run the same forward and backward "
                               "pass before, inside `with optimizer.measure():`")
        # Not so FSDP2's gradients: they are there on a stream of its own, which it waits for before the end.
        elif slot.engine.together and not isinstance(parameter, DTensor):
            self._waiting.add(each, part, self._update_fresh)
        else:
            self._update_fresh([each], part)
        self._fired[parameter] = part + 1

    def _measure(self, ready: list[Ready]) -> None:
        norms = gradient_norms([gradient for _, _, gradient in ready])
        self._norms += [(norm, slot) for norm, (_, slot, _) in zip(norms, ready, strict=True)]

    def _update_fresh(self, ready: list[Ready], part: int) -> None:
        """In backward: update with gradients that may still be to be measured."""
        if self._record_norm and not self._norm_is_measured:
            self._measure(ready)
        self._update(ready, part)

    def _update(self, ready: list[Ready], part: int = 0) -> None:
        """Update parameters with their gradients, or with one more part of them."""
        together = self._gather(ready, part=part, scale=self._scale, limit=self._max_value)
        if not part:
            for _, slot, _ in ready:
                slot.counts.advance()
        for engine, index, step, updates in together:
            group = self.param_groups[index]
            if part:  # weight decay is part of a step, not of each part of its gradient
                group = {**group, "weight_decay": 0.0}
            self.rule.apply(engine, updates, group, step)
        # Engines write behind autograd's back; a graph that still needs the old weights must raise.
        torch.autograd.graph.increment_version(
            [weight for *_, updates in together for weight in updates.weights])

    def _close_norm(self) -> None:
        # In the order of parameters, not of hooks: the same sum in and out of backward, and on every rank.
        norms = sorted(self._norms, key=lambda pair: pair[1].index)
        self.norm, self._norms = global_norm([(norm, slot.shards) for norm, slot in norms], self._stages), []

    # --- what a loop may ask for ------------------------------------------------------------------

    @property
    def needs_measure(self) -> bool:
        """Whether the next step needs a first pass inside `measure()`."""
        return self._norm_is_measured or (self.in_backward and self._max_norm is not None and self._scale is None)

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """The context of a backward pass that only finds the gradient's norm, by which the next is clipped."""
        if not self.in_backward or self._max_norm is None:
            raise ValueError("measure() is for clipping by norm in backward: there is no max_norm, or no need of it")
        with torch.no_grad():
            self._waiting.flush(self._update_fresh)
        try:
            with self._in_phase("measure"):
                yield
            self._close_norm()
        finally:
            self._fired.clear()
            self._norms = []
        assert self.norm is not None
        self._scale = clip_coefficient(self.norm, self._max_norm)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """The context of all backward passes of a step but the last, with `accumulate="hold"`: gradients pile up."""
        if self._accumulate != "hold":
            raise ValueError('hold() is for accumulate="hold"')
        with self._in_phase("hold"):
            yield

    @contextlib.contextmanager
    def _in_phase(self, phase: _Phase) -> Iterator[None]:
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    @torch.no_grad()
    def restart(self) -> None:
        """Forget all momenta and averages, and count steps from 1 again; weights stay (Adan's restart condition)."""
        for slot in self._slots.values():
            slot.counts.restart()
            for state in slot.states.values():
                state.zero_()

    # --- Sophia's Hessian -------------------------------------------------------------------------

    @contextlib.contextmanager
    def refresh_hessian(self, tokens: int) -> Iterator[None]:
        """The context of a backward pass of the mean loss over `tokens` labels that the model itself has drawn.

        For SophiaG, every `hessian_every` steps, after `step()` and `zero_grad()`.
        """
        if not isinstance(self.rule, SophiaG):
            raise ValueError(f"{type(self.rule).__name__} knows no Hessian")
        if any(parameter.grad is not None for parameter in self._slots):
            raise RuntimeError("gradients of the training loss are left, and would count as the Hessian's: "
                               "`zero_grad()` first")
        self._hessian_tokens = tokens
        with self._in_phase("refresh"):
            yield
        self._fired.clear()
        if not self.in_backward:
            for parameter, slot in self._slots.items():
                if (gradient := parameter.grad) is not None:
                    self._refresh(slot, local_gradient(parameter, gradient))
                    parameter.grad = None
        self._since_refresh = 0

    def _refresh(self, slot: Slot, gradient: Tensor) -> None:
        assert isinstance(self.rule, SophiaG)
        with torch.no_grad():
            self.rule.refresh(gradient, slot.states, self.param_groups[slot.group], self._hessian_tokens)

    @torch.no_grad()
    def unclipped_share(self) -> Tensor:
        """SophiaG: the share of all elements that move by less than the full learning rate; healthy: .1 to .5."""
        assert isinstance(self.rule, SophiaG)
        counts = torch.zeros(2, dtype=torch.float64, device=next(iter(self._engines)))
        for parameter, slot in self._slots.items():
            if id(parameter) not in self._copies:
                count = self.rule.unclipped(slot.states, self.param_groups[slot.group]).double()
                counts[0] += slot.shards.sum(count)
                counts[1] += slot.shards.shape.numel()
        if self._stages is not None:
            dist.all_reduce(counts, group=self._stages)
        return counts[0] / counts[1]

    def _warn_if_stale(self) -> None:
        if isinstance(self.rule, SophiaG):
            self._since_refresh += 1
            if self._since_refresh == 3 * self.param_groups[0]["hessian_every"]:
                warnings.warn("SophiaG's Hessian was not refreshed for "
                              f"{self._since_refresh} steps: without it, it is sign momentum. "
                              "Use `refresh_hessian()` every `hessian_every` steps", stacklevel=3)

    # --- saving -----------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """As torch's, and the last norm, by which `previous_norm` clips the next gradient."""
        return {**super().state_dict(), "norm": self.norm}

    @override
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore states and groups in place; states keep their own type (torch's would become bf16).

        Raises:
            ValueError: the groups or the states are not those of this optimizer.
        """
        self._waiting.drop()
        self._fired.clear()
        groups, saved = self.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved]:
            raise ValueError("the saved optimizer has other parameter groups")
        for group, old in zip(groups, saved, strict=True):
            for parameter, name in zip(group["params"], old["params"], strict=True):
                self._load(parameter, state_dict["state"].get(name, {}))
            group.update({key: value for key, value in old.items() if key != "params"})
        self.set_norm(state_dict.get("norm"))

    def set_norm(self, norm: Tensor | None) -> None:
        """The norm of the step before, when going on from a checkpoint."""
        self._scale = None
        self.norm = norm = None if norm is None else norm.to(next(iter(self._engines)))
        if norm is not None and self._max_norm is not None and self._clip_by == "previous_norm" and self.in_backward:
            self._scale = clip_coefficient(norm, self._max_norm)

    def _load(self, parameter: Tensor, saved: dict[str, Any]) -> None:
        state = self.state.get(parameter, {})
        if state.keys() != saved.keys():
            raise ValueError(f"the saved states are {sorted(saved)}, those of this optimizer {sorted(state)}")
        for name, value in state.items():
            value.copy_(saved[name])


def _replicated() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
