"""A rank without a model: it calls the experiment's callbacks at every step and keeps the run folder's contract."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from collie_lab import rank
from collie_lab.beat import Beat
from collie_lab.code import load_experiment
from collie_lab.folder import JsonLines, RunFolder


class Trainer:
    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.rank = int(os.environ["RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.beat = Beat(folder, self.rank)
        self.step = 0

    def barrier(self) -> None:
        """A collective; torch is imported only where one is wanted."""
        if "torch" not in sys.modules:
            self.beat.say("loading")
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo")
            self.beat.say("step")
        dist.barrier()

    def first_step(self) -> int:
        """The step of the checkpoint to resume from."""
        path = self.folder.read("launch.json")["resume_from"]
        return int(Path(path).name.removeprefix("step-")) if path else 0

    def stopping(self) -> bool:
        """Whether the stop flag is there, for all ranks as rank 0 sees it: none waits for one that has left."""
        flag = self.folder.stop_flag.exists()
        dist = sys.modules.get("torch.distributed")
        if dist is not None and dist.is_initialized():
            flags = [flag]
            dist.broadcast_object_list(flags, src=0)
            flag = flags[0]
        return flag

    def close(self) -> None:
        """No rank may be gone while another still waits for it."""
        self.beat.close()
        dist = sys.modules.get("torch.distributed")
        if dist is not None and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def say(self, name: str, record: dict[str, Any]) -> None:
        lines = JsonLines(self.folder.path / f"{name}.jsonl")
        lines.append(record)
        lines.close()


def main() -> None:
    folder = RunFolder(sys.argv[1])
    with rank.enter(folder):
        experiment = load_experiment(folder)
        trainer = Trainer(folder)
        status = "ok"
        trainer.step = trainer.first_step()
        if trainer.rank == 0:
            trainer.say("events", {"time": time.time(), "kind": "start", "step": trainer.step,
                                   "steps": experiment.training.steps})
        while trainer.step < experiment.training.steps:
            trainer.step += 1
            trainer.beat.say("step", step=trainer.step, shape=(1, 8))
            for callback in experiment.callbacks:
                callback(trainer)
            if trainer.rank == 0:
                trainer.say("metrics", {"step": trainer.step, "time": time.time(), "loss": 1.0 / trainer.step,
                                        "lr": 0.1, "grad_norm": None, "tokens": 8, "tokens_per_second": 80.0,
                                        "mfu": None, "memory_allocated": None})
            if trainer.stopping():
                status = "stopped"
                if trainer.rank == 0:
                    trainer.say("events", {"time": time.time(), "kind": "stopping", "step": trainer.step})
                break
        if trainer.rank == 0:
            trainer.say("events", {"time": time.time(), "kind": "evaluation", "step": trainer.step, "perplexity": 2.5})
            folder.write("result.json", {"status": status, "steps": trainer.step, "loss": 0.5, "perplexity": 2.5,
                                         "peak_bytes": 10, "tokens_per_second": 80.0, "seconds": 0.1})
        trainer.close()
    rank.leave()


if __name__ == "__main__":
    main()
