"""A rank without a model, which a grid's `runner` names: what it does stands in the arm's labels.

It keeps the run folder's contract: steps, beats, checkpoints, the stop flag, a result.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from collie_lab import rank
from collie_lab.beat import Beat
from collie_lab.code import load_experiment
from collie_lab.folder import JsonLines, RunFolder, write_json


def main() -> None:
    folder = RunFolder(sys.argv[1])
    with rank.enter(folder):
        training = load_experiment(folder).training
        resumed = folder.read("launch.json")["resume_from"]
        step = int(resumed.rpartition("-")[2]) if resumed else 0
        status, beat = "ok", Beat(folder, 0)
        metrics, events = JsonLines(folder.path / "metrics.jsonl"), JsonLines(folder.path / "events.jsonl")
        while step < training.steps and status == "ok":
            step += 1
            beat.say("step", step=step, shape=(1, 8))
            act(training.seed, step)
            metrics.append({"step": step, "time": time.time(), "loss": 1.0 / step, "lr": 0.1, "grad_norm": None,
                            "tokens": 8, "tokens_per_second": 80.0, "mfu": None, "memory_allocated": None})
            if folder.stop_flag.exists():
                events.append({"time": time.time(), "kind": "stopping", "step": step})
                status = "stopped"
            if status == "stopped" or (training.checkpoint_every and step % training.checkpoint_every == 0):
                (folder.checkpoints / f"step-{step:06d}").mkdir()
                write_json(folder.checkpoints / f"step-{step:06d}" / "state.json", {"step": step})
        folder.write("result.json", {"status": status, "steps": step, "loss": 1.0 / step, "peak_bytes": 10,
                                     "resumed": bool(resumed), "tokens_per_second": 80.0, "seconds": 0.1})
        beat.close()
    rank.leave()


def act(seed: int, step: int) -> None:
    """What goes wrong, by the seed."""
    if seed == 1:
        raise ValueError("a bug")
    if seed == 2:
        time.sleep(600)
    if seed == 3:
        held = [bytearray(os.urandom(1 << 20) * 1000)]
        time.sleep(600)
        del held
    if seed == 4:
        supervisor = int(os.environ[rank.SUPERVISOR])
        with open(f"/proc/{supervisor}/stat") as file:
            kernel = int(file.read().rpartition(")")[2].split()[1])
        os.kill(kernel, signal.SIGKILL)
        time.sleep(600)
    if seed == 5:
        time.sleep(0.2)


if __name__ == "__main__":
    main()
