"""What must hold of attention over trees, on forests made to break it. The oracle is the definition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from grpoforge_kernels import ops
from grpoforge_kernels.bench.forcing import forced

FORESTS: Mapping[str, list[int]] = {
    "one token": [0],
    "a chain around a block": [*range(129)],
    "completions of a prompt": [*range(40), *(4 * [*range(40, 57)])],
    "leaves": [*range(5), *(9 * [5, 6, 6, 5])],
    "rows of one token and more": [0, 0, *range(19), 0, 1, 2, 1, 2, 0],
}
"""Depths of tokens."""
HEADS = ((4, 2, 8), (7, 1, 20), (3, 3, 64))
"""Query heads, heads of keys, and their size."""

Results = tuple[Tensor, list[Tensor]]
"""Output, and gradients of query, key and value."""


def tree_checks(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], tuple[float, float]]]]:
    """By name what gives the errors of output and gradients."""
    for name, positions in FORESTS.items():
        for heads in HEADS:
            yield f"{name}, {heads[0]} heads of {heads[2]}", partial(_compare, positions, heads, dtype, 1.0)
    chain, prompt = FORESTS["a chain around a block"], FORESTS["completions of a prompt"]
    yield "one key takes all", partial(_compare, chain, HEADS[0], dtype, 1e4)
    yield "NaN in another tree", partial(_beside, prompt, math.nan, dtype)
    yield "infinity in another tree", partial(_beside, prompt, math.inf, dtype)


def _inputs(positions: list[int], heads: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the gradient of the output."""
    made, (num_heads, kv_heads, d) = torch.Generator().manual_seed(4), heads
    shapes = ((len(positions), n, d) for n in (num_heads, kv_heads, kv_heads, num_heads))
    return [torch.randn(shape, generator=made).to(dtype) for shape in shapes]


def _run(positions: list[int], inputs: list[Tensor]) -> Results:
    leaves = [one.detach().requires_grad_() for one in inputs[:3]]
    out = ops.tree_attention(leaves[0], leaves[1], leaves[2], torch.tensor(positions), scale=leaves[0].shape[2] ** -0.5)
    return out.detach(), [*torch.autograd.grad(out, leaves, inputs[3])]


def _compare(positions: list[int], heads: tuple[int, int, int], dtype: torch.dtype, size: float) -> tuple[float, float]:
    """``size``: what the first number of the first token's key is, which all queries see alike."""
    inputs = _inputs(positions, heads, dtype)
    if size != 1.0:
        inputs[1][..., 0], inputs[0][..., 0] = 0.0, 1.0
        inputs[1][0, :, 0] = size
    out, gradients = _run(positions, inputs)
    with forced("reference"):
        exact, exact_gradients = _run(positions, [one.double() for one in inputs])
    value = float(((out.double() - exact).abs() / (1 + exact.abs())).max())
    # Where one key has all the weight, the gradients of scores are 0 but for rounding of what they are made from.
    driven = size * float(inputs[3].double().norm())
    pairs = zip(gradients, exact_gradients, strict=True)
    return value, max(float((one.double() - true).norm()) / max(float(true.norm()), driven) for one, true in pairs)


def _beside(positions: list[int], bad: float, dtype: torch.dtype) -> tuple[float, float]:
    """A tree between two that hold what is not finite has the bits that it has alone."""
    heads, n = HEADS[0], len(positions)
    alone = _inputs(positions, heads, dtype)
    spoiled = [torch.cat([torch.full_like(one[:3], bad), one, torch.full_like(one[:3], bad)]) for one in alone]
    out, gradients = _run([0, 1, 1, *positions, 0, 1, 1], spoiled)
    exact, exact_gradients = _run(positions, alone)
    same = [
        torch.equal(one[3 : n + 3], true)
        for one, true in zip((out, *gradients), (exact, *exact_gradients), strict=True)
    ]
    return (0.0 if same[0] else math.inf), (0.0 if all(same[1:]) else math.inf)
