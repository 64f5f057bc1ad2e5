"""Log-prob, entropy and logsumexp of chosen tokens against a float64 oracle: values, gradients, extremes, promises."""

from __future__ import annotations

import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpoforge_kernels import dispatch
from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.ops import TokenStats, selective_log_softmax
from grpoforge_kernels.rows import RowStats

bounds = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("bounds.py"))))
"""The table beside this file, which is no package."""
INF = math.inf
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)


@pytest.fixture(autouse=True, params=[pytest.param("cpp", marks=pytest.mark.needs_compiler), "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on both; float64 is always the reference's."""
    if request.param == "reference":
        monkeypatch.setenv("GRPOFORGE_KERNELS", "reference")
    else:
        monkeypatch.delenv("GRPOFORGE_KERNELS", raising=False)
    return str(request.param)


def oracle(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor | float,
    *,
    mask: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> TokenStats:
    """By autograd in float64 from the words of the definition, banned tokens taken out of the sum."""
    x = logits.double() * scale
    if softcap is not None:
        x = softcap * (x / softcap).tanh()
    z = x / (temperature.double()[:, None] if isinstance(temperature, Tensor) else temperature)
    table = z.log_softmax(dim=1)
    kept = table.where(table > -INF, 0.0)
    entropy = -(kept.exp() * kept).where(table > -INF, 0.0).sum(dim=1)
    at = ids if mask is None else ids.where(mask, 0)
    results = TokenStats(table.gather(1, at[:, None]).squeeze(1), entropy, z.logsumexp(dim=1))
    return results if mask is None else TokenStats(*(values.where(mask, 0.0) for values in results))


def compare(
    logits: Tensor, ids: Tensor, temperature: Tensor | float, *, slack: float = 1.0, seed: int = 0, **options: object
) -> Tensor:
    """Values and gradient of a random loss of all three against the oracle; returns the gradient."""
    # Not a clone, which would stand in memory without gaps.
    leaf, exact = logits.detach().requires_grad_(), logits.detach().double().requires_grad_()
    results = selective_log_softmax(leaf, ids, temperature, **options)  # type: ignore[arg-type]
    expected = oracle(exact, ids, temperature, **options)  # type: ignore[arg-type]
    assert {values.dtype for values in results} == {torch.float32}
    bounds.assert_stats(tuple(values.detach() for values in results), tuple(e.detach() for e in expected), slack=slack)
    upstream = torch.randn(3, len(ids), generator=torch.Generator().manual_seed(seed))
    (gradient,) = torch.autograd.grad(results, leaf, tuple(upstream))
    (expected_gradient,) = torch.autograd.grad(expected, exact, tuple(upstream.double()))
    s = 1 / temperature if isinstance(temperature, float) else temperature.double().reciprocal()
    g, h, l = upstream.double().abs()  # noqa: E741
    driven = options.get("scale", 1.0) * s * (g + l + h * (1 + expected.entropy.detach().abs()))  # type: ignore[operator]
    assert gradient.dtype == logits.dtype
    bounds.assert_gradient(gradient, expected_gradient, driven, slack=slack)
    return gradient


def case(num_rows: int, num_tokens: int, dtype: torch.dtype, seed: int = 0, size: float = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (size * torch.randn(num_rows, num_tokens, generator=generator)).to(dtype)
    return logits, torch.randint(0, num_tokens, (num_rows,), generator=generator)


def with_gaps(logits: Tensor) -> Tensor:
    """The same rows with what is no number between them."""
    return torch.cat([logits, torch.full_like(logits[:, :1], math.nan).expand(-1, 3)], dim=1)[:, : logits.shape[1]]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda logits: logits,
    "gaps between rows": with_gaps,
    "not aligned": lambda logits: torch.cat([logits.new_zeros(1), logits.flatten()])[1:].view_as(logits),
    "transposed": lambda logits: logits.t().contiguous().t(),
    "every other": lambda logits: logits.repeat_interleave(2, dim=1)[:, ::2],
}
SCORES: list[dict[str, float]] = [{}, {}, {"scale": 0.3}, {"softcap": 5.0}, {"softcap": 20.0, "scale": 2.0}]


@given(
    num_rows=st.integers(1, 9),
    num_tokens=st.sampled_from([1, 2, 3, 7, 15, 16, 17, 257, 2047, 2048, 2049, 5003]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
    size=st.sampled_from([0.1, 1.0, 4.0]),
    is_scalar=st.booleans(),
    masked=st.sampled_from(["none", "some", "all"]),
    layout=st.sampled_from(list(LAYOUTS)),
    scores=st.sampled_from(SCORES),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_dtype_temperature_mask_layout_and_scores(
    num_rows: int,
    num_tokens: int,
    dtype: torch.dtype,
    seed: int,
    size: float,
    is_scalar: bool,
    masked: str,
    layout: str,
    scores: dict[str, float],
) -> None:
    logits, ids = case(num_rows, num_tokens, dtype, seed, size)
    generator = torch.Generator().manual_seed(seed)
    temperature = 0.05 * 400 ** torch.rand(num_rows, generator=generator)
    some = torch.rand(num_rows, generator=generator) < 0.5
    mask = {"none": None, "some": some, "all": torch.zeros_like(some)}[masked]
    chosen = float(temperature[0]) if is_scalar else temperature
    # A capped score is rounded to float32 before its exponent is taken, and colder rows make more of that.
    slack = 1.0 if not scores else 4 / min(1.0, float(temperature.min()))
    compare(LAYOUTS[layout](logits), ids, chosen, mask=mask, seed=seed, slack=slack, **scores)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_vocabulary(dtype: torch.dtype) -> None:
    logits, ids = case(2, 151_936, dtype)
    compare(logits, ids, torch.tensor([1.0, 0.6]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("softcap", "scale"), [(30.0, 1.0), (None, 0.0625), (None, 0.3), (20.0, 0.5), (5.0, 2.0)])
def test_softcap_and_scale(dtype: torch.dtype, softcap: float | None, scale: float) -> None:
    logits, ids = case(6, 2500, dtype, size=10)
    mask = torch.tensor([True] * 5 + [False])
    # A score is rounded to float32 before its exponent is taken: near a cap of 30 that is 2e-6 of nats.
    compare(logits, ids, torch.tensor([1.0, 0.7, 1.5, 0.5, 3.0, 1.0]), softcap=softcap, scale=scale, mask=mask, slack=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adversarial_rows(dtype: torch.dtype) -> None:
    logits, ids = case(10, 3000, dtype)
    logits[0, ::2], ids[0] = -INF, 1
    logits[1, :2500], ids[1] = -INF, 2999
    logits[2], logits[2, 77], ids[2] = -INF, 4.0, 77
    logits[3] = 5.0
    logits[4], logits[4, 100], ids[4] = 0.0, 1e4, 100
    logits[5], logits[5, 100], ids[5] = 0.0, -1e4, 100
    logits[6] += 1e4
    logits[7] -= 1e4
    logits[8], logits[8, 9], ids[8] = 0.0, 60.0, 9
    logits[9, 2:] = -INF
    ids[9] = 1
    gradient = compare(logits, ids, torch.tensor([0.7, 1.3] * 5))
    assert bool((gradient[logits == -INF] == 0).all())
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(selective_log_softmax(leaf, ids, 1.0).logprobs.sum(), leaf)
    assert bool((gradient[[2, 4]] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_softcap_bounds_extremes_and_banned_tokens(dtype: torch.dtype) -> None:
    logits, ids = case(5, 300, dtype)
    logits[0, 7], ids[0] = 1e4, 7
    logits[1, 7], ids[1] = -1e4, 7
    logits[2, ::2], ids[2] = -INF, 1
    logits[3, ::2], ids[3] = -INF, 2
    logits[4, 1:], ids[4] = -INF, 0
    gradient = compare(logits, ids, torch.tensor([0.7, 1.3, 1.0, 0.5, 1.0]), softcap=5.0, slack=4)
    assert bool((gradient[logits == -INF] == 0).all())
    logprobs = selective_log_softmax(logits[4:], torch.tensor([9]), 1.0, softcap=5.0).logprobs
    # Not banned: 299 tokens at -5 beside one at 5 tanh(x / 5).
    chosen = 5 * math.tanh(float(logits[4, 0]) / 5)
    assert float(logprobs) == pytest.approx(-5 - math.log(math.exp(chosen) + 299 * math.exp(-5)), rel=1e-5)


def test_by_hand() -> None:
    # Logits 0 and ln 3: probabilities 1/4 and 3/4. At temperature 1/2 the odds are squared: 1/10 and 9/10.
    logits = torch.tensor([[0.0, math.log(3)]] * 2)
    logprobs, entropy, logsumexp = selective_log_softmax(logits, torch.tensor([1, 0]), torch.tensor([1.0, 0.5]))
    assert logprobs.tolist() == pytest.approx([math.log(0.75), math.log(0.1)])
    expected = [
        -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)),
        -(0.1 * math.log(0.1) + 0.9 * math.log(0.9)),
    ]
    assert entropy.tolist() == pytest.approx(expected)
    assert logsumexp.tolist() == pytest.approx([math.log(4), math.log(10)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_banned_tokens_and_a_banned_token_that_was_drawn(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, -INF, 0.0, -INF], [3.0, -INF, -INF, -INF], [0.0, -INF, 0.0, 0.0]], dtype=dtype)
    logits.requires_grad_()
    logprobs, entropy, _ = selective_log_softmax(logits, torch.tensor([2, 0, 1]), torch.tensor([0.7, 1.3, 1.0]))
    assert logprobs.tolist() == pytest.approx([-math.log(2), 0.0, -INF])
    assert entropy.tolist() == pytest.approx([math.log(2), 0.0, math.log(3)])
    (gradient,) = torch.autograd.grad(logprobs[:2].sum(), logits)
    assert gradient[0].tolist() == pytest.approx([-0.5 / 0.7, 0.0, 0.5 / 0.7, 0.0], rel=1e-2)
    assert gradient[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_banned_tokens_have_no_gradient_when_the_logits_are_scaled(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, -INF, 0.0, -INF]], dtype=dtype, requires_grad=True)
    logprobs = selective_log_softmax(logits, torch.tensor([2]), 1.0, scale=0.5).logprobs
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    assert gradient.tolist() == [[-0.25, 0.0, 0.25, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_maximum_that_rises_from_part_to_part(dtype: torch.dtype) -> None:
    # A little each time, so that sums keep their base, then a lot; the first part may be banned altogether.
    logits, ids = case(4, 9000, dtype)
    logits = logits + torch.linspace(0, 1, 9000)[None].to(dtype) * torch.tensor(
        [[0.5], [3.0], [40.0], [0.0]], dtype=dtype
    )
    logits[3, :5000] = -INF
    ids = ids.clamp(min=5000)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found, expected = selective_log_softmax(leaf, ids, 0.7), selective_log_softmax(exact, ids, 0.7)
    bounds.assert_stats(tuple(one.detach() for one in found), tuple(one.detach() for one in expected))
    (gradient,) = torch.autograd.grad(found.logprobs.sum(), leaf)
    (true,) = torch.autograd.grad(expected.logprobs.sum(), exact)
    bounds.assert_gradient(gradient, true, torch.full((4,), 1 / 0.7))


@pytest.mark.parametrize("upstream", [1.0, 1e-4])
@pytest.mark.parametrize("of_entropy", [0.0, 1.0, 1e-37, 1e-40])
def test_gradients_too_small_for_a_normal_number_are_nothing(backend: str, upstream: float, of_entropy: float) -> None:
    """Low temperatures spread logits this far, and processors take sixty times as long for subnormal numbers."""
    smallest = torch.finfo(torch.float32).tiny
    logits = torch.linspace(0, -110, 4000).repeat(2, 1).requires_grad_()
    stats = selective_log_softmax(logits, torch.tensor([0, 3999]), 1.0)
    (upstream * (stats.logprobs + of_entropy * stats.entropy)).sum().backward()
    wide = logits.detach().double().requires_grad_()
    exact = oracle(wide, torch.tensor([0, 3999]), 1.0)
    (upstream * (exact.logprobs + of_entropy * exact.entropy)).sum().backward()
    assert logits.grad is not None and wide.grad is not None
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=2e-5, atol=200 * smallest)
    if backend == "cpp":
        size = logits.grad.abs()
        assert (size > 0).sum() > 4000
        assert not ((size > 0) & (size < smallest)).any()


@pytest.mark.parametrize("wrong", [math.nan, INF])
def test_what_is_no_number_stays_in_its_row(wrong: float) -> None:
    logits, ids = case(4, 700, torch.float32)
    expected = selective_log_softmax(logits, ids, 1.0)
    logits[1, 650], logits[2] = wrong, -INF
    leaf = logits.clone().requires_grad_()
    results = selective_log_softmax(leaf, ids, 1.0)
    for values, clean in zip(results, expected, strict=True):
        assert torch.equal(values.detach()[[0, 3]], clean[[0, 3]])
    assert bool(results.logprobs[1:3].isnan().all() and results.entropy[1:3].isnan().all())
    (gradient,) = torch.autograd.grad(results.logprobs.sum(), leaf)
    assert bool(gradient[[0, 3]].isfinite().all()) and bool(gradient[1].isnan().any())
    mask = torch.tensor([True, False, False, True])
    results = selective_log_softmax(leaf, ids.index_fill(0, torch.tensor([1]), -100), 1.0, mask=mask)
    assert all(values[1:3].tolist() == [0.0, 0.0] for values in results)
    (gradient,) = torch.autograd.grad(sum(values.sum() for values in results), leaf)  # type: ignore[arg-type]
    assert bool((gradient[1:3] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_no_rows(dtype: torch.dtype) -> None:
    logits = torch.zeros(0, 5, requires_grad=True, dtype=dtype)
    results = selective_log_softmax(logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert [values.shape for values in results] == [(0,)] * 3
    (gradient,) = torch.autograd.grad(results.logprobs.sum(), logits)
    assert gradient.shape == (0, 5)
    apart = torch.zeros(0, 10, dtype=dtype)[:, ::2]
    assert selective_log_softmax(apart, torch.zeros(0, dtype=torch.int64), 1.0).entropy.shape == (0,)


def test_what_does_not_fit_is_refused() -> None:
    logits, ids = case(2, 5, torch.float32)
    for wrong, message in (
        ((logits.long(), ids), r"logits are torch.int64 \[2, 5\], not floats \[N, V\]"),
        ((logits[0], ids), r"logits are torch.float32 \[5\]"),
        ((logits[:, :0], ids), r"logits are torch.float32 \[2, 0\]"),
        ((logits, ids[:1]), r"ids are torch.int64 \[1\], not int64 \[2\]"),
        ((logits, ids.int()), r"ids are torch.int32 \[2\], not int64 \[2\]"),
        ((logits, torch.tensor([5, 0])), "token id 5 is outside the vocabulary of 5 tokens"),
        ((logits, torch.tensor([0, -1])), "token id -1 is outside the vocabulary of 5 tokens"),
    ):
        with pytest.raises(KernelError, match=message):
            selective_log_softmax(*wrong, 1.0)
    with pytest.raises(KernelError, match=r"mask is torch.int64 \[2\], not bool \[2\]"):
        selective_log_softmax(logits, ids, 1.0, mask=ids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_and_expanded_logits_and_strided_vectors(dtype: torch.dtype) -> None:
    logits, ids = case(6, 90, dtype)
    expected = selective_log_softmax(logits, ids, torch.full((6,), 0.7))
    odd = torch.stack([ids, ids], dim=1).flatten()[1::2]
    assert odd.stride() == (2,)
    transposed = logits.t().contiguous().t().requires_grad_()
    results = selective_log_softmax(transposed, odd, torch.full((12,), 0.7)[::2])
    assert all(torch.equal(ours.detach(), other) for ours, other in zip(results, expected, strict=True))
    (gradient,) = torch.autograd.grad(results.logprobs.sum(), transposed)
    leaf = logits.clone().requires_grad_()
    (plain,) = torch.autograd.grad(selective_log_softmax(leaf, ids, 0.7).logprobs.sum(), leaf)
    assert torch.equal(gradient, plain)
    repeated = selective_log_softmax(logits[:1].expand(3, 90), ids[:1].expand(3), 0.7)
    assert repeated.entropy.tolist() == [float(expected.entropy[0])] * 3


def all_of(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    leaf = logits.detach().requires_grad_()
    results = selective_log_softmax(leaf, ids, 0.9)
    return (*(values.detach() for values in results), *torch.autograd.grad(sum(v.sum() for v in results), leaf))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_run_the_threads_the_batch_or_the_place(dtype: torch.dtype) -> None:
    logits, ids = case(24, 5003, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = all_of(logits, ids)
        torch.set_num_threads(2)
        for again in (all_of(logits, ids), all_of(logits, ids)):
            assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))
    finally:
        torch.set_num_threads(before)
    shifted = torch.cat([torch.zeros(1, dtype=dtype), logits.flatten()])[1:].view_as(logits)
    assert all(torch.equal(a, b) for a, b in zip(alone, all_of(shifted, ids), strict=True))
    for row in (0, 7, 23):
        one = all_of(logits[row : row + 1], ids[row : row + 1])
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(alone, one, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_in_place_is_the_same_and_takes_no_second_tensor(dtype: torch.dtype) -> None:
    logits, ids = case(6, 2500, dtype)
    gradients = {}
    for overwrite in (False, True):
        leaf = logits.clone().requires_grad_()
        inner = leaf * 1
        inner.retain_grad()
        version = inner._version
        results = selective_log_softmax(inner, ids, 0.8, overwrite_logits=overwrite)
        (results.logprobs.sum() + results.entropy.mean()).backward()  # type: ignore[no-untyped-call]
        assert inner.grad is not None and leaf.grad is not None
        assert torch.equal(inner.grad, leaf.grad)
        gradients[overwrite] = leaf.grad
        assert torch.equal(inner.detach(), leaf.grad if overwrite else logits)
        assert (inner._version > version) == overwrite
    assert torch.equal(gradients[False], gradients[True])


def test_what_must_not_be_overwritten_is_not() -> None:
    logits, ids = case(3, 20, torch.float32)
    for make in (
        lambda leaf: leaf,
        lambda leaf: leaf.t().contiguous().t(),
        lambda leaf: (leaf[:1] * 1).expand(3, 20),
    ):
        leaf = logits.clone().requires_grad_()
        given_logits = make(leaf)  # type: ignore[no-untyped-call]
        kept = given_logits.detach().clone()
        loss = selective_log_softmax(given_logits, ids, 1.0, overwrite_logits=True).logprobs.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        assert torch.equal(given_logits.detach(), kept) and leaf.grad is not None


def test_a_second_backward_over_what_was_overwritten_is_an_error() -> None:
    leaf = torch.randn(3, 20, requires_grad=True)
    ids = torch.tensor([1, 2, 3])
    loss = selective_log_softmax(leaf * 1, ids, 1.0, overwrite_logits=True).logprobs.sum()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(
        KernelError, match="a second backward pass reached logits that the first one overwrote"
    ) as caught:
        loss.backward()  # type: ignore[no-untyped-call]
    assert caught.value.hint == "call selective_log_softmax with overwrite_logits=False to go back through it twice"
    # Another reader of the same logits is told by autograd.
    inner = leaf * 1
    both = inner.square().sum() + selective_log_softmax(inner, ids, 1.0, overwrite_logits=True).logprobs.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        both.backward()  # type: ignore[no-untyped-call]


def test_a_gradient_of_the_gradient_is_an_error() -> None:
    leaf = torch.randn(3, 20, requires_grad=True)
    results = selective_log_softmax(leaf, torch.tensor([1, 2, 3]), 1.0)
    (gradient,) = torch.autograd.grad(results.logprobs.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("shift", [1e2, -1e2, 1e4, -1e4])
def test_a_shift_of_the_logits_changes_nothing(shift: float) -> None:
    # Multiples of 1/64, so that the shifted logits are exact in float32.
    logits, ids = case(5, 700, torch.float32)
    logits = (logits * 64).round() / 64
    here, there = all_of(logits, ids), all_of(logits + shift, ids)
    for ours, moved, size in zip(here[:2], there[:2], (1, 1), strict=True):
        torch.testing.assert_close(ours, moved, rtol=1e-6 * size, atol=1e-6)
    torch.testing.assert_close(here[3], there[3], rtol=1e-4, atol=abs(shift) * 2e-7)


def test_permuting_the_vocabulary_permutes_the_gradient() -> None:
    logits, ids = case(5, 700, torch.float32)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    place = order.argsort()
    here, there = all_of(logits, ids), all_of(logits[:, order].contiguous(), place[ids])
    for ours, moved in zip(here[:3], there[:3], strict=True):
        torch.testing.assert_close(ours, moved, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(here[3][:, order], there[3], rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_log_prob_sums_to_nothing() -> None:
    logits, ids = case(5, 5003, torch.float32)
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(selective_log_softmax(leaf, ids, 1.0).logprobs.sum(), leaf)
    assert gradient.double().sum(dim=1).abs().max() < 1e-5


def test_gradcheck() -> None:
    logits, ids = case(5, 40, torch.float32)
    leaf = logits.double().requires_grad_()
    mask = torch.tensor([True] * 4 + [False])
    temperature = torch.tensor([0.5, 1.0, 2.0, 1.5, 1.0], dtype=torch.float64)
    for options in ({}, {"softcap": 4.0, "scale": 0.5}, {"mask": mask}):
        function = lambda z, options=options: tuple(selective_log_softmax(z, ids, temperature, **options))  # noqa: E731
        assert torch.autograd.gradcheck(function, [leaf])


def test_offsets_beyond_two_to_the_31() -> None:
    # 4.3 GB of addresses of which three rows are ever touched.
    try:
        room = torch.empty(2**31 + 5000, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.fail("4.3 GB of address space are needed")
    logits = room.as_strided((3, 5000), (2**30, 1))
    values, ids = case(3, 5000, torch.bfloat16)
    logits.copy_(values)
    for ours, expected in zip(
        selective_log_softmax(logits, ids, 1.0), selective_log_softmax(values, ids, 1.0), strict=True
    ):
        assert torch.equal(ours, expected)
    module = dispatch.backend("selective_log_softmax", logits.device, logits.dtype)
    s, options = torch.ones(3), {"mask": None, "softcap": None, "scale": 1.0}
    stats: RowStats = module.row_stats(values, ids, s, **options)
    upstream = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    expected_gradient = module.row_gradient(values, ids, s, stats, *upstream, **options)
    assert torch.equal(module.row_gradient(logits, ids, s, stats, *upstream, out=logits, **options), expected_gradient)


def test_opcheck() -> None:
    logits, ids = case(3, 30, torch.float32)
    arguments = (logits.requires_grad_(), ids, torch.ones(3), torch.tensor([True, True, False]), 5.0, 0.5)
    torch.library.opcheck(torch.ops.grpoforge.selective_log_softmax.default, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_takes_it_in_one_graph_and_keeps_the_logits(compiler: str) -> None:
    logits, ids = case(4, 50, torch.float32)

    def loss(z: Tensor) -> Tensor:
        doubled = z * 2
        results = selective_log_softmax(doubled, ids, 0.7, overwrite_logits=True)
        return (results.logprobs * results.entropy + results.logsumexp).sum() + doubled.square().sum()

    def eager(z: Tensor) -> Tensor:
        results = selective_log_softmax(z * 2, ids, 0.7)
        return (results.logprobs * results.entropy + results.logsumexp).sum() + (z * 2).square().sum()

    first, second = (logits.clone().requires_grad_() for _ in range(2))
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)(first)
    expected = eager(second)
    assert float(compiled.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    compiled.backward()  # type: ignore[no-untyped-call]
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(first.grad, second.grad)


@pytest.mark.parametrize("overwrite", [False, True])
def test_checkpointing_gives_the_same_gradient(overwrite: bool) -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8)
    ids = torch.tensor([1, 2, 3, 4])

    def logprobs(x: Tensor) -> Tensor:
        return selective_log_softmax(x @ weight.t(), ids, 1.0, overwrite_logits=overwrite).logprobs

    (expected,) = torch.autograd.grad(logprobs(hidden).sum(), hidden)
    again = checkpoint(logprobs, hidden, use_reentrant=False)
    assert isinstance(again, Tensor)
    (gradient,) = torch.autograd.grad(again.sum(), hidden)
    assert torch.equal(gradient, expected)


def test_nothing_is_kept_or_computed_for_no_gradient() -> None:
    logits, ids = case(3, 20, torch.float32)
    with torch.no_grad():
        assert not selective_log_softmax(logits.requires_grad_(), ids, 1.0).logprobs.requires_grad
    results = selective_log_softmax(logits, ids, 1.0)
    (gradient,) = torch.autograd.grad(results.entropy.sum(), logits)
    assert bool(gradient.any())


def test_rows_without_upstream_are_not_read() -> None:
    logits, ids = case(3, 20, torch.float32)
    module = dispatch.backend("selective_log_softmax", logits.device, logits.dtype)
    stats = module.row_stats(logits, ids, torch.ones(3), mask=None, softcap=None, scale=1.0)
    g, zero = torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3)
    logits[1] = math.nan
    gradient = module.row_gradient(logits, ids, torch.ones(3), stats, g, zero, zero, mask=None, softcap=None, scale=1.0)
    assert gradient[1].tolist() == [0.0] * 20 and bool(gradient[[0, 2]].all())


MEASURE = """
import gc, torch
from grpoforge_kernels.ops import selective_log_softmax

torch.set_num_threads(1)

def status(key):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

def step(dtype, num_rows, num_tokens):
    leaf = torch.empty(num_rows, num_tokens, dtype=dtype).uniform_(-9, 9).requires_grad_()
    ids = torch.arange(num_rows)
    gc.collect()
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    # A leaf is never overwritten, so the operation gets a view.
    stats = selective_log_softmax(leaf.view_as(leaf), ids, 0.9, overwrite_logits=True)
    (gradient,) = torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum(), leaf)
    assert gradient.data_ptr() == leaf.data_ptr()
    return status("VmHWM") - before

for dtype in (torch.float32, torch.bfloat16):
    step(dtype, 64, 1000)  # the library, threads and their buffers
    print(step(dtype, 256, 65_536))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_in_place(backend: str) -> None:
    # Not by ru_maxrss, which a child takes over from the process that starts it.
    if backend != "cpp":
        pytest.skip("the promise is that of the fused backend")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, env=environment
    )  # fmt: skip
    peaks = [int(line) for line in done.stdout.split()]
    assert len(peaks) == 2 and max(peaks) <= 20 * 256 + 4 * 2**20, peaks
