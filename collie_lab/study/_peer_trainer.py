"""transformers' Trainer with the settings of an experiment, and what is measured of it."""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import DistributedType, PartialState
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from collie_lab.beat import Beat
from collie_lab.cells import AdamW, Experiment, Parallel
from collie_lab.data import Documents
from collie_lab.folder import RunFolder
from collie_lab.optim.groups import parameter_groups
from collie_lab.parallel.deepspeed import start_deepspeed
from collie_lab.study._peer_rows import Rows, collator
from collie_lab.training.flops import StepFlops, peak_flops
from collie_lab.training.memory import build_memory
from collie_lab.training.meters import Meters, StepFigures
from collie_lab.training.schedule import learning_rate_factor
from collie_lab.training.weights import blueprint, configuration, fill

__all__ = ["PeerTrainer", "Watch", "arguments", "build_model", "sizes"]


class PeerTrainer(transformers.Trainer):  # type: ignore[misc]
    """The Trainer, with the experiment's rows, learning rates and weight decay; `watch` sees its steps."""

    def __init__(self, experiment: Experiment, folder: RunFolder, watch: Watch):
        # First the arguments: with ZeRO-3 they have the model made in shards.
        settings = arguments(experiment, folder, watch.device)
        model = build_model(experiment)
        documents = Documents.load(folder.path / "data" / "train")
        self._experiment, self._watch = experiment, watch
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        watch.rows = Rows(experiment, documents, context)
        super().__init__(model=model, args=settings, train_dataset=watch.rows,
                         data_collator=collator(packed=experiment.data.packing), callbacks=[watch])
        self.remove_callback(transformers.PrinterCallback)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Those that decay in ours."""
        groups = parameter_groups(model, self._experiment.optimizer, named=True)
        return [name for group in groups if group["weight_decay"] for name, _ in group["params"]]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
                         ) -> torch.optim.lr_scheduler.LRScheduler:
        """The experiment's learning rates."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda done: learning_rate_factor(self._experiment.training, done + 1))
        return self.lr_scheduler

    def get_batch_samples(self, *arguments: Any, **named: Any) -> Any:
        """The Trainer's, which begins a step: what it takes to make a batch counts, as it does in our loop."""
        self._watch.begin(self.optimizer.param_groups[0]["lr"])
        return super().get_batch_samples(*arguments, **named)

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """The Trainer's, whose loss is kept on the device."""
        loss: Tensor = super().training_step(*arguments, **named)
        self._watch.add(loss)
        return loss


class Watch(TrainerCallback):  # type: ignore[misc]
    """Writes a run's metrics and signs of life as our loop does, and heeds its stop flag.

    Attributes:
        device: of this rank.
        rows: what is trained on.
        meters, memory: those of our loop.
        step: optimizer steps done.
    """

    rows: Rows

    def __init__(self, experiment: Experiment, folder: RunFolder, device: torch.device, flops: StepFlops):
        self._experiment, self._folder, self.device, self._flops = experiment, folder, device, flops
        self._rank, self.step = int(os.environ.get("RANK", "0")), 0
        self._beat = Beat(folder, self._rank)
        self.memory = build_memory(device)
        self.meters = Meters(folder if self._rank == 0 else None, device, experiment.parallel.world_size,
                             peak_flops(device))
        self._measured: contextlib.AbstractContextManager[None] | None = None
        self._status, self._reason = "ok", ""

    def begin(self, lr: float) -> None:
        """A step begins."""
        self._beat.say("step", step=self.step + 1)
        self._mark, self._lr = self.meters.mark(), lr
        self._loss = torch.zeros((), device=self.device)
        self._measured = self.memory.step()
        self._measured.__enter__()

    def add(self, loss: Tensor) -> None:
        """The loss of a micro-batch: its share of the step's, times the ranks."""
        self._loss += loss.float()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All figures of a step; those of the last one on a GPU, so that it need not wait."""
        assert self._measured is not None
        self._measured.__exit__(None, None, None)
        self._measured = None
        self.step += 1
        stop = self._rank == 0 and self._folder.stop_flag.exists()
        values = torch.stack([self._loss, torch.full_like(self._loss, float(stop))])
        if dist.is_initialized():
            dist.all_reduce(values)
            values /= torch.tensor([dist.get_world_size(), 1.0]).to(self.device)
        nothing = torch.full_like(self._loss, math.nan)
        tokens, attended = self.rows.tokens[self.step - 1], self.rows.attended[self.step - 1]
        self.meters.push(self.step, torch.stack([values[0], nothing, values[1], torch.zeros_like(nothing), nothing]),
                         lr=self._lr, tokens=tokens, flops=self._flops.of(tokens, attended),
                         memory=self.memory.step_bytes, began=self._mark)
        if self._judge(self.meters.pull()):
            control.should_training_stop = True

    def _judge(self, figures: list[StepFigures]) -> bool:
        """Whether the run ends here; on all ranks alike."""
        for step in figures:
            if not math.isfinite(step.loss):
                self._status, self._reason = "diverged", f"the loss of step {step.step} is {step.loss}"
            elif step.stop and self.step < self._experiment.training.steps and self._status == "ok":
                self._status = "stopped"
        return self._status != "ok"

    def end(self) -> tuple[str, str]:
        """How the run ended, and why."""
        self._judge(self.meters.pull(all_=True))
        self._beat.close()
        return self._status, self._reason


def sizes(experiment: Experiment) -> tuple[dict[str, int], StepFlops]:
    """Parameters and FLOPs of the model, without its weights."""
    model = blueprint(experiment.model)
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": count, "trainable": count}, StepFlops.of_model(model)


def build_model(experiment: Experiment) -> transformers.PreTrainedModel:
    """The model as transformers makes it, in fp32; weights that are drawn are those of our run.

    Not with ZeRO-3, which has transformers draw them shard by shard: no rank could hold ours whole.
    """
    cell, seed = experiment.model, experiment.training.seed
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa",
                               "trust_remote_code": cell.trust_remote_code}
    if cell.init == "pretrained":
        return AutoModelForCausalLM.from_pretrained(cell.location, revision=cell.revision, **options)
    if experiment.parallel.zero == 3:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(configuration(cell), **options)
    model = blueprint(cell)
    model.set_attn_implementation("sdpa")
    fill(model, cell, seed, torch.device("cpu"))
    return model


def arguments(experiment: Experiment, folder: RunFolder, device: torch.device) -> TrainingArguments:
    """The Trainer's settings for an experiment whose optimizer is AdamW."""
    cell, training, parallel = experiment.optimizer, experiment.training, experiment.parallel
    assert isinstance(cell, AdamW)
    micro = parallel.micro_batch_size(training.batch_size, training.micro_batch_size)
    recompute = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}} \
        if training.recompute == "full" else {}
    if parallel.engine == "deepspeed":
        start_deepspeed(device)
        if device.type == "cpu":
            _let_deepspeed_use_cpus()
    return TrainingArguments(
        output_dir=str(folder.path / "trainer"), use_cpu=device.type == "cpu" and parallel.engine == "torch",
        ddp_backend="gloo" if device.type == "cpu" and parallel.dp > 1 else None, ddp_find_unused_parameters=False,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=training.batch_size // (micro * parallel.dp), max_steps=training.steps,
        optim="adamw_torch_fused", learning_rate=cell.lr, adam_beta1=cell.betas[0], adam_beta2=cell.betas[1],
        adam_epsilon=cell.eps, weight_decay=cell.weight_decay, max_grad_norm=training.clip_grad_norm or 0.0,
        lr_scheduler_type="constant",  # where nobody makes another
        bf16=training.precision == "bf16", torch_compile=training.compile, seed=training.seed,
        train_sampling_strategy="sequential", dataloader_num_workers=0, dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False, save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
        logging_nan_inf_filter=False,  # it waits for the device at every micro-batch
        deepspeed=_deepspeed(parallel, training.precision) if parallel.engine == "deepspeed" else None,
        **recompute,
    )


def _deepspeed(parallel: Parallel, precision: str) -> dict[str, Any]:
    """What transformers' guide to DeepSpeed advises for a ZeRO stage."""
    zero: dict[str, Any] = {"stage": parallel.zero, "overlap_comm": True, "contiguous_gradients": True}
    if parallel.zero == 3:
        zero |= {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
                 "stage3_param_persistence_threshold": "auto"}
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True, "bf16": {"enabled": precision == "bf16"},
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto", "gradient_clipping": "auto"}


def _let_deepspeed_use_cpus() -> None:
    """accelerate takes a process without a GPU for the only one, though its DeepSpeed would run on gloo as well."""
    def backend(self: PartialState, *_: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_CPU

    PartialState._prepare_backend = backend
