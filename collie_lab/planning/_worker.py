"""The process in which dry runs take place: `python -m collie_lab.planning._worker`, started by `_client`.

Apart from the kernel, which so imports no torch, and which an operator that aborts on a fake tensor would take along.
A request is a line of JSON on standard input, an answer a line on standard output.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import warnings
from typing import Any, TextIO

from collie_lab.rank import die_with_parent

__all__ = ["main"]


def main() -> None:
    """Answer requests until standard input ends; `argv[1]` is added to the niceness."""
    os.nice(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    warnings.simplefilter("ignore")
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import collie_lab.planning.summary  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        _apart(json.loads(line), answers)


def _apart(request: dict[str, Any], answers: TextIO) -> None:
    """Answer in a process of its own: torch keeps the meshes of one layout, and takes them for those of the next."""
    child = os.fork()
    if not child:
        die_with_parent()
        answers.write(json.dumps(_answer(request)) + "\n")
        answers.flush()
        os._exit(0)
    if status := _waited(child):
        answers.write(json.dumps({"error": f"torch ended the process of the dry run ({status}): one of the model's "
                                  "operators has no fake version"}) + "\n")
        answers.flush()


def _waited(child: int) -> int:
    """The status of the child at its end. Ends with it, should the kernel go meanwhile.

    The system's signal at a parent's death would come when the *thread* ends that asked first.
    """
    kernel = select.poll()
    kernel.register(0, 0)  # of its end alone
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        if kernel.poll(5):
            os.kill(child, signal.SIGKILL)
            sys.exit()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from collie_lab.code import load_experiment
    from collie_lab.folder import RunFolder
    from collie_lab.planning.summary import forecast

    try:
        os.chdir(request.pop("cwd"))  # a model may be a folder there
        experiment = load_experiment(RunFolder(request.pop("folder")))
        return forecast(experiment, **request).to_json()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
