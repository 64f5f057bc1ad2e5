"""The C++ libraries as they are loaded, each once in a process: built when they must be, refused when they are wrong.

One that cannot be built, loaded or trusted takes nothing from the others.
"""

from __future__ import annotations

import ctypes
import logging

# The library must find the OpenMP runtime that PyTorch has loaded, not load a second one.
import torch  # noqa: F401

from grpoforge_kernels.cpp import build
from grpoforge_kernels.errors import KernelError

_log = logging.getLogger("grpoforge_kernels")
_loaded: dict[str, ctypes.CDLL | KernelError] = {}


def library(name: str) -> ctypes.CDLL:
    """The library of that name in `build.LIBRARIES`. A failure is logged once, as a warning, and raised at every call.

    Raises:
        KernelError: it cannot be built or loaded, or was rejected.
    """
    if name not in _loaded:
        try:
            _loaded[name] = _load(name)
        except KernelError as error:
            raise reject(name, error) from error
    found = _loaded[name]
    if isinstance(found, KernelError):
        raise found
    return found


def reject(name: str, error: KernelError) -> KernelError:
    """Never use the library in this process, because of ``error``, which is logged and returned.

    What keeps several libraries away, such as a missing compiler, is a warning once.
    """
    if not any(isinstance(one, KernelError) and one.message == error.message for one in _loaded.values()):
        hint = f" ({error.hint})" if error.hint else ""
        _log.warning("%s%s; %s", error.message, hint, build.LIBRARIES[name].instead)
    _loaded[name] = error
    return error


def forget() -> None:
    """Load anew at the next call."""
    _loaded.clear()


def _load(name: str) -> ctypes.CDLL:
    path = build.library(name)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        hint = f"delete that folder, or set {build.CACHE_VARIABLE} to one from which programs may run"
        raise KernelError(f"the C++ kernels cannot be loaded: {error}", hint) from error
