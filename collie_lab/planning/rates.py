"""How fast hardware is: seconds of an operation by its size, measured (`calibrate`) or published."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

from collie_lab.gpus import GPU

__all__ = ["Curve", "Rates", "published"]


@dataclass(frozen=True)
class Curve:
    """Seconds by size (FLOPs of a product, bytes of anything else), at some sizes in rising order.

    Between two it is a straight line in the logarithms; outside of them seconds are proportional to the size.
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __call__(self, size: float) -> float:
        """Seconds."""
        if size <= 0:
            return 0.0
        if size <= self.sizes[0]:
            return self.seconds[0] * size / self.sizes[0]
        if size >= self.sizes[-1]:
            return self.seconds[-1] * size / self.sizes[-1]
        after = bisect.bisect_right(self.sizes, size)
        (x0, x1), (y0, y1) = self.sizes[after - 1 : after + 1], self.seconds[after - 1 : after + 1]
        share = math.log(size / x0) / math.log(x1 / x0)
        return y0 * math.exp(share * math.log(y1 / y0))

    @classmethod
    def at(cls, rate: float) -> Self:
        """The same rate at every size."""
        return cls((1.0,), (1.0 / rate,))


@dataclass(frozen=True)
class Rates:
    """What a rank's device, its host and its links take.

    Attributes:
        source: where the figures come from.
        margin: how far off seconds made of them may be, as a share: what checks against measured steps showed.
        device: by `kind dtype` (`matmul bf16`, `attention bf16 64` with the size of a head) or `kind` alone.
        host: seconds that the host takes for an operation of the `forward` or `backward` phase, or a parameter's
            `update`.
        asynchronous: the host runs ahead of the device. Else one waits for the other.
        overlap: the share of a data-parallel message that is hidden behind computation where there is enough of it.
        links: inside a machine, by collective: seconds by bytes that leave a rank.
        network: between machines.
    """

    source: str
    margin: float
    device: Mapping[str, Curve]
    host: Mapping[str, float]
    asynchronous: bool
    overlap: float
    links: Mapping[str, Curve] = field(default_factory=dict)
    network: Curve | None = None

    def seconds(self, kind: str, dtype: str, size: float) -> float | None:
        """Of one operation on the device; None where nothing is known of it."""
        curve = self.device.get(f"{kind} {dtype}") or self._near(kind, dtype) or self.device.get(kind)
        return None if curve is None else curve(size)

    def _near(self, kind: str, dtype: str) -> Curve | None:
        """Of attention with heads of another size: the nearest that is known."""
        plain, _, head = dtype.partition(" ")
        if not head:
            return None
        known = {int(name.split()[2]): curve for name, curve in self.device.items()
                 if name.startswith(f"{kind} {plain} ")}
        if not known:
            return self.device.get(f"{kind} {plain}")
        return known[min(known, key=lambda each: abs(math.log(each / int(head))))]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        def curves(found: Mapping[str, Any]) -> dict[str, Curve]:
            return {name: _curve(each) for name, each in found.items()}

        return cls(**{**values, "device": curves(values["device"]), "links": curves(values["links"]),
                      "network": _curve(values["network"]) if values["network"] else None})


def _curve(values: Mapping[str, Sequence[float]]) -> Curve:
    return Curve(tuple(values["sizes"]), tuple(values["seconds"]))


#: Shares of the peak that large matrix products, attention forward and attention backward reach, and the margin.
_EFFICIENCY: Final[dict[str, tuple[float, float, float, float]]] = {
    # 790 TFLOP/s measured; FlashAttention-2 on Hopper (arXiv 2407.08608, figures 5 and 6); margin: docs/plans.md
    "H200": (0.80, 0.38, 0.32, 0.15),
    "H100": (0.72, 0.38, 0.32, 0.3),
    "A100": (0.85, 0.60, 0.48, 0.3),  # FlashAttention-2 (arXiv 2307.08691, figures 5 and 6)
}
_USUAL: Final = (0.75, 0.40, 0.33, 0.3)
#: Share of the memory's bandwidth: a copy on an H200 moves 4.3 of 4.8 TB/s, and so do optimizers' kernels.
_BANDWIDTH: Final = 0.9
#: The same of a model's element-wise kernels (norms, rotations, casts, sums): what makes the plan of one step of
#: llama-1b with AdamW, 4 x 2,048 tokens on an H200, come true.
_ELEMENTWISE: Final = 0.61
#: Seconds of the host: what makes the plan of LoRA's step on 2 x 2,048 tokens come true there, which waits for the
#: host; backward, without Python, at three quarters of forward. An update: 5 to 6 µs a tensor of llama-7b.
_HOST: Final = {"forward": 28e-6, "backward": 21e-6, "update": 6e-6}
#: Share of a link that NCCL's rings reach with large messages (nccl-tests on DGX machines: 360 of 450 GB/s).
_LINK: Final = 0.8
#: Seconds before the first byte of a message arrives.
_LATENCY: Final = 20e-6
#: Seconds that the smallest kernel takes.
_KERNEL: Final = 2.5e-6


def published(gpu: GPU) -> Rates:
    """What is known of a GPU that nobody has calibrated."""
    family = next((name for name in _EFFICIENCY if gpu.name.startswith(name)), None)
    matmul, forward, backward, margin = _EFFICIENCY.get(family or "", _USUAL)
    device = {"memory": _with_start(_ELEMENTWISE * gpu.bandwidth), "update": _with_start(_BANDWIDTH * gpu.bandwidth)}
    for dtype in ("bf16", "fp16", "fp32"):
        if (peak := gpu.peak(dtype)) is not None:
            device |= {f"matmul {dtype}": _with_start(matmul * peak), f"attention {dtype}": _with_start(forward * peak),
                       f"attention_backward {dtype}": _with_start(backward * peak)}
    link, network = (_with_start(_LINK * speed, _LATENCY) for speed in (gpu.link, gpu.network))
    return Rates(f"published figures of {family or 'similar GPUs'}", margin, device, _HOST, asynchronous=True,
                 overlap=0.8, links={"": link}, network=network)


def _with_start(rate: float, start: float = _KERNEL) -> Curve:
    """A rate with a start: seconds at sizes a factor of two apart."""
    sizes = tuple(rate * start * 2.0**power for power in range(-6, 13))
    return Curve(sizes, tuple(start + size / rate for size in sizes))
