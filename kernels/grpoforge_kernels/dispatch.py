"""Which backend runs an operation: decided in one place, once for each (operation, device, dtype), and logged once.

A backend is a package here that holds a module for each operation it has: ``reference`` (plain PyTorch, has all),
``cpp`` (CPU) and ``triton`` (CUDA and ROCm; CPU tensors under ``TRITON_INTERPRET=1`` when it is forced).
``GRPOFORGE_KERNELS=reference|cpp|triton`` forces one, and a force that is impossible is an error.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import os
from functools import cache
from types import ModuleType

import torch

from grpoforge_kernels.cpp import build
from grpoforge_kernels.errors import KernelError

BACKENDS = ("reference", "cpp", "triton")
VARIABLE = "GRPOFORGE_KERNELS"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What ``cpp`` and ``triton`` read; every other dtype is the reference's."""

_log = logging.getLogger("grpoforge_kernels")
_chosen: dict[tuple[str, str, torch.dtype, str], ModuleType] = {}
_refused: dict[str, str] = {}


def backend(op: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module that runs ``op`` for tensors of ``dtype`` on ``device``.

    Raises:
        KernelError: ``GRPOFORGE_KERNELS`` names no backend, or one that cannot run this.
    """
    key = (op, device.type, dtype, os.environ.get(VARIABLE, ""))
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _choose(op, device.type, dtype, key[-1])
        _log.info("%s on %s in %s: %s", op, device.type, dtype, found.__name__.split(".")[-2])
    return found


def backend_name(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """``reference``, ``cpp`` or ``triton``: the backend that `backend` chooses."""
    return backend(op, device, dtype).__name__.split(".")[-2]


def check_force(device: str) -> None:
    """Stop unless ``GRPOFORGE_KERNELS``, where it is set, names a backend that can run on this type of device.

    Every command that will compute asks before it loads anything; an operation asks again for itself and its dtype.

    Raises:
        KernelError: it names no backend, or one that cannot run there.
    """
    forced = os.environ.get(VARIABLE)
    if forced:
        _check_force(forced, "selective_log_softmax", device, torch.float32)


def bfloat16_products() -> ModuleType | None:
    """What multiplies bfloat16 matrices on this CPU and leaves the result in float32, as fast as it can multiply.

    None where the C++ backend is not in use, or the processor has no such instruction: widened matrices are faster.
    """
    in_use = backend_name("selective_log_softmax", torch.device("cpu"), torch.float32) == "cpp"
    module = _module("cpp", "products") if in_use and torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    return module if isinstance(module, ModuleType) and module.is_native() else None


def bfloat16_sweeps() -> ModuleType | None:
    """What sweeps over a bfloat16 head in one pass on this CPU, where `bfloat16_products` are in use; else None."""
    module = None if bfloat16_products() is None else _module("cpp", "linear")
    return module if isinstance(module, ModuleType) else None


def refuse(name: str, reason: str) -> None:
    """Stop using the backend ``name`` in this process, because of ``reason``: it failed its certification."""
    _refused[name] = reason
    _chosen.clear()
    _log.warning("the %s kernels are not used: %s", name, reason)


def forget() -> None:
    """Decide anew from now on: the environment changed, or a refusal is lifted."""
    _refused.clear()
    _chosen.clear()
    _module.cache_clear()
    _warn_once.cache_clear()


def obstacle(name: str, op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why the backend ``name`` cannot run ``op`` in ``dtype`` on a device of that type; None when it can."""
    if name == "reference":
        return None
    if name in _refused:
        return _refused[name]
    if dtype not in DTYPES:
        return f"it has no {str(dtype).removeprefix('torch.')}"
    if device not in _devices(name):
        return f"it does not run on {device}"
    module = _module(name, op)
    return module if isinstance(module, str) else None


def _choose(op: str, device: str, dtype: torch.dtype, forced: str) -> ModuleType:
    if forced:
        _check_force(forced, op, device, dtype)
        name = forced
    else:
        preferred = "cpp" if device == "cpu" else "triton"
        name = "reference" if obstacle(preferred, op, device, dtype) else preferred
    module = _module(name, op)
    assert isinstance(module, ModuleType), module
    return module


def _check_force(forced: str, op: str, device: str, dtype: torch.dtype) -> None:
    if forced not in BACKENDS:
        near = difflib.get_close_matches(forced, BACKENDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the backends are {', '.join(BACKENDS)}"
        raise KernelError(f"{VARIABLE}={forced} names no backend", hint)
    reason = obstacle(forced, op, device, dtype)
    if reason:
        raise KernelError(
            f"{VARIABLE}={forced} cannot run {op}: {reason}", f"unset {VARIABLE}: the best backend is then chosen"
        )


def _devices(name: str) -> tuple[str, ...]:
    if name == "cpp":
        return ("cpu",)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return ("cuda", "cpu") if interpreted else ("cuda",)


@cache
def _module(name: str, op: str) -> ModuleType | str:
    """The module of a backend for an operation, or why there is none. Loading one of ``cpp`` builds its library."""
    package = f"{__package__}.{name}"
    if not (importlib.util.find_spec(package) and importlib.util.find_spec(f"{package}.{op}")):
        return f"it has no {op}"
    try:
        return importlib.import_module(f"{package}.{op}")
    except ImportError as error:
        _warn_once(f"the {name} kernels cannot be loaded: {error}; {build.LIBRARIES['losses'].instead}")
        return str(error)
    except KernelError as error:
        return str(error)


@cache
def _warn_once(text: str) -> None:
    _log.warning("%s", text)
