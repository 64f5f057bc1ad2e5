"""What to measure: operations, number formats, shapes, backends and allocators, as values that survive JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpoforge_kernels.errors import KernelError

OPS = ("selective_log_softmax", "linear_logprobs", "grpo_loss")
DTYPES = ("fp32", "bf16", "fp16")
MALLOCS = ("stock", "reuse", "both")

VARIANTS: Mapping[str, Mapping[str, str]] = {
    "selective_log_softmax": {"": "forward and backward"},
    "linear_logprobs": {
        "": "forward and backward, GRPO loss",
        "zero50": "50% of the tokens have no gradient",
        "zero70": "70% of the tokens have no gradient",
        "frozen": "the head is frozen",
    },
    "grpo_loss": {"": "forward and backward, from log-probs"},
}
"""The cases of an operation, and what each is."""

AXES = {"selective_log_softmax": "NxV", "linear_logprobs": "NxVxH", "grpo_loss": "BxT"}
"""What the numbers of a shape count: tokens N, vocabulary V, hidden size H, rows B of T tokens."""

SHAPES: Mapping[str, Mapping[str, tuple[tuple[int, ...], ...]]] = {
    "quick": {
        "selective_log_softmax": ((64, 8192),),
        "linear_logprobs": ((64, 8192, 128),),
        "grpo_loss": ((16, 256),),
    },
    "plain": {
        "selective_log_softmax": ((512, 32_000),),
        "linear_logprobs": ((256, 32_000, 256),),
        "grpo_loss": ((64, 1024),),
    },
    "full": {
        "selective_log_softmax": ((1024, 32_000), (512, 151_936)),
        "linear_logprobs": ((512, 151_936, 896),),
        "grpo_loss": ((64, 1024),),
    },
}
"""Shapes measured when none is asked for; ``full`` are those that the published figures speak of."""

ROUNDS = {"quick": 3, "plain": 7, "full": 9}
"""How often each contender runs, after a warm-up."""

SECONDS_PER_CONTENDER = {"quick": 1.0, "plain": 3.0, "full": 90.0}
"""A contender that has run this long in a case sits out its remaining rounds; it always runs once."""


@dataclass(frozen=True)
class Case:
    """One operation on one shape in one number format: what contenders are compared on."""

    op: str
    dtype: str
    shape: tuple[int, ...]
    device: str = "cpu"
    variant: str = ""

    @property
    def shape_text(self) -> str:
        """``1024x32000``."""
        return "x".join(map(str, self.shape))

    @property
    def title(self) -> str:
        """``selective_log_softmax bf16 1024x32000 on cpu: forward and backward``."""
        return f"{self.op} {self.dtype} {self.shape_text} on {self.device}: {VARIANTS[self.op][self.variant]}"


@dataclass(frozen=True)
class Plan:
    """What one run of the benchmark measures.

    ``effort`` (``quick``, ``plain``, ``full``) chooses shapes, rounds and whether memory and compiled peers are
    measured; ``shapes`` and ``rounds`` replace its choice.
    """

    ops: tuple[str, ...] = OPS
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    backends: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    rounds: int | None = None
    effort: str = "plain"
    malloc: str = "stock"
    memory: bool = True

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote."""
        lists = {name: tuple(values[name]) for name in ("ops", "dtypes", "backends")}
        return cls(**{**values, **lists, "shapes": tuple(tuple(shape) for shape in values["shapes"])})

    def to_json(self) -> dict[str, Any]:
        """This plan as JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    @property
    def num_rounds(self) -> int:
        """How often each contender runs."""
        return self.rounds or ROUNDS[self.effort]

    def cases(self) -> list[Case]:
        """Every case, in the order in which it is measured.

        Raises:
            KernelError: a shape fits none of the operations.
        """
        found = [case for op in self.ops for case in self._cases_of(op)]
        for shape in self.shapes:
            if all(case.shape != shape for case in found):
                axes = " or ".join(sorted({AXES[op] for op in self.ops}))
                raise KernelError(
                    f"the shape {'x'.join(map(str, shape))} fits none of {', '.join(self.ops)}", f"give {axes}"
                )
        return found

    def _cases_of(self, op: str) -> list[Case]:
        num_axes = AXES[op].count("x") + 1
        given = [shape for shape in self.shapes if len(shape) == num_axes]
        # Two operations have shapes of two numbers: with both asked for, such a shape is meant for the logits.
        if self.shapes and (not given or (op == "grpo_loss" and "selective_log_softmax" in self.ops)):
            return []
        # Log-probs are float32 whatever the logits are.
        dtypes = ("fp32",) if op == "grpo_loss" else self.dtypes
        cases = []
        for shape in given or SHAPES[self.effort][op]:
            for dtype in dtypes:
                # What skipping and freezing are worth hardly depends on the format: the first one tells.
                variants = VARIANTS[op] if dtype == dtypes[0] else ("",)
                cases += [Case(op, dtype, shape, self.device, variant) for variant in variants]
        return cases


def parse_shape(text: str) -> tuple[int, ...]:
    """``1024x32000`` as numbers.

    Raises:
        KernelError: ``text`` is not two or three positive numbers with ``x`` between them.
    """
    if not re.fullmatch(r"[1-9][0-9]{0,8}(x[1-9][0-9]{0,8}){1,2}", text):
        raise KernelError(
            f"`--shape {text}` is no shape",
            "write tokens x vocabulary, `1024x32000`, or tokens x vocabulary x hidden size, `512x151936x896`",
        )
    return tuple(int(number) for number in text.split("x"))


def parse_shapes(texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """`parse_shape` of each."""
    return tuple(map(parse_shape, texts))
