"""The Triton kernels compiled ahead of time, on a machine without a GPU, and what the machine code allows.

`compile_all` compiles every kernel in the cases of `grpoforge_kernels.aot_cases` for a set of targets and reads from
the machine code what decides about its speed: registers, spills, occupancy, and for plain forms instructions and
exponentials for each logit. From these a model bounds the share of the memory bandwidth that the kernel can reach.
**The bound is arithmetic, not a measurement**: it says what a kernel cannot exceed, with the clocks that vendors
publish and everything overlapped perfectly.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpoforge_kernels.aot_cases import Case, cases
from grpoforge_kernels.aot_code import Program, parse_amdgcn, parse_sass
from grpoforge_kernels.aot_model import TARGETS, Bound, Target, occupancy, roofline
from grpoforge_kernels.errors import KernelError

__all__ = ["TARGETS", "Bound", "Compiled", "Target", "compile_all"]


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration for one target."""

    kernel: str
    variant: str
    """Formats, bucket of the vocabulary, and of what the figures of a plain form are."""
    form: str
    """What it does beyond the plain case; empty for that."""
    configuration: str
    is_default: bool
    target: str
    registers: int
    spills: int
    """Accesses to local memory (``LDL`` and ``STL``; on AMD spilled registers)."""
    local_bytes: int
    shared_bytes: int
    occupancy: float
    """Share of the multiprocessor's warps that fit, by registers, shared memory and blocks."""
    bytes_per_token: float | None
    minimal_bytes_per_token: float | None
    instructions_per_logit: float | None
    exponentials_per_logit: float | None
    bound: Bound | None
    """None for kernels that memory bandwidth does not limit."""

    @property
    def is_sound(self) -> bool:
        """Whether nothing is spilled."""
        return self.spills == 0 and self.local_bytes == 0


def compile_all(
    targets: Sequence[str] = tuple(TARGETS), *, every: bool = True, kernels: Sequence[str] = ()
) -> list[Compiled]:
    """Every kernel, or those of ``kernels``, compiled for ``targets``.

    With ``every``, whatever can be chosen, in every form; else the defaults alone, in their plain form. As many at a
    time as there are processors. Triton keeps what it compiled.

    Raises:
        KernelError: no such target, Triton is missing, or its interpreter is on in this process.
    """
    for name in targets:
        if name not in TARGETS:
            raise KernelError(f"`{name}` is no target", f"the targets are {', '.join(TARGETS)}")
    _check_triton()
    wanted = [
        (case, TARGETS[name])
        for name in targets
        for case in cases(name)
        if (every or (case.is_default and not case.form)) and (not kernels or case.kernel in kernels)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [one for found in pool.map(_compile, *zip(*wanted, strict=True)) for one in found]


def _check_triton() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise KernelError("kernels cannot be compiled in a process whose Triton interprets", "unset TRITON_INTERPRET")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise KernelError(f"Triton is missing: {error}", "pip install 'triton>=3.7,<3.8'") from error


def _compile(case: Case, target: Target) -> list[Compiled]:
    """What the figures of a case are on each of its paths."""
    from triton import compile as compile_triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.function.arg_names
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in case.types.items() if kind[0] == "*"}
    signature = {**case.types, **dict.fromkeys(case.constants, "constexpr")}
    source = ASTSource(case.function, {name: signature[name] for name in names}, constants, aligned)
    kernel = compile_triton(
        source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=dict(case.options)
    )
    is_counted = any(path for _, path in case.paths)
    program = _read_cubin(kernel, is_counted) if target.backend == "cuda" else _read_amdgcn(kernel)
    return [_figures(case, suffix, path, target, program) for suffix, path in case.paths]


def _figures(case: Case, suffix: str, path: str, target: Target, program: Program) -> Compiled:
    share = occupancy(target, program.registers, program.shared_bytes, case.options["num_warps"])
    instructions = exponentials = bound = None
    if path:
        wanted = (case.turns, case.logits_per_thread, case.stores)
        counts = program.loop() if path == "loop" else program.path(path, *wanted)
        instructions = counts.instructions / case.logits_per_thread
        exponentials = counts.exponentials / case.logits_per_thread
        in_flight = share * target.threads_per_processor * case.load_bytes
        bound = roofline(target, instructions, exponentials, in_flight, case.row_bytes)
    return Compiled(
        case.kernel,
        case.variant + suffix,
        case.form,
        case.configuration,
        case.is_default,
        target.name,
        program.registers,
        program.spills,
        program.local_bytes,
        program.shared_bytes,
        share,
        case.bytes_per_token,
        case.minimal_bytes_per_token,
        instructions,
        exponentials,
        bound,
    )


def _read_cubin(kernel: Any, is_counted: bool) -> Program:
    """Disassembled, which takes longest, only where instructions are counted or local memory is in use."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        usage = _output("cuobjdump", "-res-usage", path)
        sizes = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        local_bytes = sizes["STACK"] + sizes["LOCAL"]
        sass = _output("nvdisasm", "-c", path) if is_counted or local_bytes else ""
    return parse_sass(sass, sizes["REG"], local_bytes, kernel.metadata.shared)


def _read_amdgcn(kernel: Any) -> Program:
    return parse_amdgcn(kernel.asm["amdgcn"], kernel.metadata.shared)


def _output(name: str, *arguments: str | Path) -> str:
    return subprocess.run([_tool(name), *arguments], capture_output=True, text=True, check=True).stdout


def _tool(name: str) -> str:
    """A program of the CUDA toolkit: Triton brings its own."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(bundled) if bundled.exists() else shutil.which(name)
    if found is None:
        raise KernelError(f"{name} is missing: Triton came without it", "put the CUDA toolkit on PATH")
    return found
