"""Reads a checkpoint's metadata, which torch pickles, with nothing allowed but the classes that belong there."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

__all__ = ["SafeReader"]

_SAFE_MODULES = ("torch.distributed.checkpoint.", "torch.distributed.checkpoint", "collections", "pathlib")
_SAFE_NAMES = {("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("builtins", "set")}


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _SAFE_MODULES or module.startswith(_SAFE_MODULES[0]) or (module, name) in _SAFE_NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a checkpoint's metadata may not name {module}.{name}")


class SafeReader(FileSystemReader):
    """torch's reader of a checkpoint's files, which trusts no pickle in them.

    Raises:
        pickle.UnpicklingError: the metadata name a class that does not belong there.
        ValueError: a file is missing or has been cut short.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds, and where."""
        data = (Path(self.path) / ".metadata").read_bytes()
        metadata: Metadata = _SafeUnpickler(io.BytesIO(data)).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()  # type: ignore[attr-defined]
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata

    def check_files(self, metadata: Metadata) -> None:
        """That every file is there and as long as the metadata say."""
        ends: dict[str, int] = {}
        for place in metadata.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            file = Path(self.path) / name
            if not file.is_file() or file.stat().st_size < end:
                raise ValueError(f"{file} is missing or has been cut short: the checkpoint is damaged")
