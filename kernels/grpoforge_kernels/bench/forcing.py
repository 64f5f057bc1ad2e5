"""One backend for a while, whatever the environment says."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from grpoforge_kernels import dispatch


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    """Run the operations on one backend."""
    before = os.environ.get(dispatch.VARIABLE)
    os.environ[dispatch.VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[dispatch.VARIABLE]
        else:
            os.environ[dispatch.VARIABLE] = before
