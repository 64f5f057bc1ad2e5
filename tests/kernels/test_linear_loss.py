"""The head's operations where they could break: gradcheck, extreme rows, NaN, a large vocabulary, what they refuse."""

from __future__ import annotations

import itertools
import math
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpoforge_kernels.bench.accuracy import BOUNDS
from grpoforge_kernels.bench.forcing import forced
from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.ops import TokenStats, linear_logprobs, linear_loss
from grpoforge_kernels.reference import linear_logprobs as reference

INF = math.inf
bounds = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("bounds.py"))))
"""The table beside this file, which is no package."""

Run = Callable[..., tuple[tuple[Tensor, ...], Tensor]]


def driven_sum(stats: TokenStats, upstream: Tensor) -> Tensor:
    return torch.stack([(up.to(values) * values).sum() for up, values in zip(upstream, stats, strict=True)]).sum()


def by_panels(hidden: Tensor, weight: Tensor, ids: Tensor, upstream: Tensor, **options: Any) -> Any:
    """`TokenStats`, and their sum weighed by ``upstream [3, N]``."""
    stats = linear_logprobs(hidden, weight, ids, 0.7, chunk_bytes=20_000, **options)
    return tuple(values.detach() for values in stats), driven_sum(stats, upstream)


def by_rows(
    hidden: Tensor, weight: Tensor, ids: Tensor, upstream: Tensor, *, num_chunks: int = 2, **options: Any
) -> Any:
    """The same, in chunks of rows."""
    seen: list[tuple[Tensor, ...]] = []

    def loss(rows: slice, stats: TokenStats) -> Tensor:
        seen.append(tuple(values.detach().clone() for values in stats))
        return driven_sum(stats, upstream[:, rows])

    ends = [len(ids) * at // num_chunks for at in range(num_chunks + 1)]
    chunks = [slice(*pair) for pair in itertools.pairwise(ends)]
    total = linear_loss(hidden, weight, ids, 0.7, loss, chunks=chunks, chunk_bytes=20_000, **options)
    return tuple(torch.cat(values) for values in zip(*seen, strict=True)), total


def oracle(hidden: Tensor, weight: Tensor, ids: Tensor, upstream: Tensor, **options: Any) -> Any:
    stats = reference.linear_logprobs(hidden, weight, ids, 0.7, **options)
    return tuple(values.detach() for values in stats), driven_sum(stats, upstream)


both = pytest.mark.parametrize("run", [by_panels, by_rows])


def drawn(num_rows: int, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Hidden states, weight, bias, ids and the upstream ``[3, N]``."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = torch.randint(vocab_size, (num_rows,), generator=generator)
    hidden, weight, bias = normal(num_rows, hidden_size), normal(vocab_size, hidden_size), normal(vocab_size)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), ids, normal(3, num_rows)


class Again(torch.autograd.Function):
    """A function whose gradient can be asked for often, as gradcheck does: each time it is run anew."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(*inputs)
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        leaves = [one.detach().requires_grad_() for one in ctx.saved_tensors]
        with torch.enable_grad():
            return (None, *torch.autograd.grad(ctx.run(*leaves), leaves, upstream))


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "scale": 0.7}, {"mask": True}], ids=str)
def test_gradcheck_of_a_row_loss(options: dict[str, Any]) -> None:
    hidden, weight, bias, ids, upstream = drawn(5, 70, 3, torch.float64)
    if "mask" in options:
        options = {"mask": torch.tensor([True, False, True, True, False])}

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total: Tensor = by_rows(hidden, weight, ids, upstream, bias=bias, **options)[1]
        return total

    leaves = [one.requires_grad_() for one in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda *inputs: Again.apply(run, *inputs), leaves)  # type: ignore[no-untyped-call]


def extreme_logits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(7, 300, generator=generator)).to(dtype)
    ids = 2 * torch.randint(150, (7,), generator=generator)
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2] = 5.0
    logits[3], logits[3, 100], ids[3] = 0.0, 1e4, 100
    logits[4], logits[4, 100], ids[4] = 0.0, -1e4, 100
    logits[5], logits[5, 8], ids[5] = 0.0, 60.0, 8
    return logits, ids


@both
@pytest.mark.parametrize("banned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adversarial_rows(dtype: torch.dtype, banned: bool, run: Run) -> None:
    # One hidden state for each unit of width: the logits are the columns of the weight, and no product rounds.
    logits, ids = extreme_logits(dtype)
    bias = torch.zeros(300, dtype=dtype)
    if banned:
        bias[1::2] = -INF
    hidden, upstream = torch.eye(7, dtype=dtype), torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    found: list[Any] = []
    true: list[Any] = []
    for one, results, wide in ((run, found, dtype), (oracle, true, torch.float64)):
        weight = logits.T.to(wide).contiguous().requires_grad_()
        stats, total = one(hidden.to(wide), weight, ids, upstream, bias=bias.to(wide))
        results.extend([stats, torch.autograd.grad(total, weight)[0].T])
    bounds.assert_stats(found[0], true[0])
    g, h, l = upstream.double().abs()  # noqa: E741
    bounds.assert_gradient(found[1], true[1], (g + l + h * (1 + true[0][1].abs())) / 0.7)
    if banned:
        assert not found[1][:, 1::2].any()


@both
def test_not_a_number_stays_in_its_row(run: Run) -> None:
    hidden, weight, _, ids, upstream = drawn(6, 150, 16, torch.float32)
    clean = hidden.clone().requires_grad_()
    expected, total = run(clean, weight, ids, upstream)
    (right,) = torch.autograd.grad(total, clean)
    hidden[2, 3] = math.nan
    leaf = hidden.requires_grad_()
    stats, total = run(leaf, weight, ids, upstream)
    (gradient,) = torch.autograd.grad(total, leaf)
    others = torch.arange(6) != 2
    for values, wanted in zip((*stats, gradient), (*expected, right), strict=True):
        torch.testing.assert_close(values[others], wanted[others])
        assert values[2].isnan().all()


@pytest.mark.parametrize("run", [by_panels, partial(by_rows, num_chunks=1)], ids=["panels", "rows"])
def test_a_large_vocabulary(run: Run) -> None:
    # Four rows at a time: torch sums products of fewer one by one, which over 151,936 tokens costs a digit.
    hidden, weight, _, ids, upstream = drawn(4, 151_936, 16, torch.float32)
    ids[0], ids[1] = 0, 151_935
    results = []
    ways: tuple[tuple[Run, torch.dtype], ...] = ((run, torch.float32), (oracle, torch.float64))
    for one, dtype in ways:
        leaves = [value.to(dtype).requires_grad_() for value in (hidden, weight)]
        stats, total = one(*leaves, ids, upstream)
        results.append((stats, torch.autograd.grad(total, leaves)))
    (stats, gradients), (exact, exact_gradients) = results
    bound = BOUNDS["linear_logprobs", "fp32"]
    for values, right in zip(stats, exact, strict=True):
        assert float(((values - right).abs() / (1 + right.abs())).max()) <= bound.value
    for values, right in zip(gradients, exact_gradients, strict=True):
        assert float((values.double() - right).norm() / right.norm()) <= bound.gradient


@pytest.mark.parametrize("kernels", ["reference", pytest.param("cpp", marks=pytest.mark.needs_compiler)])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_gives_the_same(compiler: str, kernels: str) -> None:
    hidden, weight, bias, ids, upstream = drawn(12, 100, 16, torch.float32)

    coefficients = upstream[0].float()

    # Only what Dynamo traces, in float32: a loss that it cannot trace it leaves alone, with everything around it.
    def loss(rows: slice, stats: TokenStats) -> Tensor:
        return (coefficients[rows] * stats.logprobs + stats.entropy).sum()

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return 3 * linear_loss(hidden, weight, ids, 0.7, loss, chunks=[slice(0, 6), slice(6, 12)], bias=bias)

    found = []
    with forced(kernels):
        for run in (step, torch.compile(step, backend=compiler)):
            leaves = [one.clone().requires_grad_() for one in (hidden, weight, bias)]
            total = run(*leaves)
            found.append((total.detach(), *torch.autograd.grad(total, leaves)))
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(compiled, eager)


@both
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ids": torch.tensor([0, 30, 1])}, "token id 30 is outside the vocabulary of 30 tokens"),
        ({"ids": torch.tensor([0, -1, 1])}, "token id -1 is outside the vocabulary of 30 tokens"),
        ({"ids": torch.zeros(3, dtype=torch.int64, device="meta")}, "ids are on meta, not on cpu"),
        ({"weight": torch.zeros(30, 4, device="meta")}, "weight is on meta, not on cpu"),
        ({"bias": torch.zeros(30, device="meta")}, "bias is on meta, not on cpu"),
        ({"mask": torch.ones(3, dtype=torch.bool, device="meta")}, "mask is on meta, not on cpu"),
        ({"hidden": torch.zeros(3, 0)}, "hidden is torch.float32 [3, 0], not floats [N, H]"),
        ({"softcap": 0.0}, "softcap = 0.0 is not a positive number"),
        ({"softcap": -5.0}, "softcap = -5.0 is not a positive number"),
        ({"softcap": math.nan}, "softcap = nan is not a positive number"),
        ({"scale": 0.0}, "scale = 0.0 is not a positive number"),
        ({"scale": -1.0}, "scale = -1.0 is not a positive number"),
        ({"scale": math.inf}, "scale = inf is not a positive number"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], message: str, run: Run) -> None:
    hidden, weight, bias, ids, upstream = drawn(3, 30, 4, torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "ids": ids, "upstream": upstream, "bias": bias, **changed}
    with pytest.raises(KernelError) as caught:
        run(**arguments)
    assert caught.value.message == message
