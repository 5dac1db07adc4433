"""Starts the supervisor by this file's path, without the package itself: `python -P _boot.py <folder> lead|join|pool`.

`import collie_lab` imports pydantic, which takes longer than all that the supervisor does before it starts
torchrun. Empty packages stand in for it, so that only the modules the supervisor names are imported.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    for name, place in (("collie_lab", here.parent), ("collie_lab.launch", here)):
        sys.modules[name] = package = types.ModuleType(name)
        package.__path__ = [str(place)]
    from collie_lab.launch.supervisor import supervise

    sys.exit(supervise(sys.argv[1], sys.argv[2]))
