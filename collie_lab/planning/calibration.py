"""What this machine reaches: measured once, kept by hardware and torch version, used by every later plan."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from collie_lab.folder import write_json
from collie_lab.gpus import GPU, gpu_of_device
from collie_lab.machine import usable_cpus, user_cache
from collie_lab.planning._client import PlanError
from collie_lab.planning.rates import Rates, published

__all__ = ["calibrate", "find_rates", "processor"]

_TIMEOUT: Final = 600.0


def calibrate(ranks: int | Sequence[int] = 1) -> dict[int, Rates]:
    """Measure this machine, for plans: matrix products, attention, memory, what the host takes for an operation and,
    between several ranks, messages. Half a minute for each number of ranks; nothing else should run meanwhile.

    On GPUs where there are any, else on the CPU. What is found is kept in `~/.cache/collie_lab/calibration`
    (`XDG_CACHE_HOME`), by hardware and torch version, and `Experiment.plan` uses it from then on. On a CPU a plan wants
    a calibration with as many ranks as it has, for they share its cores and its memory.

    Args:
        ranks: how many processes measure together; several numbers one after the other.

    Returns:
        What was found, by number of ranks.

    Raises:
        ValueError: no ranks.
        PlanError: a process failed: there are more ranks than GPUs, say.
    """
    numbers = [ranks] if isinstance(ranks, int) else list(ranks)
    if not numbers or min(numbers) < 1:
        raise ValueError(f"ranks={ranks!r}: at least one is wanted")
    found = {}
    for number in numbers:
        device, rates = _measured(number)
        rates = dataclasses.replace(rates, source=f"calibration of {device or _cpu()}, {number} "
                                    f"rank{'s' if number > 1 else ''}, {time.strftime('%Y-%m-%d')}")
        known = gpu_of_device(device or "")
        _keep(known.name if known else device or _cpu(), _threads(number, device), number, rates)
        found[number] = rates
    return found


def find_rates(gpu: GPU | None, ranks: int) -> Rates | None:
    """The rates of a GPU or, without one, of so many ranks on this machine's CPU: calibrated ones, else published ones.

    None for a CPU without a calibration.
    """
    if gpu is None:
        values = _kept(_cpu()).get(f"{ranks} x {_threads(ranks, None)}")
        return None if values is None else Rates.from_json(values)
    known, kept = published(gpu), _kept(gpu.name)
    if not kept:
        return known
    most = max(kept, key=lambda key: int(key.split()[0]))
    rates = Rates.from_json(kept[most])
    return dataclasses.replace(rates, links=rates.links or known.links, network=known.network)


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
                platform.processor() or platform.machine())


def _cpu() -> str:
    return f"{processor()}, {os.cpu_count()} cores"


def _measured(ranks: int) -> tuple[str | None, Rates]:
    """The device's name, None for a CPU, and its rates."""
    from collie_lab.launch._supervise import environment, module_paths

    with tempfile.TemporaryDirectory(prefix="collie-calibration-") as name:
        folder = Path(name)
        log = folder / "log"
        with log.open("wb") as output:
            processes = [subprocess.Popen(
                [sys.executable, "-P", "-m", "collie_lab.planning._measure", str(rank), str(ranks), name],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment(ranks, module_paths()))
                for rank in range(ranks)]
        deadline = time.monotonic() + _TIMEOUT
        try:
            while None in (codes := [process.poll() for process in processes]) and not any(codes):
                if time.monotonic() > deadline:
                    raise PlanError(f"the calibration took longer than {_TIMEOUT:.0f} s")
                time.sleep(0.1)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes):  # the others would wait for one that failed
            raise PlanError("a process of the calibration failed:\n" + log.read_text(errors="replace")[-2000:])
        values = json.loads((folder / "rates.json").read_text(encoding="utf-8"))
        return values["device"], Rates.from_json(values["rates"])


def _threads(ranks: int, device: str | None) -> int:
    """How many a rank on this machine's CPU has."""
    if device:
        return 0
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, usable_cpus() // ranks))


def _file(hardware: str) -> Path:
    plain = "".join(character if character.isalnum() else "-" for character in hardware)
    return user_cache("calibration") / f"{plain}-torch-{importlib.metadata.version('torch')}.json"


def _kept(hardware: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(_file(hardware).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values


def _keep(hardware: str, threads: int, ranks: int, rates: Rates) -> None:
    file = _file(hardware)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**_kept(hardware), f"{ranks} x {threads}": rates.to_json()})
