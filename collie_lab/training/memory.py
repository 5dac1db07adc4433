"""Peak memory: the allocator's own count on a GPU, that of an allocator in front of torch's on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_iter

from collie_lab.compiler import build, find_compiler

__all__ = ["CpuMemory", "CudaMemory", "NoMemory", "build_memory", "held_bytes", "uncounted", "worst_rank"]


class CudaMemory:
    """`torch.cuda.max_memory_allocated`, step by step and over the whole run. Costs nothing."""

    def __init__(self, device: torch.device):
        self._device = device
        self.peak_bytes: int | None = None
        self.step_bytes: int | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one optimizer step."""
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        self.step_bytes = torch.cuda.max_memory_allocated(self._device)
        self.peak_bytes = max(self.peak_bytes or 0, self.step_bytes)


class CpuMemory:
    """Bytes of live CPU tensors, whichever thread makes or frees them; costs too little to be measured.

    As on a GPU, the peak is that of the steps: what making and sharding the model takes does not count, nor what was
    there before (in a pool, say).
    """

    def __init__(self) -> None:
        gc.collect()  # garbage of an earlier run in this process, freed under way, would count against this one
        self._counter = _counter()
        self._before: int = self._counter.live_bytes()
        self.peak_bytes: int | None = None
        self.step_bytes: int | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one optimizer step."""
        self._counter.reset_peak()
        yield
        self.step_bytes = self._counter.peak_bytes() - self._before
        self.peak_bytes = max(self.peak_bytes or 0, self.step_bytes)


class NoMemory:
    """Where nothing can count, and why."""

    peak_bytes: int | None = None
    step_bytes: int | None = None

    def __init__(self, reason: str):
        self.reason = f"peak memory is not measured: {reason}"

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one optimizer step."""
        yield


def build_memory(device: torch.device) -> CudaMemory | CpuMemory | NoMemory:
    """The meter of a device."""
    if device.type == "cuda":
        return CudaMemory(device)
    if find_compiler() is None:
        return NoMemory("on a CPU that takes a C++ compiler, and none was found. Install g++ or clang")
    try:
        return CpuMemory()
    except OSError as error:  # a compiler that is too old, say
        return NoMemory(str(error))


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that this rank keeps at this moment: `weights_bytes` (buffers too), `gradients_bytes`, `optimizer_bytes`.

    Each storage counts once, whole: what is tied, and the buckets that gradients are views of.
    """
    parameters = list(model.parameters())
    held = {"weights": [*parameters, *model.buffers()],
            "gradients": [parameter.grad for parameter in parameters if parameter.grad is not None],
            "optimizer": [value for value in tree_iter(list(optimizer.state.values())) if isinstance(value, Tensor)]}
    found, seen = {}, set[int]()
    for name, tensors in held.items():
        storages = {storage._cdata: storage.nbytes() for storage in map(_storage, tensors)
                    if storage.device.type == parameters[0].device.type and storage._cdata not in seen}
        seen.update(storages)
        found[f"{name}_bytes"] = sum(storages.values())
    return found


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage()


def worst_rank(peak_bytes: int | None, held: dict[str, int], device: torch.device) -> dict[str, int | None]:
    """`peak_bytes` of the rank that needed most (None: not measured), and what it held; on all ranks together, which
    name the same things."""
    own = torch.tensor([float(peak_bytes or 0), *held.values()], dtype=torch.float64, device=device)
    rows = [own]
    if dist.is_initialized():
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, own)
    worst = max(row.tolist() for row in rows)
    found = dict(zip(held, map(int, worst[1:]), strict=True))
    return {"peak_bytes": int(worst[0]) or None, **found}


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Within it, what this thread makes is not counted: where there is a GPU, it would be in the host's memory."""
    if not _counter.cache_info().currsize:
        yield
        return
    before = _counter().count(False)
    try:
        yield
    finally:
        _counter().count(before)


# torch's own profiler sees only the threads that it was started in: what gloo's threads free, it takes for live.
_SOURCE: Final = """
#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <c10/core/CPUAllocator.h>

namespace {
std::mutex guard;
std::unordered_map<void*, int64_t> sizes;
int64_t live = 0, peak = 0;
thread_local bool counts = true;

void release(void* data);

struct Counter final : c10::Allocator {
  c10::Allocator* behind = c10::GetCPUAllocator();

  c10::DataPtr allocate(size_t bytes) override {
    void* data = behind->raw_allocate(bytes);
    if (data != nullptr && counts) {
      std::lock_guard<std::mutex> lock(guard);
      sizes[data] = bytes;
      live += bytes;
      peak = std::max(peak, live);
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { behind->copy_data(to, from, bytes); }
};

Counter& counter() {
  static Counter& one = *new Counter;  // outlives all tensors
  return one;
}

void release(void* data) {
  if (data == nullptr) return;
  {
    std::lock_guard<std::mutex> lock(guard);
    auto found = sizes.find(data);
    if (found != sizes.end()) {
      live -= found->second;
      sizes.erase(found);
    }
  }
  counter().behind->raw_deallocate(data);
}
}  // namespace

extern "C" {
void start() { c10::SetAllocator(c10::DeviceType::CPU, &counter(), 100); }
int64_t live_bytes() { std::lock_guard<std::mutex> lock(guard); return live; }
int64_t peak_bytes() { std::lock_guard<std::mutex> lock(guard); return peak; }
void reset_peak() { std::lock_guard<std::mutex> lock(guard); peak = live; }
bool count(bool wanted) { return std::exchange(counts, wanted); }
}
"""


@functools.cache
def _counter() -> ctypes.CDLL:
    """The allocator, in its place from now on; building it takes two seconds once."""
    root = Path(torch.__file__).parent
    library = build(f"// torch {torch.__version__}\n{_SOURCE}", [
        "-O1", "-std=c++20", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"])
    library.live_bytes.restype = library.peak_bytes.restype = ctypes.c_int64
    library.count.restype, library.count.argtypes = ctypes.c_bool, [ctypes.c_bool]
    library.start()
    return library
