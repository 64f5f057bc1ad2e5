"""Runs the checks of a file in a process whose Triton interprets its kernels on CPU tensors.

Triton decides when a kernel is *decorated* whether it is interpreted, so the variable has to be set before the first
import, and must not be set in the process of other tests. A test file therefore runs itself as a program: every
function ``check_*`` in it is called, and what it raised is printed as JSON.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from triton.runtime import interpreter

# Kernels add infinities and round to formats that cannot hold a number; a GPU does not remark on it.
np.seterr(all="ignore")


def main(names: dict[str, Any]) -> None:
    """Call every check of a module and print ``{check: traceback, or nothing}`` as the last line."""
    torch.set_num_threads(1)
    outcomes, seconds = {}, {}
    for name, check in list(names.items()):
        if not name.startswith("check_"):
            continue
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            check()
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
        seconds[name] = round(time.perf_counter() - start, 2)
    if os.environ.get("CHECK_SECONDS"):
        print(json.dumps(dict(sorted(seconds.items(), key=lambda item: -item[1])), indent=1))
    print(json.dumps(outcomes))


class Traffic:
    """Bytes that kernels loaded and stored, by tensor."""

    def __init__(self) -> None:
        self.loads: list[tuple[np.ndarray, int]] = []
        self.stores: list[tuple[np.ndarray, int]] = []

    def loaded(self, tensor: torch.Tensor | None = None) -> int:
        """Bytes loaded from the memory of a tensor, or from anywhere."""
        return sum(_bytes(addresses, size, tensor) for addresses, size in self.loads)

    def stored(self, tensor: torch.Tensor | None = None) -> int:
        """Bytes stored to the memory of a tensor, or to anywhere."""
        return sum(_bytes(addresses, size, tensor) for addresses, size in self.stores)


def _bytes(addresses: np.ndarray, size: int, tensor: torch.Tensor | None) -> int:
    if tensor is None:
        return addresses.size * size
    start = tensor.untyped_storage().data_ptr()
    inside = (addresses >= start) & (addresses < start + tensor.untyped_storage().nbytes())
    return int(inside.sum()) * size


@contextmanager
def traffic() -> Iterator[Traffic]:
    """What is loaded and stored within: the addresses whose mask is on."""
    builder, counted = interpreter.InterpreterBuilder, Traffic()
    load, store = builder.create_masked_load, builder.create_masked_store

    def count(into: list[tuple[np.ndarray, int]], pointers: Any, mask: Any) -> None:
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        kept = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)].copy()
        into.append((kept, max(1, pointers.get_element_ty().primitive_bitwidth // 8)))

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(counted.loads, pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(counted.stores, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    try:
        yield counted
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
