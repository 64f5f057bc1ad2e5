"""One backend for a while, whatever the environment says."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from grpoforge_kernels import dispatch


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    """Run the operations on one backend."""
    with restored():
        force(backend)
        yield


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Let what was forced before, if anything, be forced again afterwards."""
    before = os.environ.get(dispatch.VARIABLE, "")
    try:
        yield
    finally:
        force(before)


def force(backend: str) -> None:
    """Run the operations on ``backend`` from now on; on those they choose where it is empty."""
    if os.environ.get(dispatch.VARIABLE, "") == backend:
        return
    if backend:
        os.environ[dispatch.VARIABLE] = backend
    else:
        del os.environ[dispatch.VARIABLE]
