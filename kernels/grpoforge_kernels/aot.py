"""The Triton kernels compiled ahead of time, on a machine without a GPU, and what the machine code allows.

`compile_all` compiles every kernel in every configuration for a set of targets and reads from the machine code what
decides about its speed: registers, spills, occupancy, instructions and exponentials for each logit. From these a model
bounds the share of the memory bandwidth that the kernel can reach. **The bound is arithmetic, not a measurement**: it
says what a kernel cannot exceed, with the clocks that vendors publish and everything overlapped perfectly.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpoforge_kernels.aot_code import Program, parse_amdgcn, parse_sass
from grpoforge_kernels.aot_model import TARGETS, Bound, Target, occupancy, roofline
from grpoforge_kernels.errors import KernelError

__all__ = ["TARGETS", "Bound", "Compiled", "Target", "compile_all"]

VOCAB_SIZE = 151_936
HIDDEN_SIZE = 4096
ROW_BYTES = 28
"""Of one row beside its logits: id 8, inverse temperature 4, four statistics 16."""


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration for one target."""

    kernel: str
    variant: str
    """Formats, and what the variant does beyond the plain case."""
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


@dataclass(frozen=True)
class Case:
    """What to compile: a kernel's arguments as the launchers would give them."""

    kernel: str
    variant: str
    configuration: str
    is_default: bool
    function: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    path: str = "none"
    """Where logits are worked on: ``loop``, the ``shortest`` or the ``longest`` path, or ``none`` to count nothing."""
    logits_per_thread: float = 0
    load_bytes: int = 0
    """What a thread has in flight."""
    bytes_per_token: float | None = None
    minimal_bytes_per_token: float | None = None
    row_bytes: float = 0
    """Bytes for each logit."""
    turns: int = 1
    stores: float = 0
    """Of 16 bytes, of a thread."""


def compile_all(
    targets: Sequence[str] = tuple(TARGETS), *, every: bool = True, kernels: Sequence[str] = ()
) -> list[Compiled]:
    """Every kernel, or those of ``kernels``, compiled for ``targets``.

    With ``every``, the defaults and what `configs.tune` may choose; else the defaults alone. Takes about a second for
    each the first time; Triton keeps what it compiled.

    Raises:
        KernelError: no such target, Triton is missing, or its interpreter is on in this process.
    """
    for name in targets:
        if name not in TARGETS:
            raise KernelError(f"`{name}` is no target", f"the targets are {', '.join(TARGETS)}")
    _check_triton()
    return [
        _compile(case, TARGETS[name])
        for name in targets
        for case in _cases(name)
        if (every or case.is_default) and (not kernels or case.kernel in kernels)
    ]


def _check_triton() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise KernelError("kernels cannot be compiled in a process whose Triton interprets", "unset TRITON_INTERPRET")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise KernelError(f"Triton is missing: {error}", "pip install 'triton>=3.7,<3.8'") from error


def _cases(target: str) -> Iterator[Case]:
    for dtype, entropy in (("bf16", True), ("bf16", False), ("fp16", True), ("fp32", True)):
        yield from _row_stats_cases(target, dtype, entropy=entropy, even=True)
    yield from _row_stats_cases(target, "bf16", entropy=True, even=False)
    for dtype, out, even in (("bf16", "bf16", True), ("fp16", "fp16", True), ("fp32", "fp32", True),
                             ("fp32", "bf16", True), ("bf16", "bf16", False)):  # fmt: skip
        yield from _row_gradient_cases(target, dtype, out, even=even)
    yield _merge_case()
    yield from _token_cases()
    for dtype in ("bf16", "fp32"):
        yield from _linear_cases(target, dtype)


def _torch_dtype(name: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _types(function: Any, constants: Mapping[str, Any], pointers: Mapping[str, str], **others: str) -> dict[str, str]:
    """A type for every argument that is no constant: pointers as given, other names 32-bit integers."""
    names = [name for name in function.arg_names if name not in constants]
    return {name: f"*{pointers[name]}" if name in pointers else others.get(name, "i32") for name in names}


def _row_stats_cases(target: str, dtype: str, *, entropy: bool, even: bool) -> Iterator[Case]:
    from grpoforge_kernels.triton import configs
    from grpoforge_kernels.triton.selective_log_softmax import row_stats_kernel

    candidates = configs.row_stats_candidates(_torch_dtype(dtype), VOCAB_SIZE, target)
    itemsize = _torch_dtype(dtype).itemsize
    for name, config in candidates.options.items():
        vector = config.vector if even else 1
        constants = {
            "mask": None, "ENTROPY": entropy, "HAS_MASK": False, "SCALE": 1.0, "SOFTCAP": 0.0,
            "LANES": config.lanes, "UNROLL": config.unroll * config.vector // vector, "VECTOR": vector,
        }  # fmt: skip
        pointers = {"logits": dtype, "ids": "i64", "inv_temperature": "fp32", "stats": "fp32"}
        yield Case(
            "row_stats",
            f"{dtype}{' entropy' if entropy else ''}{'' if even else ' odd V'}",
            name,
            config == candidates.default,
            row_stats_kernel,
            _types(row_stats_kernel, constants, pointers),
            constants,
            {"num_warps": config.num_warps},
            "loop",
            config.unroll * config.vector,
            config.unroll * config.vector * itemsize,
            (VOCAB_SIZE + 1) * itemsize + ROW_BYTES,
            VOCAB_SIZE * itemsize + ROW_BYTES,
            itemsize,
        )


def _row_gradient_cases(target: str, dtype: str, out: str, *, even: bool) -> Iterator[Case]:
    from grpoforge_kernels.triton import configs
    from grpoforge_kernels.triton.selective_log_softmax import row_gradient_kernel

    candidates = configs.row_gradient_candidates(_torch_dtype(dtype), VOCAB_SIZE, target)
    itemsize, written = _torch_dtype(dtype).itemsize, _torch_dtype(out).itemsize
    for name, config in candidates.options.items():
        constants = {
            "mask": None, "HAS_MASK": False, "SCALE": 1.0, "SOFTCAP": 0.0, "EVEN": even, "BLOCK": config.block,
            "PIECES": config.pieces,
            "VECTOR": max(configs.vector(_torch_dtype(dtype)), configs.vector(_torch_dtype(out))),
        }  # fmt: skip
        floats = dict.fromkeys(("inv_temperature", "maximum", "total", "weighted", "g", "h", "l"), "fp32")
        pointers = {"logits": dtype, "out": out, "ids": "i64", **floats}
        per_piece = config.block / (TARGETS[target].warp_size * config.num_warps)
        scalars = (48 * -(-VOCAB_SIZE // (config.block * config.pieces)), 48)
        for extra, path in (("", "shortest"), (" entropy", "longest")):
            yield Case(
                "row_gradient",
                f"{dtype} to {out}{extra}{'' if even else ' odd V'}",
                name,
                config == candidates.default,
                row_gradient_kernel,
                _types(row_gradient_kernel, constants, pointers),
                constants,
                {"num_warps": config.num_warps},
                path,
                per_piece * config.pieces,
                int(per_piece * itemsize),
                VOCAB_SIZE * (itemsize + written) + scalars[0],
                VOCAB_SIZE * (itemsize + written) + scalars[1],
                itemsize + written,
                config.pieces,
                per_piece * config.pieces * written / configs.VECTOR_BYTES,
            )


def _merge_case() -> Case:
    from grpoforge_kernels.triton import configs
    from grpoforge_kernels.triton.selective_log_softmax import merge_kernel

    constants = {"PARTS": configs.MAX_PARTS, "ROWS": configs.MERGE_ROWS}
    pointers = dict.fromkeys(("partial", "inv_temperature", "stats"), "fp32")
    return Case(
        "merge",
        f"{configs.MAX_PARTS} parts",
        f"r{configs.MERGE_ROWS}",
        True,
        merge_kernel,
        _types(merge_kernel, constants, pointers),
        constants,
        {"num_warps": configs.MERGE_WARPS},
        bytes_per_token=16 * configs.MAX_PARTS + 20,
        minimal_bytes_per_token=16 * configs.MAX_PARTS + 20,
    )


def _token_cases() -> Iterator[Case]:
    from grpoforge_kernels.triton import configs
    from grpoforge_kernels.triton.grpo_loss import SCALE_BLOCK, scale_kernel, token_kernel

    floats = ("logprobs", "inv_temperature", "old_logprobs", "ref_logprobs", "advantages", "gradient")
    pointers = {**dict.fromkeys(floats, "fp32"), "mask": "i1", "weights": "fp64", "sums": "fp64"}
    numbers = dict.fromkeys(("low", "high", "bound", "beta"), "fp32")
    options = {"num_warps": configs.TOKEN_WARPS}
    for from_stats in (False, True):
        constants: dict[str, Any] = {
            "FROM_STATS": from_stats, "HAS_GRADIENT": True, "KL": 3, "BLOCK": configs.TOKEN_BLOCK,
        }  # fmt: skip
        if not from_stats:
            constants["inv_temperature"] = None
        moved = 29 + 12 if from_stats else 29
        types = _types(token_kernel, constants, pointers, **numbers)
        variant = "k3" + (", from statistics" if from_stats else "")
        yield Case(
            "grpo_loss", variant, f"b{configs.TOKEN_BLOCK}", True, token_kernel, types, constants, options,
            bytes_per_token=moved, minimal_bytes_per_token=moved,
        )  # fmt: skip
    constants = {"EVEN": True, "BLOCK": SCALE_BLOCK}
    types = _types(scale_kernel, constants, {"values": "bf16", "factor": "fp32"})
    yield Case("scale", "bf16", f"b{SCALE_BLOCK}", True, scale_kernel, types, constants, options)


def _linear_cases(target: str, dtype: str) -> Iterator[Case]:
    from grpoforge_kernels.triton import configs
    from grpoforge_kernels.triton.linear_logprobs import linear_stats_kernel

    candidates = configs.linear_candidates(_torch_dtype(dtype), VOCAB_SIZE, target)
    for name, config in candidates.options.items():
        constants = {
            "bias": None, "mask": None, "HIDDEN_SIZE": HIDDEN_SIZE, "HAS_BIAS": False, "HAS_MASK": False,
            "SCALE": 1.0, "SOFTCAP": 0.0, "ALIGNED": True,
            "ROWS": config.rows, "COLUMNS": config.columns, "DEPTH": config.depth,
        }  # fmt: skip
        pointers = {"hidden": dtype, "weight": dtype, "ids": "i64", "inv_temperature": "fp32", "stats": "fp32"}
        yield Case(
            "linear_stats",
            dtype,
            name,
            config == candidates.default,
            linear_stats_kernel,
            _types(linear_stats_kernel, constants, pointers),
            constants,
            {"num_warps": config.num_warps, "num_stages": config.num_stages},
        )


def _compile(case: Case, target: Target) -> Compiled:
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
    read: Callable[[Any], Program] = _read_cubin if target.backend == "cuda" else _read_amdgcn
    return _figures(case, target, read(kernel))


def _figures(case: Case, target: Target, program: Program) -> Compiled:
    share = occupancy(target, program.registers, program.shared_bytes, case.options["num_warps"])
    instructions = exponentials = bound = None
    if case.path != "none":
        looped = case.path == "loop"
        wanted = (case.turns, case.logits_per_thread, case.stores)
        counts = program.loop() if looped else program.path(case.path, *wanted)
        instructions = counts.instructions / case.logits_per_thread
        exponentials = counts.exponentials / case.logits_per_thread
        in_flight = share * target.threads_per_processor * case.load_bytes
        bound = roofline(target, instructions, exponentials, in_flight, case.row_bytes)
    return Compiled(
        case.kernel,
        case.variant,
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


def _read_cubin(kernel: Any) -> Program:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([_tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True)
        sass = subprocess.run([_tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True)
    sizes = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return parse_sass(sass.stdout, sizes["REG"], sizes["STACK"] + sizes["LOCAL"], kernel.metadata.shared)


def _read_amdgcn(kernel: Any) -> Program:
    return parse_amdgcn(kernel.asm["amdgcn"], kernel.metadata.shared)


def _tool(name: str) -> str:
    """A program of the CUDA toolkit: Triton brings its own."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(bundled) if bundled.exists() else shutil.which(name)
    if found is None:
        raise KernelError(f"{name} is missing: Triton came without it", "put the CUDA toolkit on PATH")
    return found
