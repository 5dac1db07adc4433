"""The process in which dry runs take place: `python -m collie_lab.planning._worker`, started by `_client`.

Apart from the kernel, which so imports no torch, and which an operator that aborts on a fake tensor would take along.
A request is a line of JSON on standard input, an answer a line on standard output.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import select
import shutil
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

from collie_lab.planning._apart import DryRunError, apart

if TYPE_CHECKING:
    from collie_lab.training.probe import Path

__all__ = ["main"]

_asked_of: list[str] = []  # the folder of the request at hand


def main() -> None:
    """Answer requests until standard input ends; `argv[1]` is added to the niceness."""
    os.nice(int(sys.argv[1]))
    threading.Thread(target=_end_with_kernel, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    warnings.simplefilter("ignore")
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import collie_lab.planning.summary  # noqa: F401
    from collie_lab.planning._patches import KNOWN_PATHS

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is imported is no garbage: every later collection would look through it
    for line in sys.stdin:
        request = json.loads(line)
        _asked_of[:] = [request["folder"]]
        try:
            # Torch keeps the meshes of one layout, and takes them for those of the next.
            (answer, paths), = apart([functools.partial(_answer, request)])
            KNOWN_PATHS.update(paths)
        except DryRunError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _end_with_kernel() -> None:
    """Wait for the end of standard input, whatever is under way, and end with it.

    The system's signal at a parent's death would come when the *thread* ends that started this process.
    """
    kernel = select.poll()
    kernel.register(0, 0)  # of its end alone
    kernel.poll()
    for folder in _asked_of:  # a kernel that was killed has not removed it
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _answer(request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """The summaries, and what was found out on the way that later requests need not."""
    from collie_lab.code import load_experiment
    from collie_lab.folder import RunFolder
    from collie_lab.planning._patches import KNOWN_PATHS
    from collie_lab.planning.summary import forecast

    os.chdir(request["cwd"])  # a model may be a folder there
    experiment = load_experiment(RunFolder(request["folder"]))
    ranks = [functools.partial(forecast, experiment, **options) for options in request["ranks"]]
    summaries = apart(ranks) if len(ranks) > 1 else [ranks[0]()]
    return {"summaries": [each.to_json() for each in summaries]}, KNOWN_PATHS


if __name__ == "__main__":
    main()
