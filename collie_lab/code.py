"""How code and data of a notebook travel to the ranks: by value, into `code.pkl` of the run folder.

The kernel packs (`pack`), a rank loads (`load`, `load_experiment`). Functions and classes of the notebook
and of local modules travel by value, as the kernel has them in memory; installed packages by reference.
The source lines go along, so that a traceback on a rank shows the cell's own lines.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import linecache
import os
import pickle
import site
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Final

import cloudpickle
import yaml

from collie_lab.cells import CellError, Experiment, Problem
from collie_lab.folder import RunFolder

__all__ = ["LIMIT", "is_installed", "load", "load_experiment", "pack"]

#: Largest size in bytes of what a run may carry along. Data belong into files.
LIMIT: Final = 64 * 2**20

_FILE = "code.pkl"


def pack(experiment: Experiment) -> tuple[dict[str, Any], bytes]:
    """The experiment as a mapping that YAML can hold, and the bytes of `code.pkl` (empty if not needed).

    Raises `CellError` for what cannot travel: a tensor on a GPU, an open file or lock, more than `LIMIT`.
    """
    values: dict[str, Any] = {}

    def external(path: str, value: Any) -> str:
        values[path] = value
        return _reference(value)

    mapping = experiment.to_dict(external)
    if not values:
        return mapping, b""
    pickler, payload = _dump(values)
    sources = {name: lines for name in sorted(pickler.files)
               if not is_installed(name) and (lines := linecache.getlines(name))}
    return mapping, pickle.dumps({"sources": sources, "values": payload})


def load(folder: RunFolder) -> dict[str, Any]:
    """The values of `code.pkl` by their place in the experiment; their source lines go into `linecache`."""
    path = folder.path / _FILE
    if not path.exists():
        return {}
    package = pickle.loads(path.read_bytes())
    for name, lines in package["sources"].items():
        # Without a modification time an entry stays, whatever becomes of a file of that name.
        linecache.cache[name] = (sum(map(len, lines)), None, lines, name)
    return pickle.loads(package["values"])  # type: ignore[no-any-return]


def load_experiment(folder: RunFolder) -> Experiment:
    """The experiment of a run, as it was launched: `experiment.yaml` with the values of `code.pkl` in place."""
    mapping = yaml.safe_load((folder.path / "experiment.yaml").read_text(encoding="utf-8"))
    return Experiment.from_dict(_restore(mapping, load(folder), ""))


def _restore(value: Any, values: Mapping[str, Any], path: str) -> Any:
    """The same structure with the packed values at their paths, which are those of `Cell.to_dict`."""
    if path in values:
        return values[path]
    prefix = f"{path}." if path else ""
    if isinstance(value, Mapping):
        return {key: _restore(item, values, f"{prefix}{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_restore(item, values, f"{prefix}{index}") for index, item in enumerate(value)]
    return value


def _reference(value: Any) -> str:
    """What stands in the YAML for a packed value: for readers, never parsed."""
    if callable(value):
        kind = "class" if isinstance(value, type) else "function" if hasattr(value, "__qualname__") else "object"
        return f"<{kind} {getattr(value, '__qualname__', type(value).__qualname__)}, in {_FILE}>"
    return f"<list of {len(value)} records, in {_FILE}>"


# --- packing

class _RefusedError(Exception):
    """Raised inside the pickler; becomes a `CellError` that names the variable."""


class _Sink:
    """Keeps what is written, up to a limit in bytes; with `limit=None` it only counts."""

    def __init__(self, limit: int | None):
        self.size = 0
        self.parts: list[bytes] = []
        self._limit = limit

    def write(self, data: bytes | memoryview) -> int:
        size = memoryview(data).nbytes
        self.size += size
        if self._limit is not None:
            if self.size > self._limit:
                raise _RefusedError("too large")
            self.parts.append(bytes(data))
        return size


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Notes the functions it meets and the files they come from; refuses tensors on an accelerator."""

    def __init__(self, sink: _Sink):
        super().__init__(sink)
        self.functions: list[types.FunctionType] = []

    @property
    def files(self) -> set[str]:
        return {function.__code__.co_filename for function in self.functions}

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            self.functions.append(value)
        if isinstance(value, types.CodeType) and value.co_filename:
            # cloudpickle 3.1.3 forgets the file, by which a traceback finds its lines: the two travel apart.
            return _in_file, (value.replace(co_filename=""), value.co_filename)
        tensor = getattr(sys.modules.get("torch"), "Tensor", None)  # torch is never imported for this
        if tensor is not None and isinstance(value, tensor) and value.device.type not in ("cpu", "meta"):
            raise _RefusedError(f"is (or holds) a tensor on {value.device}")
        return super().reducer_override(value)


def _in_file(code: types.CodeType, file: str) -> types.CodeType:
    return code.replace(co_filename=file)


def _dump(values: dict[str, Any]) -> tuple[_Pickler, bytes]:
    """Pickle all values in one go, so that they share what they captured."""
    with _local_modules_by_value():
        sink = _Sink(LIMIT)
        pickler = _Pickler(sink)
        try:
            pickler.dump(values)
        except _RefusedError as refusal:
            raise _explain(values, pickler, refusal) from None
        except Exception as error:
            # A local module may hold what cannot be pickled, such as a lock; the ranks can still import it.
            failure = error
        else:
            return pickler, b"".join(sink.parts)
    sink = _Sink(LIMIT)
    pickler = _Pickler(sink)
    try:
        pickler.dump(values)
    except Exception:
        raise _explain(values, pickler, failure) from None
    return pickler, b"".join(sink.parts)


def _explain(values: Mapping[str, Any], pickler: _Pickler, error: Exception) -> CellError:
    """A refusal in the user's words, with the names of the variables to blame."""
    captured = {name: value for function in pickler.functions if not is_installed(function.__code__.co_filename)
                for name, value in _captured(function).items() if not isinstance(value, types.FunctionType)}
    captured |= {path: value for path, value in values.items() if not isinstance(value, types.FunctionType)}
    if str(error) == "too large":
        sizes = sorted(((_measure(value), name) for name, value in captured.items()), reverse=True)[:3]
        largest = ", ".join(f"`{name}` {size / 2**20:.0f} MiB" for size, name in sizes if size)
        message = f"what its code captures is larger than {LIMIT // 2**20} MiB: {largest}"
        return _problem(values, message, "write large data to a file and give its path")
    guilty = [name for name, value in captured.items() if not _can_travel(value)]
    what = ", ".join(f"`{name}`" for name in guilty) or "a captured value"
    if isinstance(error, _RefusedError):
        return _problem(values, f"{what} {error}", "capture a copy on the CPU: `.cpu()`, or make it on the rank")
    return _problem(values, f"{what} cannot travel to the ranks: {error}", "make it inside the function")


def _problem(values: Mapping[str, Any], message: str, remedy: str) -> CellError:
    return CellError([Problem("Experiment", ", ".join(values), message, remedy)])


def _captured(function: types.FunctionType) -> dict[str, Any]:
    """Globals and closure variables that a function, or one nested in it, refers to."""
    names: set[str] = set()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    found = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable that is not set yet
            found[name] = cell.cell_contents
    return found


def _measure(value: Any) -> int:
    """Size of a value as a pickle, in bytes; 0 for what cannot be pickled."""
    sink = _Sink(None)
    with contextlib.suppress(Exception):
        _Pickler(sink).dump(value)
    return sink.size


def _can_travel(value: Any) -> bool:
    try:
        _Pickler(_Sink(None)).dump(value)
    except Exception:
        return False
    return True


# --- what is local

@contextlib.contextmanager
def _local_modules_by_value() -> Iterator[None]:
    """Have cloudpickle pack local modules by value; its registrations are as before afterwards."""
    before = cloudpickle.list_registry_pickle_by_value()
    added = [module for name, module in list(sys.modules.items())
             if name not in before and _is_local(name, module)]
    for module in added:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in added:
            cloudpickle.unregister_pickle_by_value(module)


def _is_local(name: str, module: types.ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or name == "__main__" or getattr(module, "__name__", None) != name:
        return False
    top = name.partition(".")[0]
    return top != __name__.partition(".")[0] and not is_installed(file) and not _is_distribution(top)


@cache
def _is_distribution(name: str) -> bool:
    """Whether a package is installed, though its files may lie anywhere (an editable install)."""
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def is_installed(path: str) -> bool:
    """Whether an absolute path belongs to Python or its installed packages, which the ranks find themselves."""
    return os.path.join(path, "").startswith(_installed_roots())


@cache
def _installed_roots() -> tuple[str, ...]:
    # Not `sys.prefix`: a project may lie below it, as in /usr/local/src.
    paths = [*site.getsitepackages(), site.getusersitepackages(),
             *(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib"))]
    return tuple({os.path.join(path, "") for path in paths})
