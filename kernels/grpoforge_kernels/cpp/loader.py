"""The C++ library as it is loaded once in a process: built when it must be, and refused when it computes wrongly."""

from __future__ import annotations

import ctypes
import logging

# The library must find the OpenMP runtime that PyTorch has loaded, not load a second one.
import torch  # noqa: F401

from grpoforge_kernels.cpp import build
from grpoforge_kernels.errors import KernelError

INSTEAD = "the slower PyTorch kernels, which compute the same, are used"

_log = logging.getLogger("grpoforge_kernels")
_loaded: ctypes.CDLL | KernelError | None = None


def library() -> ctypes.CDLL:
    """The library. A failure is logged once, as a warning, and raised at every call.

    Raises:
        KernelError: it cannot be built or loaded, or was rejected.
    """
    global _loaded
    if _loaded is None:
        try:
            _loaded = _load()
        except KernelError as error:
            raise reject(error) from error
    if isinstance(_loaded, KernelError):
        raise _loaded
    return _loaded


def reject(error: KernelError) -> KernelError:
    """Never use the library in this process, because of ``error``, which is logged and returned."""
    global _loaded
    if not isinstance(_loaded, KernelError):
        hint = f" ({error.hint})" if error.hint else ""
        _log.warning("%s%s; %s", error.message, hint, INSTEAD)
    _loaded = error
    return error


def forget() -> None:
    """Load anew at the next call."""
    global _loaded
    _loaded = None


def _load() -> ctypes.CDLL:
    path = build.library()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        hint = f"delete that folder, or set {build.CACHE_VARIABLE} to one from which programs may run"
        raise KernelError(f"the C++ kernels cannot be loaded: {error}", hint) from error
