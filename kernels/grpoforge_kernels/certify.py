"""Certificates: that the fused kernels of a backend are right on this machine, with this software.

A certificate is a file in the user's cache. It holds for one backend on one device with one set of kernel sources,
instruction sets, driver and versions: when any of these changes, it is no longer valid and the kernels are tried anew.
`ensure` is what training calls before its first step; it takes seconds once, then reads a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from grpoforge_kernels import dispatch
from grpoforge_kernels.cpp import build
from grpoforge_kernels.errors import KernelError

PACKAGE = Path(__file__).parent
JUDGES = ("adversarial.py", "adversarial_inputs.py", "adversarial_layers.py", "adversarial_trees.py", "accuracy.py")
FUSED = tuple(name for name in dispatch.BACKENDS if name != "reference")

_log = logging.getLogger("grpoforge_kernels")


@dataclass(frozen=True)
class Identity:
    """What a certificate speaks of. Any difference makes it another one.

    ``driver`` is what stands between the sources and the device: the driver of an accelerator; for a processor its
    instruction sets, the compiler and the arguments that the user gives it.
    """

    backend: str
    device: str
    driver: str
    kernels: str
    torch: str
    triton: str | None


@dataclass(frozen=True)
class Certificate:
    """That every check of `bench.adversarial` held: bounds and worst errors of value and gradient by op and dtype."""

    identity: Identity
    date: str
    num_checks: int
    bounds: dict[str, list[float]]
    worst: dict[str, list[float]]


@dataclass(frozen=True)
class Failure:
    """The first check that did not hold, in words."""

    identity: Identity
    reason: str


def identity(backend: str, device: str) -> Identity:
    """What a certificate of ``backend`` on ``device`` (``cpu``, ``cuda``) has to speak of here and now."""
    from grpoforge_kernels.bench.machine import cpu_flags_digest, cpu_name, gpu_name

    on_cpu = device == "cpu"
    return Identity(
        backend=backend,
        device=cpu_name() if on_cpu else gpu_name() or "no accelerator",
        driver=f"{cpu_flags_digest()} {_compiler()}" if on_cpu else _driver(),
        kernels=kernel_hash(backend),
        torch=torch.__version__,
        triton=_version("triton") if backend == "triton" else None,
    )


def kernel_hash(backend: str) -> str:
    """SHA-256 over all sources that can change a result of ``backend``, or what is asked of it."""
    digest = hashlib.sha256()
    for path in _sources(backend):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def certificate(backend: str, device: str) -> Certificate | None:
    """The valid certificate of ``backend`` on ``device``; None when there is none."""
    wanted = identity(backend, device)
    try:
        values = json.loads(_path(wanted).read_text(encoding="utf-8"))
        found = Certificate(**{**values, "identity": Identity(**values["identity"])})
    except (OSError, ValueError, TypeError, KeyError, KernelError):
        return None
    return found if found.identity == wanted else None


def certify(backend: str, device: str) -> Certificate | Failure:
    """Try ``backend`` on every adversarial input (seconds). A certificate that is earned is written to the cache."""
    from grpoforge_kernels.bench.machine import today

    checked = _run_checks(backend, device)
    if isinstance(checked, str):
        return Failure(identity(backend, device), checked)
    num_checks, bounds, worst = checked
    earned = Certificate(identity(backend, device), today(), num_checks, bounds, worst)
    _write(earned)
    return earned


def ensure(device: str) -> list[str]:
    """Leave no fused backend in use on ``device`` that has no valid certificate; the backends that are certified.

    One that has none is tried now. One that fails is refused for the rest of the process, with one warning: the
    reference runs in its place, or a `KernelError` says so when ``GRPOFORGE_KERNELS`` forces it.
    """
    return [backend for backend in available(device) if _holds(backend, device)]


def available(device: str) -> list[str]:
    """The fused backends that can run on ``device``."""
    return [name for name in FUSED if _runs(name, device)]


def _runs(backend: str, device: str) -> bool:
    forced = os.environ.get(dispatch.VARIABLE) or ("cpp" if device == "cpu" else backend)
    # What another backend is forced in place of is not built, and under the interpreter Triton runs when forced only.
    if forced != backend:
        return False
    return dispatch.obstacle(backend, "selective_log_softmax", device, torch.float32) is None


def _holds(backend: str, device: str) -> bool:
    if certificate(backend, device) is not None:
        return True
    _log.info("trying the %s kernels on this machine, once", backend)
    result = certify(backend, device)
    if isinstance(result, Failure):
        dispatch.refuse(
            backend, f"they are wrong on this machine ({result.reason}); `grpoforge bench --certify` says more"
        )
        return False
    return True


def _run_checks(backend: str, device: str) -> tuple[int, dict[str, list[float]], dict[str, list[float]]] | str:
    """Number of checks, bounds and worst errors by ``op dtype``; or what failed first."""
    from grpoforge_kernels.bench.adversarial import Broken, checks
    from grpoforge_kernels.bench.forcing import forced

    bounds: dict[str, list[float]] = {}
    worst: dict[str, list[float]] = {}
    num_checks = 0
    with forced(backend):
        for check in checks(device):
            where = f"{check.op} {check.dtype}, {check.name}"
            try:
                value, gradient = check.run()
            except Broken as error:
                return f"{where}: {error}"
            except Exception as error:  # a broken kernel may raise anything, and must not end a run
                return f"{where}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if not value <= check.bound.value:
                return f"{where}: the value is off by {value:.1e}, the bound is {check.bound.value:.1e}"
            if not gradient <= check.bound.gradient:
                return f"{where}: the gradient is off by {gradient:.1e}, the bound is {check.bound.gradient:.1e}"
            num_checks += 1
            key = f"{check.op} {check.dtype}"
            bounds[key] = [check.bound.value, check.bound.gradient]
            before = worst.get(key, [0.0, 0.0])
            worst[key] = [max(before[0], value), max(before[1], gradient)]
    return num_checks, bounds, worst


def folder() -> Path:
    """Where certificates lie: ``certificates`` in ``$GRPOFORGE_CACHE``, or in ``grpoforge`` in the user's cache."""
    return build.cache_folder().parent / "certificates"


def _path(one: Identity) -> Path:
    key = hashlib.sha256(json.dumps(asdict(one), sort_keys=True).encode()).hexdigest()[:16]
    return folder() / f"{one.backend}-{key}.json"


def _write(earned: Certificate) -> None:
    """Whole or not at all. A cache that cannot be written costs the checks again next time, nothing else."""
    with contextlib.suppress(OSError, KernelError):
        path = _path(earned.identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump(asdict(earned), file, indent=2)
        os.replace(file.name, path)


def _sources(backend: str) -> list[Path]:
    shared = [path for path in PACKAGE.glob("*.py") if not path.name.startswith(("__init__", "certify", "aot"))]
    # The reference is the oracle, and parts of it run in the other backends.
    own = [path for folder in {backend, "reference"} for path in (PACKAGE / folder).glob("*.py")]
    if backend == "cpp":
        own += [*build.SOURCES.glob("*.cpp"), *build.SOURCES.glob("*.h")]
    judge = [PACKAGE / "bench" / name for name in JUDGES]
    # By name: the same files in another folder are the same kernels.
    return [*sorted(shared), *sorted(own, key=lambda path: (path.name, path.parent.name)), *judge]


def _compiler() -> str:
    """What it says of itself, and its arguments in ``$CXX``."""
    from grpoforge_kernels.bench.machine import compiler

    arguments: list[str] = []
    with contextlib.suppress(KernelError):
        _, *arguments = build.find_compiler()
    return " ".join([str(compiler()), *arguments])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _driver() -> str:
    from grpoforge_kernels.bench.machine import gpu_driver

    return gpu_driver() or "unknown"


def as_json(result: Certificate | Failure) -> dict[str, Any]:
    """A certificate or a failure as JSON values; ``certified`` tells them apart."""
    return {"certified": isinstance(result, Certificate), **asdict(result)}
