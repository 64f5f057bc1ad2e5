"""What must hold of a decoder layer and of its norm, on inputs made to break them. The oracle is float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from grpoforge_kernels import ops
from grpoforge_kernels.bench.forcing import forced

TREE = [0, 1, 2, 3, 4, 5, 3, 4, 3, 0, 1, 2, 2, 0, *range(40)]
"""Depths of tokens."""


@dataclass(frozen=True)
class Kind:
    """Sizes, and what a layer has."""

    hidden: int
    ffn: int
    heads: tuple[int, int, int]
    """Query heads, heads of keys, and their size."""
    bias: bool = False
    norms: bool = False
    size: float = 1.0
    """Of the hidden states."""
    gates: float = 1.0
    """Factor on the weights of the gate."""
    recompute: bool = False


KINDS: Mapping[str, Kind] = {
    "small": Kind(12, 20, (2, 1, 6)),
    "biases": Kind(64, 172, (8, 4, 8), bias=True),
    "norms of heads": Kind(48, 64, (4, 2, 32), norms=True),
    "both, computed again": Kind(33, 47, (3, 3, 10), bias=True, norms=True, recompute=True),
    "tiny hidden states": Kind(32, 32, (2, 2, 16), size=1e-4),
    "huge hidden states": Kind(32, 32, (2, 2, 16), size=1e4),
    "gates at their ends": Kind(32, 32, (2, 2, 16), gates=10.0),
}

Results = dict[str, Tensor]
"""The output, and gradients by name."""
OUTPUT = "output"


def layer_checks() -> Iterator[tuple[str, str, Callable[[], tuple[float, float]]]]:
    """Operation and name, and what gives the errors of output and gradients, in float32."""
    for name, kind in KINDS.items():
        yield "decoder_layer", name, partial(_compare, kind)
    yield "decoder_layer", "NaN in another tree", _beside_nan
    for rows, size in ((1, 1), (3, 17), (70, 64)):
        yield "rms_norm", f"{rows} rows of {size}", partial(_compare_norm, rows, size)


def _weights(kind: Kind, dtype: torch.dtype) -> ops.LayerWeights:
    made, (heads, kv_heads, d) = torch.Generator().manual_seed(6), kind.heads

    def some(*shape: int, by: float = 1.0) -> Tensor:
        scale = by / shape[1] ** 0.5 if len(shape) > 1 else 1.0
        return (torch.randn(shape, generator=made) * scale).to(dtype).requires_grad_()

    width, inner = (heads + 2 * kv_heads) * d, kv_heads * d
    return ops.LayerWeights(
        norm=some(kind.hidden), q=some(heads * d, kind.hidden), k=some(inner, kind.hidden),
        v=some(inner, kind.hidden), qkv_bias=some(width) if kind.bias else None,
        q_norm=some(d) if kind.norms else None, k_norm=some(d) if kind.norms else None,
        out=some(kind.hidden, heads * d), mlp_norm=some(kind.hidden),
        gate=some(kind.ffn, kind.hidden, by=kind.gates), up=some(kind.ffn, kind.hidden),
        down=some(kind.hidden, kind.ffn),
    )  # fmt: skip


def _hidden(kind: Kind, count: int) -> tuple[Tensor, Tensor]:
    """Hidden states, and the gradient of the output."""
    made = torch.Generator().manual_seed(7)
    hidden, grad = (torch.randn(count, kind.hidden, generator=made) for _ in range(2))
    return kind.size * hidden, grad


def _run(kind: Kind, positions: list[int], hidden: Tensor, grad: Tensor) -> Results:
    dtype, (heads, kv_heads, d) = hidden.dtype, kind.heads
    at, weights = torch.tensor(positions), _weights(kind, dtype)
    angles = torch.arange(max(positions) + 1)[:, None] * torch.linspace(1, 0.01, d)
    rotary = angles.cos().to(dtype), angles.sin().to(dtype)
    leaf = hidden.detach().clone().requires_grad_()
    shape = ops.LayerShape(heads=heads, kv_heads=kv_heads, head_size=d, eps=1e-6)
    out = ops.decoder_layer(leaf, weights, ops.Forest.of(at), rotary, shape, recompute=kind.recompute)
    out.backward(grad)  # type: ignore[no-untyped-call]
    named = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    leaves = {"hidden": leaf} | {name: weight for name, weight in named.items() if weight is not None}
    gradients = {name: one.grad for name, one in leaves.items() if one.grad is not None}
    assert gradients.keys() == leaves.keys()
    return gradients | {OUTPUT: out.detach()}


def _errors(found: Results, exact: Results) -> tuple[float, float]:
    value = float(((found[OUTPUT].double() - exact[OUTPUT]).abs() / (1 + exact[OUTPUT].abs())).max())
    gradients = [
        float((found[name].double() - exact[name]).norm() / max(float(exact[name].norm()), 1e-6))
        for name in exact
        if name != OUTPUT
    ]
    return value, max(gradients)


def _compare(kind: Kind) -> tuple[float, float]:
    hidden, grad = _hidden(kind, len(TREE))
    found = _run(kind, TREE, hidden, grad)
    with forced("reference"):
        return _errors(found, _run(kind, TREE, hidden.double(), grad.double()))


def _beside_nan() -> tuple[float, float]:
    """Rows of a tree do not see that another holds what is not a number."""
    kind = KINDS["norms of heads"]
    hidden, grad = _hidden(kind, len(TREE))
    alone = _run(kind, TREE, hidden, grad)
    bad = torch.full_like(hidden[:2], math.nan)
    found = _run(kind, [0, 1, *TREE], torch.cat([bad, hidden]), torch.cat([bad, grad]))
    pairs = ((found[name][2:], alone[name]) for name in (OUTPUT, "hidden"))
    same = [torch.allclose(one, other, rtol=1e-5, atol=1e-5) for one, other in pairs]
    return (0.0 if same[0] else math.inf), (0.0 if same[1] else math.inf)


def _compare_norm(rows: int, size: int) -> tuple[float, float]:
    made = torch.Generator().manual_seed(8)
    x, grad, weight = torch.randn(rows, size, generator=made), torch.randn(rows, size, generator=made), torch.rand(size)

    def run(dtype: torch.dtype) -> Results:
        leaves = [one.to(dtype, copy=True).requires_grad_() for one in (x, weight)]
        out = ops.rms_norm(leaves[0], leaves[1], 1e-2)
        by_x, by_weight = torch.autograd.grad(out, leaves, grad.to(dtype))
        return {OUTPUT: out.detach(), "x": by_x, "weight": by_weight}

    found = run(torch.float32)
    with forced("reference"):
        return _errors(found, run(torch.float64))
