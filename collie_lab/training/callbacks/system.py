"""What a machine does while it trains: a thread of one rank of each machine looks every few seconds."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from typing_extensions import override

from collie_lab.cells import Callback, SystemMeters
from collie_lab.folder import JsonLines

__all__ = ["SystemThread"]


class SystemThread(Callback):
    """Writes `system-N.jsonl` of machine N, from the start to the end of the run."""

    def __init__(self, cell: SystemMeters):
        self._every = cell.every_seconds
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @override
    def on_start(self, trainer: Any) -> None:
        if os.environ.get("LOCAL_RANK", str(trainer.rank)) != "0":
            return
        node = int(os.environ.get("GROUP_RANK", "0"))
        if torch.cuda.is_available() and importlib.util.find_spec("pynvml") is None:
            trainer.event("warning", text="how busy the GPUs are is not measured: pip install nvidia-ml-py")
        lines = JsonLines(trainer.folder.path / f"system-{node}.jsonl")
        self._thread = threading.Thread(target=self._watch, args=(node, lines), name="system meters", daemon=True)
        self._thread.start()

    @override
    def on_end(self, trainer: Any, result: Mapping[str, Any]) -> None:
        self._close()

    @override
    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _watch(self, node: int, lines: JsonLines) -> None:
        gauge = _Gauge()
        try:
            while not self._over.wait(self._every):
                lines.append({"node": node, **gauge.read()})
            lines.append({"node": node, **gauge.read()})  # a short run has one line at least
        except OSError as error:  # a full disk, say: the training need not end for it
            print(f"system meters end: {error}", flush=True)
        finally:
            lines.close()


class _Gauge:
    """Figures between two looks: what counts upwards as a rate."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first gives no figure
        self._moment, self._counts = time.monotonic(), _counts()
        self._gpus = range(torch.cuda.device_count()) if importlib.util.find_spec("pynvml") else range(0)

    def read(self) -> dict[str, float]:
        """`cpu` in percent of all cores, memory in bytes, disk and network in bytes per second, GPUs in percent."""
        moment, counts = time.monotonic(), _counts()
        seconds = max(moment - self._moment, 1e-3)
        rates = {name: (count - self._counts[name]) / seconds for name, count in counts.items()}
        self._moment, self._counts = moment, counts
        gpus = {f"gpu_{index}": float(torch.cuda.utilization(index)) for index in self._gpus}
        return {"time": time.time(), "cpu": psutil.cpu_percent(), "memory": float(psutil.virtual_memory().used),
                **rates, **gpus}


def _counts() -> dict[str, int]:
    """Bytes since the machine began; without disks or network cards that the system does not show."""
    disk, network = psutil.disk_io_counters(), psutil.net_io_counters()
    found = {} if disk is None else {"disk_read": disk.read_bytes, "disk_write": disk.write_bytes}
    return found | ({} if network is None else {"network_sent": network.bytes_sent,
                                                "network_received": network.bytes_recv})
