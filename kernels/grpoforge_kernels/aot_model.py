"""What a GPU could do with a compiled kernel: occupancy, and a bound on its share of the memory bandwidth.

A model, with the vendors' published figures and every latency hidden as well as the occupancy allows. Nothing in here
was measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """An architecture, with the figures of the product that is built around it."""

    name: str
    product: str
    backend: str
    arch: int | str
    warp_size: int
    processors: int
    """Multiprocessors or compute units."""
    clock: float
    """Hz, as published."""
    bandwidth: float
    """Bytes per second of its memory, as published."""
    lanes: int
    """Instructions of threads that a multiprocessor issues per cycle."""
    exponential_lanes: int
    """Exponentials of threads per cycle and multiprocessor."""
    exponentials_take_issue: bool
    """Whether an exponential blocks the pipeline that issues other instructions (AMD), or has its own (NVIDIA)."""
    threads_per_processor: int
    blocks_per_processor: int
    registers: int
    """32-bit registers of a multiprocessor."""
    register_step: int
    """Registers of a thread are given out in multiples of this."""
    shared_bytes: int
    shared_reserve: int
    """Shared memory that the system takes of each block."""
    latency: float
    """Seconds from a load to its data, under load."""


A100 = Target(
    "sm_80", "A100 80GB SXM", "cuda", 80, 32, processors=108, clock=1.41e9, bandwidth=2.039e12, lanes=128,
    exponential_lanes=16, exponentials_take_issue=False, threads_per_processor=2048, blocks_per_processor=32,
    registers=65536, register_step=8, shared_bytes=164 * 1024, shared_reserve=1024, latency=670e-9,
)  # fmt: skip
H100 = Target(
    "sm_90", "H100 SXM", "cuda", 90, 32, processors=132, clock=1.755e9, bandwidth=3.35e12, lanes=128,
    exponential_lanes=16, exponentials_take_issue=False, threads_per_processor=2048, blocks_per_processor=32,
    registers=65536, register_step=8, shared_bytes=228 * 1024, shared_reserve=1024, latency=670e-9,
)  # fmt: skip
B200 = Target(
    "sm_100", "B200", "cuda", 100, 32, processors=148, clock=1.85e9, bandwidth=8.0e12, lanes=128,
    exponential_lanes=16, exponentials_take_issue=False, threads_per_processor=2048, blocks_per_processor=32,
    registers=65536, register_step=8, shared_bytes=228 * 1024, shared_reserve=1024, latency=670e-9,
)  # fmt: skip
MI300X = Target(
    "gfx942", "MI300X", "hip", "gfx942", 64, processors=304, clock=2.1e9, bandwidth=5.3e12, lanes=64,
    exponential_lanes=16, exponentials_take_issue=True, threads_per_processor=2048, blocks_per_processor=32,
    registers=4 * 512 * 64, register_step=8, shared_bytes=64 * 1024, shared_reserve=0, latency=800e-9,
)  # fmt: skip
TARGETS = {target.name: target for target in (A100, H100, B200, MI300X)}


@dataclass(frozen=True)
class Bound:
    """Shares of a resource that a kernel would use at full memory bandwidth, and what they leave of it."""

    issue: float
    """Of the issue slots."""
    exponential: float
    """Of the units that make exponentials."""
    latency: float
    """Of the bytes that have to be in flight, those that are: more than 1 is enough."""

    @property
    def bandwidth(self) -> float:
        """The largest share of the memory bandwidth that these allow, at most 1."""
        return min(1.0, 1 / max(self.issue, self.exponential, 1e-9), self.latency)

    @property
    def limit(self) -> str:
        """What is used most."""
        used = {"issue slots": self.issue, "exponentials": self.exponential, "bytes in flight": 1 / self.latency}
        return max(used, key=used.__getitem__)


def occupancy(target: Target, registers: int, shared_bytes: int, num_warps: int) -> float:
    """Share of a multiprocessor's warps that are resident."""
    threads = num_warps * target.warp_size
    stepped = max(1, -(-registers // target.register_step)) * target.register_step
    by_registers = target.registers // (stepped * threads)
    by_shared = target.shared_bytes // max(1, shared_bytes + target.shared_reserve)
    blocks = min(target.blocks_per_processor, target.threads_per_processor // threads, by_registers, by_shared)
    return blocks * threads / target.threads_per_processor


def roofline(
    target: Target, instructions: float, exponentials: float, in_flight: float, bytes_per_logit: float
) -> Bound:
    r"""What full memory bandwidth :math:`B` would ask of a multiprocessor.

    With :math:`P` multiprocessors at clock :math:`f` and :math:`\rho = B / (P f \cdot \text{bytes per logit})` logits
    for each of them and cycle: :math:`\rho` instructions per logit over the lanes that issue, :math:`\rho` exponentials
    per logit over theirs, and Little's law, :math:`\text{latency} \cdot B / P` bytes in flight.

    Args:
        in_flight: bytes that the resident threads of a multiprocessor load at a time.
    """
    rate = target.bandwidth / (target.processors * target.clock * bytes_per_logit)
    blocked = exponentials * (target.lanes / target.exponential_lanes - 1) if target.exponentials_take_issue else 0.0
    return Bound(
        issue=rate * (instructions + blocked) / target.lanes,
        exponential=rate * exponentials / target.exponential_lanes,
        latency=in_flight / (target.latency * target.bandwidth / target.processors),
    )
