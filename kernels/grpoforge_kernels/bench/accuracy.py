"""How far a contender is from the exact answer, and how far an own one may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpoforge_kernels.bench.problems import TORCH_DTYPES, Outcome


@dataclass(frozen=True)
class Bound:
    """The largest errors of value and gradient that an own backend may have."""

    value: float
    gradient: float


BOUNDS: Mapping[tuple[str, str], Bound] = {
    ("selective_log_softmax", "fp32"): Bound(1e-6, 2e-6),
    ("selective_log_softmax", "bf16"): Bound(1e-6, 2**-8),
    ("selective_log_softmax", "fp16"): Bound(1e-6, 2**-10),
    ("linear_logprobs", "fp32"): Bound(2e-6, 2e-6),
    ("linear_logprobs", "bf16"): Bound(2e-3, 4e-3),
    ("linear_logprobs", "fp16"): Bound(2e-4, 1e-3),
    ("linear_loss", "fp32"): Bound(2e-6, 2e-6),
    ("linear_loss", "bf16"): Bound(2e-3, 4e-3),
    ("linear_loss", "fp16"): Bound(2e-4, 1e-3),
    ("grpo_loss", "fp32"): Bound(1e-6, 2e-6),
    ("grpo_loss_from_logits", "fp32"): Bound(1e-6, 2e-6),
    ("grpo_loss_from_logits", "bf16"): Bound(1e-6, 2**-8),
    ("grpo_loss_from_logits", "fp16"): Bound(1e-6, 2**-10),
    ("decoder_layer", "fp32"): Bound(1e-5, 1e-5),
    ("rms_norm", "fp32"): Bound(1e-6, 2e-6),
    ("tree_attention", "fp32"): Bound(1e-6, 2e-6),
    ("tree_attention", "bf16"): Bound(2**-8, 2**-7),
    ("tree_attention", "fp16"): Bound(2**-11, 2**-10),
}
"""By operation and format. A gradient in half precision is rounded once, which is most of its bound."""


SHARED = ("logprobs", "loss")
"""Values that peers compute too; entropy and logsumexp are ours alone, and have bounds but nothing to compare with."""

TIMES_PLAIN = 2.0
"""How many times the error of plain torch in the same format an own backend may have, above `floor`."""


def floor(dtype: str) -> Bound:
    """Errors of so few rounding steps that comparing them is noise: 4 ulps of float32, whose values all formats have.

    A gradient in half precision is rounded once, by half an ulp at most, whoever computes it.
    """
    ulps = 4 * torch.finfo(torch.float32).eps
    return Bound(ulps, ulps if dtype == "fp32" else torch.finfo(TORCH_DTYPES[dtype]).eps / 2)


@dataclass(frozen=True)
class Errors:
    """Largest error of the values, ``|a - b| / (1 + |b|)``, and of the gradients, relative to their size.

    The size of a gradient by logits is the largest element of the row, of one by log-probs the largest of all, and of
    one by hidden states or a head its Frobenius norm (and so is the error).
    """

    value: float
    gradient: float
    shared: float = field(default=0.0, compare=False)
    """That of the values which every contender computes (`SHARED`), a part of ``value``."""

    def within(self, bound: Bound) -> bool:
        """Whether neither error is beyond its bound."""
        return self.value <= bound.value and self.gradient <= bound.gradient

    def worse_than(self, plain: Errors, dtype: str) -> bool:
        """Whether an error is above `TIMES_PLAIN` times that of plain torch and above the `floor`; never for noise."""
        least = floor(dtype)
        return self.shared > max(TIMES_PLAIN * plain.shared, least.value) or self.gradient > max(
            TIMES_PLAIN * plain.gradient, least.gradient
        )


def errors(outcome: Outcome, exact: Outcome) -> Errors:
    """The errors of ``outcome``; infinite where it has a NaN or infinity that the exact answer has not."""
    values = {name: _value_error(tensor, exact.values[name]) for name, tensor in outcome.values.items()}
    gradient = max(_gradient_error(name, tensor, exact.gradients[name]) for name, tensor in outcome.gradients.items())
    shared = max((values[name] for name in SHARED if name in values), default=0.0)
    return Errors(max(values.values()), gradient, shared)


def _value_error(given: Tensor, right: Tensor) -> float:
    return _finite(((given.double() - right).abs() / (1 + right.abs())).amax())


def _gradient_error(name: str, given: Tensor, right: Tensor) -> float:
    if name in ("hidden", "weight"):
        # By slices: a head in float64 is large already.
        parts = list(zip(torch.split(given, 8192), torch.split(right, 8192), strict=True))
        difference = torch.stack([(mine.double() - other).square().sum() for mine, other in parts]).sum()
        return _finite((difference / right.square().sum()).sqrt())
    if name == "logprobs":
        return _finite((given.double() - right).abs().amax() / right.abs().amax())
    rows = zip(torch.split(given, 256), torch.split(right, 256), strict=True)
    return max(
        _finite(((mine.double() - other).abs().amax(dim=1) / other.abs().amax(dim=1).clamp(min=1e-300)).amax())
        for mine, other in rows
    )


def _finite(error: Tensor) -> float:
    number = float(error)
    return number if math.isfinite(number) else math.inf
