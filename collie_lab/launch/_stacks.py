"""What the ranks are doing at this moment: the Python stacks of their threads, asked for by a signal."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from collie_lab.folder import RunFolder, read_json

__all__ = ["innermost", "keep", "kept", "main", "suspects", "take", "waits"]

_WITHIN: Final = 2.0
_FRAME: Final = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+)(?: in (?P<name>.+))?$', re.MULTILINE)


def take(folder: RunFolder, pids: Iterable[int], ranks: Iterable[int],
         ask_others: Callable[[], object] = lambda: None) -> dict[int, str]:
    """Have every rank write its stacks to its error log (`rank.enter` has it listen), and read them.

    `pids` are the processes on this machine; `ask_others` has those of other machines do the same. A rank that does
    not answer within two seconds has an empty text.
    """
    ends = {rank: log.stat().st_size if (log := folder.log(rank, "err")).exists() else 0 for rank in ranks}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
    with contextlib.suppress(ProcessLookupError):
        ask_others()
    deadline = time.monotonic() + _WITHIN
    texts: dict[int, str] = {}
    while time.monotonic() < deadline:
        before = texts
        time.sleep(0.1)
        texts = {rank: _text_from(folder.log(rank, "err"), end) for rank, end in ends.items()}
        if texts == before and all(texts.values()):
            break
    return texts


def keep(folder: RunFolder, node: int, stacks: Mapping[int, str]) -> None:
    """Keep stacks that were taken before the end."""
    folder.write(f"errors/stacks-{node}.json", {str(rank): text for rank, text in stacks.items()})


def kept(folder: RunFolder) -> dict[int, str]:
    """The stacks that the supervisors of all nodes have kept."""
    files = (read_json(path) for path in folder.errors.glob("stacks-*.json"))
    return dict(sorted((int(rank), text) for texts in files for rank, text in texts.items()))


def suspects(beats: Mapping[int, Mapping[str, Any]], stacks: Mapping[int, str]) -> list[int]:
    """Ranks for which the others wait: who is not in a collective, and of these who has come least far.

    Where all wait in collectives (on a GPU these return at once, and the wait is elsewhere), who has come least far.
    Empty where no rank stands out.
    """
    busy = [rank for rank, beat in beats.items() if beat["doing"] != "done"]
    outside = [rank for rank in busy if stacks.get(rank) and not waits(stacks[rank])]
    group = outside or busy
    behind = [rank for rank in group if beats[rank]["step"] == min(beats[other]["step"] for other in group)]
    return behind if len(behind) < len(beats) or len(beats) == 1 else []


def waits(stack: str) -> bool:
    """Whether the main thread is in a collective of torch.distributed."""
    return any("/torch/distributed/" in frame["file"] for frame in list(_FRAME.finditer(main(stack)))[:4])


def innermost(stack: str) -> str:
    """Where the main thread is, outside of torch: `train.py:12 in forward`; empty where there is no stack."""
    frames = list(_FRAME.finditer(main(stack)))
    own = [frame for frame in frames if "/torch/" not in frame["file"] and not frame["file"].startswith("<frozen")]
    frame = next(iter(own or frames), None)
    return f"{Path(frame['file']).name}:{frame['line']}" + (f" in {frame['name']}" if frame["name"] else "") \
        if frame else ""


def main(stack: str) -> str:
    """The stack of the main thread alone."""
    blocks = re.split(r"\n(?=(?:Current thread|Thread) 0x)", stack)
    return next((block for block in blocks if "_run_module_as_main" in block), blocks[-1])


def _text_from(path: Path, offset: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
