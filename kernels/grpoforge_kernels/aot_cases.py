"""What `grpoforge_kernels.aot` compiles: the arguments with which the launchers start each kernel, case by case.

Every configuration that the table or `configs.tune` can choose, for both buckets of the vocabulary and every format:
plain, and with everything at once that changes the code (`FULLEST`). For large vocabularies in bfloat16 or float32,
defaults also with each of these alone: float16 differs by one conversion, small vocabularies by shorter tiles. Kernels
that no table cuts are compiled in every form that they have.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from grpoforge_kernels.aot_model import TARGETS
from grpoforge_kernels.triton import configs

__all__ = ["FULLEST", "Case", "cases"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCAB_SIZES = {"": 151_936, ", small V": 8192}
"""One for each bucket of the table of configurations."""
HIDDEN_SIZE = 4096
ROW_BYTES = 28
"""Of one row beside its logits: id 8, inverse temperature 4, four statistics 16."""
GRADIENT_FORMATS = (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"))
"""Of logits and gradient. Panels of a head are float32 logits, whose gradient is in the format of the products."""
FULLEST = "all of these"

SCALED = {"SCALE": 0.7}
CAPPED = {"SCALE": 0.7, "SOFTCAP": 30.0}
MASKED = {"HAS_MASK": True}
Form = Mapping[str, Any]
"""Constants that differ from those of the plain form."""
STATS_FORMS: Mapping[str, Form] = {
    "no entropy": {"ENTROPY": False},
    "masked": MASKED,
    "scale": SCALED,
    "softcap": CAPPED,
    "V of twos": {"VECTOR": 2},
    "odd V": {"VECTOR": 1},
    FULLEST: {**MASKED, **CAPPED, "VECTOR": 1},
}
GRADIENT_FORMS: Mapping[str, Form] = {
    "masked": MASKED,
    "scale": SCALED,
    "softcap": CAPPED,
    "odd V": {"EVEN": False},
    "unlike strides": {"EVEN": False, "VECTOR": 1},
    FULLEST: {**MASKED, **CAPPED, "EVEN": False, "VECTOR": 1},
}
LINEAR_FORMS: Mapping[str, Form] = {
    "masked": MASKED,
    "scale": SCALED,
    "softcap": CAPPED,
    "bias": {"HAS_BIAS": True},
    "odd H": {"ALIGNED": False, "HIDDEN_SIZE": HIDDEN_SIZE - 1},
    FULLEST: {**MASKED, **CAPPED, "HAS_BIAS": True, "ALIGNED": False, "HIDDEN_SIZE": HIDDEN_SIZE - 1},
}


@dataclass(frozen=True)
class Case:
    """What to compile: a kernel's arguments as the launchers would give them."""

    kernel: str
    variant: str
    """Formats and bucket."""
    form: str
    """What it does beyond the plain case; empty for that."""
    configuration: str
    is_default: bool
    function: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    paths: tuple[tuple[str, str], ...] = (("", ""),)
    """Of what is counted, what the variant is called beside, and where logits are worked on: in the ``loop``, on the
    ``shortest`` or on the ``longest`` path through the kernel; nowhere, when nothing is counted."""
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


def cases(target: str) -> Iterator[Case]:
    """Every case for a target, by kernel."""
    for (bucket, vocab_size), dtype in itertools.product(VOCAB_SIZES.items(), DTYPES):
        yield from _row_stats_cases(target, dtype, bucket, vocab_size)
    for (bucket, vocab_size), formats in itertools.product(VOCAB_SIZES.items(), GRADIENT_FORMATS):
        yield from _row_gradient_cases(target, *formats, bucket, vocab_size)
    yield from _merge_cases()
    yield from _token_cases()
    yield from _scale_cases()
    for dtype in DTYPES:
        yield from _linear_cases(target, dtype)


def _forms(forms: Mapping[str, Form], *, each: bool) -> dict[str, Form]:
    """The plain form and the fullest, or all of ``forms``."""
    return {"": {}, **(forms if each else {FULLEST: forms[FULLEST]})}


def _types(function: Any, constants: Mapping[str, Any], pointers: Mapping[str, str], **others: str) -> dict[str, str]:
    """A type for every argument that is no constant: pointers as given, other names 32-bit integers."""
    names = [name for name in function.arg_names if name not in constants]
    return {name: f"*{pointers[name]}" if name in pointers else others.get(name, "i32") for name in names}


def _without(constants: Mapping[str, Any], **flags: str) -> dict[str, Any]:
    """``constants``, and None for each argument of ``flags`` whose flag among them is off."""
    return {**dict.fromkeys((name for name, flag in flags.items() if not constants[flag]), None), **constants}


def _row_stats_cases(target: str, dtype: str, bucket: str, vocab_size: int) -> Iterator[Case]:
    from grpoforge_kernels.triton.selective_log_softmax import row_stats_kernel

    candidates = configs.row_stats_candidates(DTYPES[dtype], vocab_size, target)
    itemsize = DTYPES[dtype].itemsize
    pointers = {"logits": dtype, "ids": "i64", "inv_temperature": "fp32", "mask": "i1", "stats": "fp32"}
    for name, config in candidates.options.items():
        is_default = config == candidates.default
        plain = {
            "ENTROPY": True, "HAS_MASK": False, "SCALE": 1.0, "SOFTCAP": 0.0, "LANES": config.lanes,
            "VECTOR": config.vector,
        }  # fmt: skip
        for form, changes in _forms(STATS_FORMS, each=is_default and not bucket and dtype != "fp16").items():
            constants = _without({**plain, **changes}, mask="HAS_MASK")
            constants["UNROLL"] = config.unroll * config.vector // constants["VECTOR"]
            yield Case(
                "row_stats",
                f"{dtype}{bucket}",
                form,
                name,
                is_default,
                row_stats_kernel,
                _types(row_stats_kernel, constants, pointers),
                constants,
                {"num_warps": config.num_warps},
                (("", "" if form else "loop"),),
                config.unroll * config.vector,
                config.unroll * config.vector * itemsize,
                (vocab_size + 1) * itemsize + ROW_BYTES,
                vocab_size * itemsize + ROW_BYTES,
                itemsize,
            )


def _row_gradient_cases(target: str, dtype: str, out: str, bucket: str, vocab_size: int) -> Iterator[Case]:
    from grpoforge_kernels.triton.selective_log_softmax import row_gradient_kernel

    candidates = configs.row_gradient_candidates(DTYPES[dtype], vocab_size, target)
    itemsize, written = DTYPES[dtype].itemsize, DTYPES[out].itemsize
    floats = dict.fromkeys(("inv_temperature", "maximum", "total", "weighted", "g", "h", "l"), "fp32")
    pointers = {"logits": dtype, "out": out, "ids": "i64", "mask": "i1", **floats}
    each = dtype == out != "fp16" and not bucket
    for name, config in candidates.options.items():
        is_default = config == candidates.default
        plain = {
            "HAS_MASK": False, "SCALE": 1.0, "SOFTCAP": 0.0, "EVEN": True, "BLOCK": config.block,
            "PIECES": config.pieces, "VECTOR": max(configs.vector(DTYPES[dtype]), configs.vector(DTYPES[out])),
        }  # fmt: skip
        per_piece = config.block / (TARGETS[target].warp_size * config.num_warps)
        num_blocks = -(-vocab_size // (config.block * config.pieces))
        for form, changes in _forms(GRADIENT_FORMS, each=each and is_default).items():
            constants = _without({**plain, **changes}, mask="HAS_MASK")
            yield Case(
                "row_gradient",
                f"{dtype} to {out}{bucket}",
                form,
                name,
                is_default,
                row_gradient_kernel,
                _types(row_gradient_kernel, constants, pointers),
                constants,
                {"num_warps": config.num_warps},
                (("", ""),) if form else (("", "shortest"), (", entropy", "longest")),
                per_piece * config.pieces,
                int(per_piece * itemsize),
                vocab_size * (itemsize + written) + 48 * num_blocks,
                vocab_size * (itemsize + written) + 48,
                itemsize + written,
                config.pieces,
                per_piece * config.pieces * written / configs.VECTOR_BYTES,
            )


def _merge_cases() -> Iterator[Case]:
    from grpoforge_kernels.triton.selective_log_softmax import merge_kernel

    pointers = dict.fromkeys(("partial", "inv_temperature", "stats"), "fp32")
    parts = 2
    while parts <= configs.MAX_PARTS:
        constants = {"PARTS": parts, "ROWS": configs.MERGE_ROWS}
        yield _fixed(
            "merge", f"{parts} parts", f"r{configs.MERGE_ROWS}", merge_kernel, constants, pointers,
            configs.MERGE_WARPS, num_bytes=16 * parts + 20,
        )  # fmt: skip
        parts *= 2


def _token_cases() -> Iterator[Case]:
    from grpoforge_kernels.triton.grpo_loss import KL_CODES, token_kernel

    floats = ("logprobs", "inv_temperature", "old_logprobs", "ref_logprobs", "advantages", "gradient")
    pointers = {**dict.fromkeys(floats, "fp32"), "mask": "i1", "weights": "fp64", "sums": "fp64"}
    for from_stats, (kl, code), gradient in itertools.product((False, True), KL_CODES.items(), (True, False)):
        constants = {"FROM_STATS": from_stats, "HAS_GRADIENT": gradient, "KL": code, "BLOCK": configs.TOKEN_BLOCK}
        absent = _without(constants, inv_temperature="FROM_STATS", ref_logprobs="KL", gradient="HAS_GRADIENT")
        num_bytes = 21 + (12 if from_stats else 0) + (4 if code else 0) + (4 if gradient else 0)
        variant = f"{kl or 'no KL'}{', from statistics' if from_stats else ''}{'' if gradient else ', no gradient'}"
        yield _fixed(
            "grpo_loss", variant, f"b{configs.TOKEN_BLOCK}", token_kernel, absent, pointers, configs.TOKEN_WARPS,
            dict.fromkeys(("low", "high", "bound", "beta"), "fp32"), num_bytes,
        )  # fmt: skip


def _scale_cases() -> Iterator[Case]:
    from grpoforge_kernels.triton.grpo_loss import SCALE_BLOCK, scale_kernel

    for dtype, even in itertools.product(DTYPES, (True, False)):
        yield _fixed(
            "scale", f"{dtype}{'' if even else ', odd size'}", f"b{SCALE_BLOCK}", scale_kernel,
            {"EVEN": even, "BLOCK": SCALE_BLOCK}, {"values": dtype, "factor": "fp64"}, configs.TOKEN_WARPS,
        )  # fmt: skip


def _fixed(
    kernel: str,
    variant: str,
    configuration: str,
    function: Callable[..., Any],
    constants: Mapping[str, Any],
    pointers: Mapping[str, str],
    num_warps: int,
    others: Mapping[str, str] | None = None,
    num_bytes: float | None = None,
) -> Case:
    """A case of a kernel that has one configuration."""
    types = _types(function, constants, pointers, **(others or {}))
    return Case(
        kernel, variant, "", configuration, True, function, types, constants, {"num_warps": num_warps},
        bytes_per_token=num_bytes, minimal_bytes_per_token=num_bytes,
    )  # fmt: skip


def _linear_cases(target: str, dtype: str) -> Iterator[Case]:
    from grpoforge_kernels.triton.linear_logprobs import linear_stats_kernel

    pointers = {
        **dict.fromkeys(("hidden", "weight", "bias"), dtype),
        "ids": "i64", "mask": "i1", "inv_temperature": "fp32", "stats": "fp32",
    }  # fmt: skip
    for form, changes in _forms(LINEAR_FORMS, each=dtype != "fp16").items():
        config = configs.linear_config(DTYPES[dtype], target, plain=not form)
        plain = {
            "HIDDEN_SIZE": HIDDEN_SIZE, "HAS_BIAS": False, "HAS_MASK": False, "SCALE": 1.0, "SOFTCAP": 0.0,
            "ALIGNED": True, "ROWS": config.rows, "COLUMNS": config.columns, "DEPTH": config.depth,
        }  # fmt: skip
        constants = _without({**plain, **changes}, bias="HAS_BIAS", mask="HAS_MASK")
        yield Case(
            "linear_stats",
            dtype,
            form,
            "x".join(map(str, dataclasses.astuple(config))),
            True,
            linear_stats_kernel,
            _types(linear_stats_kernel, constants, pointers),
            constants,
            {"num_warps": config.num_warps, "num_stages": config.num_stages},
        )
