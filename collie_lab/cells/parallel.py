"""The parallel cell: how many processes, and what each of them holds."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from collie_lab.cells._base import Cell

__all__ = ["Parallel", "Schedule", "check_micro_batches"]

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]


class Parallel(Cell):
    """The layout of a run over its ranks: `dp` x `tp` x `pp` of them.

    Data parallel: `zero=0` replicates the model on every data-parallel rank; `zero=2` shards gradients and optimizer
    state, `zero=3` the weights too (ZeRO stages after Rajbhandari et al., arXiv 1910.02054; FSDP2 with
    `engine="torch"`). Tensor parallel: every layer's matrices are cut after the plan that transformers ships with the
    model (Shoeybi et al., arXiv 1909.08053). Pipeline: consecutive layers on different ranks (Huang et al., arXiv
    1811.06965).
    """

    dp: int = Field(default=1, ge=1)
    """Data-parallel ranks."""
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel ranks: they share every matrix, and see the same tokens."""
    pp: int = Field(default=1, ge=1)
    """Pipeline ranks: they share the layers."""
    zero: Literal[0, 1, 2, 3] = 0
    shard: int | None = Field(default=None, ge=2)
    """Hybrid: shard over groups of so many data-parallel ranks, and replicate the groups (a node each, say).
    None: over all of them."""
    engine: Literal["torch", "deepspeed"] = "torch"
    """`deepspeed`: ZeRO 0 to 3 and offload, for data-parallel layouts; chosen by itself for `zero=1` and `offload`."""
    schedule: Schedule = "1f1b"
    """The order of a pipeline's micro-batches. `interleaved` and `zero_bubble` give each rank several stages."""
    micro_batches: int | None = Field(default=None, ge=1)
    """Micro-batches of a step and data-parallel rank in a pipeline, instead of `Training.micro_batch_size`.
    None, where that is not set either: up to four for each stage."""
    sequence_parallel: bool = False
    """With `tp`: keep the activations between the matrices in pieces of the sequence too (Korthikanti et al.,
    arXiv 2205.05198). The same messages, 1/tp of the memory."""
    offload: Literal["optimizer", "parameters"] | None = None
    """Keep the optimizer's state in the host's memory and update there; `parameters`: the weights too."""

    @model_validator(mode="wrap")
    @classmethod
    def _choose_engine(cls, fields: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """DeepSpeed alone has ZeRO-1 and offload. Nobody has set it then: a variant chooses anew."""
        if not isinstance(fields, dict) or "engine" in fields or not (fields.get("zero") == 1 or fields.get("offload")):
            return validate(fields)
        cell = validate({**fields, "engine": "deepspeed"})
        cell.model_fields_set.discard("engine")
        return cell

    @model_validator(mode="after")
    def _shards_divide(self) -> Self:
        if self.shard is not None and self.dp % self.shard:
            raise ValueError(f"shard={self.shard} does not divide dp={self.dp}")
        return self

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp * self.tp * self.pp

    def micro_batch_size(self, batch_size: int, micro_batch_size: int | None) -> int:
        """Sequences of one forward pass on one data-parallel rank, from the `Training` cell's fields."""
        share = max(1, batch_size // self.dp)
        if micro_batch_size is not None:
            return micro_batch_size
        if self.pp == 1:
            return share
        most = self.micro_batches or 4 * self.pp * self.virtual_stages
        count = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
        return share // count

    @property
    def virtual_stages(self) -> int:
        """Pipeline stages on each rank."""
        return 2 if self.pp > 1 and self.schedule in ("interleaved", "zero_bubble") else 1


def check_micro_batches(schedule: Schedule, ranks: int, count: int) -> None:
    """Whether a schedule can do with so many micro-batches of a step.

    Raises:
        ValueError: it cannot; what would do.
    """
    if schedule == "1f1b" and count < ranks:
        raise ValueError(f"schedule='1f1b' needs at least as many micro-batches as stages: {count} < pp={ranks}; "
                         "use smaller micro-batches, or schedule='gpipe'")
    if schedule == "interleaved" and count % max(1, count // ranks):
        raise ValueError(f"schedule='interleaved' deals micro-batches in equal rounds of at least pp={ranks}, which "
                         f"{count} are not; use a multiple of {ranks}, or schedule='1f1b'")
