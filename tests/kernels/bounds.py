"""How far the kernels may be from a float64 oracle, element by element, by the table that the benchmark judges by.

Statistics are float32 whatever the dtype of the logits, and their gradient is rounded to that dtype once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpoforge_kernels.bench.accuracy import BOUNDS
from grpoforge_kernels.bench.problems import TORCH_DTYPES

_BOUND = {TORCH_DTYPES[name]: BOUNDS["selective_log_softmax", name] for name in TORCH_DTYPES}

LOGPROB = _BOUND[torch.float32].value
"""``|error| <= LOGPROB * (1 + |logp|)``; for logsumexp too."""
ENTROPY = 2 * LOGPROB
"""``|error| <= ENTROPY * (1 + H)``: it is a difference of two such numbers."""
GRADIENT = _BOUND[torch.float32].gradient
"""Of the largest gradient in a row; the arithmetic is float32 for every dtype."""
CANCELED = 2.0**-22
"""Of the row's upstream derivative: ``p - 1`` of a float32 ``p``, when the chosen token has nearly all probability."""
ROUNDING = {
    torch.float64: 0.0,
    torch.float32: 0.0,
    torch.bfloat16: _BOUND[torch.bfloat16].gradient,
    torch.float16: _BOUND[torch.float16].gradient,
}
"""Of each gradient: half a unit in the last place of the dtype, with room for the value rounded being a bit off."""
SMALLEST = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-24}
"""The step between the smallest numbers of the dtype, below which it cannot follow a gradient."""


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """Equal up to ``bound``; infinities and NaN are where they should be."""
    actual, exact = actual.double(), exact.double()
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    assert torch.equal(actual[~finite].nan_to_num(1e300), exact[~finite].nan_to_num(1e300))
    excess = ((actual - exact).abs() - bound)[finite]
    assert excess.numel() == 0 or float(excess.max()) <= 0, f"{float(excess.max()):.3g} over the bound"


def assert_stats(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...], *, slack: float = 1.0) -> None:
    """Log-prob, entropy and logsumexp within their bounds, times ``slack``."""
    for one, true, bound in zip(actual, exact, (LOGPROB, ENTROPY, LOGPROB), strict=True):
        assert_within(one, true, slack * bound * (1 + true.double().abs().nan_to_num(0)))


def assert_gradient(actual: Tensor, exact: Tensor, upstream: Tensor, *, slack: float = 1.0) -> None:
    """``[N, V]`` within its bound, times ``slack``; ``upstream [N]`` is the size of what drives each row."""
    exact = exact.double()
    largest = exact.abs().amax(dim=1, keepdim=True)
    arithmetic = GRADIENT * largest + CANCELED * upstream.double()[:, None]
    rounding = ROUNDING[actual.dtype] * exact.abs() + SMALLEST[actual.dtype]
    assert_within(actual, exact, slack * arithmetic + rounding)
