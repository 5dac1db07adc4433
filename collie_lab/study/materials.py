"""Where a study finds real input, and what it makes of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

from collie_lab.cells import CellError, Problem

__all__ = ["clinc_splits", "find_shared"]

#: Where the folder of real data and models is looked for: beside the checkout, seen from it or from its `notebooks/`.
_BESIDE: Final = ("../shared", "../../shared")
#: The splits of CLINC150's file, by what a study does with them.
_SPLITS: Final = ("train", "val", "test")


def find_shared(folder: str | Path = "") -> Path | None:
    """The folder of real data and models: the one that is named, that of `COLLIE_LAB_SHARED`, or `../shared`.

    None where there is none and none was named.

    Raises:
        CellError: the named folder does not exist.
    """
    named = str(folder) or os.environ.get("COLLIE_LAB_SHARED", "")
    if named and not Path(named).is_dir():
        raise CellError([Problem("study", "shared", f"{named} is no folder", "the folder that holds `data` and "
                                 "`models`; without one, studies run on generated data")])
    return Path(named) if named else next((path for path in map(Path, _BESIDE) if path.is_dir()), None)


def clinc_splits(shared: Path, folder: str | Path) -> dict[str, str]:
    """Write CLINC150's training, validation and test splits into `folder` as prompts and completions; their files.

    The task (Larson et al. 2019): to name the intent of a request, one of 150. Requests without one are left out.
    """
    full = json.loads((shared / "data" / "clinc150" / "data_full.json").read_text(encoding="utf-8"))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {split: folder / f"{split}.json" for split in _SPLITS}
    for split, file in files.items():
        records = [{"prompt": f"{text}: ", "completion": intent.replace("_", " ")} for text, intent in full[split]]
        file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return {split: str(file) for split, file in files.items()}
