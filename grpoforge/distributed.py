"""Where a run runs: one process, or one of several started by ``torchrun``.

Prompts are divided among the ranks, groups never are. Rewards are gathered before they become advantages, so that
statistics over the batch see all of it; counts are summed before the loss is weighed, and gradients are *summed*, not
averaged: the gradient is that of one process with all the rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpoforge.metrics import Totals
from grpoforge.reduction import Counts


@dataclass(frozen=True, slots=True)
class Workers:
    """This process among its peers."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and talks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of ``count`` prompts, which ``size`` divides."""
        per_rank = count // self.size
        return slice(self.rank * per_rank, (self.rank + 1) * per_rank)

    def sum_counts(self, counts: Counts) -> Counts:
        """``counts`` summed over the ranks."""
        if self.size == 1:
            return counts
        rows, tokens = self._sum([float(counts.rows), float(counts.tokens)])
        return Counts(rows=int(rows), tokens=int(tokens), max_completion_length=counts.max_completion_length)

    def sum_totals(self, totals: Totals) -> Totals:
        """Metric sums and counts over the ranks; every rank holds the same names."""
        if self.size == 1:
            return totals
        names = sorted(totals)
        summed = self._sum([number for name in names for number in totals[name]])
        return {name: (summed[2 * i], summed[2 * i + 1]) for i, name in enumerate(names)}

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients over the ranks, in place."""
        if self.size == 1:
            return
        for parameter in parameters:
            # A rank whose rows are all masked still takes part, or the others would wait for ever.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def sum(self, number: float) -> float:
        """``number`` summed over the ranks."""
        return number if self.size == 1 else self._sum([float(number)])[0]

    def gather(self, rows: Tensor) -> Tensor:
        """The ``rows [n, ...]`` of every rank, rank after rank, ``[sum of n, ...]`` on the device of ``rows``.

        ``n`` may differ among the ranks.
        """
        if self.size == 1:
            return rows
        counts = self._sum([float(len(rows)) if rank == self.rank else 0.0 for rank in range(self.size)])
        start = int(sum(counts[: self.rank]))
        everyone = rows.new_zeros(int(sum(counts)), *rows.shape[1:])
        everyone[start : start + len(rows)] = rows
        device = _collective_device()
        gathered = everyone.to(device)
        dist.all_reduce(gathered)
        return gathered.to(rows.device)

    def gather_values(self, values: Sequence[Any]) -> list[Any]:
        """The JSON ``values`` of every rank, rank after rank. One process gets them back as JSON has them, too.

        Raises:
            TypeError, ValueError: a value that JSON has no type for.
        """
        # A line each, in ASCII: lines are joined as their bytes are.
        lines = bytearray("".join(json.dumps(value, allow_nan=False) + "\n" for value in values).encode())
        # A tensor of no bytes cannot be made from a buffer.
        mine = torch.frombuffer(lines, dtype=torch.uint8) if lines else torch.empty(0, dtype=torch.uint8)
        return [json.loads(line) for line in self.gather(mine).numpy().tobytes().splitlines()]

    def from_main(self, text: str) -> str:
        """The main rank's ``text``, on every rank: for what only one may decide, such as a folder's name."""
        if self.size == 1:
            return text
        content = text.encode()
        length = int(self.sum(len(content) if self.is_main else 0))
        padded = content if self.is_main else bytes(length)
        return bytes(int(byte) for byte in self._sum([float(byte) for byte in padded])).decode()

    def any(self, flag: bool) -> bool:
        """True when ``flag`` is True on any rank."""
        return self.sum(float(flag)) > 0

    def _sum(self, numbers: list[float]) -> list[float]:
        tensor = torch.tensor(numbers, dtype=torch.float64, device=_collective_device())
        dist.all_reduce(tensor)
        return [float(number) for number in tensor.tolist()]


def _collective_device() -> torch.device:
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")


def start_workers() -> Workers:
    """Join the process group that ``torchrun`` or ``accelerate launch`` announced, or run alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Workers()
    if not dist.is_initialized():
        # Chosen first: NCCL's first collective would put every rank on GPU 0.
        device = local_device()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Workers(rank=dist.get_rank(), size=size)


def stop_workers() -> None:
    """Leave the process group, if there is one. A group of one process is not ours: a component made it for itself."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()


def local_device() -> torch.device:
    """This rank's accelerator, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
