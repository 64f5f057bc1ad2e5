"""Log-probs straight from hidden states against a float64 oracle: values, gradients, skipping, modes, memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpoforge_kernels import dispatch, linear_panels
from grpoforge_kernels import linear_logprobs as linear_logprobs_module
from grpoforge_kernels.bench.accuracy import BOUNDS
from grpoforge_kernels.bench.problems import TORCH_DTYPES
from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.linear_logprobs import TokenStats, linear_logprobs, peak_extra_bytes
from grpoforge_kernels.linear_loss import linear_loss
from grpoforge_kernels.reference import linear_logprobs as reference
from grpoforge_kernels.selective_log_softmax import selective_log_softmax

BOUND = {
    torch.float64: 1e-12,
    **{dtype: BOUNDS["linear_logprobs", name].gradient for name, dtype in TORCH_DTYPES.items()},
}
"""Relative Frobenius error of a gradient; half precision rounds it once."""
VALUE = BOUNDS["linear_logprobs", "fp32"].value
"""Of log-prob, entropy and logsumexp, in every dtype: products are exact, and sums float32."""


@dataclass(frozen=True)
class Case:
    """Inputs, options and the coefficients ``[3, N]`` of a loss linear in log-prob, entropy and logsumexp."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    temperature: Tensor | float
    coefficients: Tensor
    mask: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    @property
    def options(self) -> dict[str, object]:
        return {"mask": self.mask, "softcap": self.softcap, "scale": self.scale}

    def loss(self, rows: slice, stats: TokenStats) -> Tensor:
        terms = (c[rows].to(values) * values for c, values in zip(self.coefficients, stats, strict=True))
        return torch.stack([term.sum() for term in terms]).sum()


def case(
    num_rows: int = 19, vocab_size: int = 211, dtype: torch.dtype = torch.float32, hidden_size: int = 16, seed: int = 0
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Case(
        normal(num_rows, hidden_size).to(dtype),
        normal(vocab_size, hidden_size).to(dtype),
        normal(vocab_size).to(dtype),
        torch.randint(vocab_size, (num_rows,), generator=generator),
        0.5 + torch.rand(num_rows, generator=generator),
        normal(3, num_rows),
    )


Results = tuple[TokenStats | None, list[Tensor | None]]
Run = Callable[[Case], Results]


def leaves(c: Case, dtype: torch.dtype | None = None, frozen: bool = False) -> list[Tensor | None]:
    inputs = [c.hidden, c.weight, c.bias]
    # A clone of a tensor with gaps has none.
    wide = [None if one is None else one.detach().to(dtype or one.dtype) for one in inputs]
    return [one if one is None or (frozen and at) else one.requires_grad_() for at, one in enumerate(wide)]


def oracle(c: Case) -> Results:
    hidden, weight, bias = inputs = leaves(c, torch.float64)
    stats = reference.linear_logprobs(hidden, weight, c.ids, c.temperature, bias=bias, **c.options)
    c.loss(slice(None), stats).backward()
    return stats, [one if one is None else one.grad for one in inputs]


def by_panels(c: Case, *, frozen: bool = False, chunk_bytes: int = 20_000, skip_zero_rows: bool = True) -> Results:
    """Small panels: 64 tokens wide, so that most cases have several."""
    hidden, weight, bias = inputs = leaves(c, frozen=frozen)
    more = {"bias": bias, "chunk_bytes": chunk_bytes, "skip_zero_rows": skip_zero_rows, **c.options}
    stats = linear_logprobs(hidden, weight, c.ids, c.temperature, **more)
    c.loss(slice(None), stats).backward()
    return stats, [one if one is None else one.grad for one in inputs]


def by_rows(c: Case, *, chunk_rows: int = 7, chunk_bytes: int = 20_000, skip_zero_rows: bool = True) -> Results:
    hidden, weight, bias = inputs = leaves(c)
    chunks = [slice(at, min(at + chunk_rows, len(c.ids))) for at in range(0, len(c.ids), chunk_rows)]
    more = {"bias": bias, "chunk_bytes": chunk_bytes, "skip_zero_rows": skip_zero_rows, **c.options}
    linear_loss(hidden, weight, c.ids, c.temperature, c.loss, chunks=chunks, **more).backward()
    return None, [one if one is None else one.grad for one in inputs]


def error(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius."""
    scale = expected.double().norm().item()
    return (found.double() - expected.double()).norm().item() / (scale if scale else 1.0)


def assert_close(found: Results, expected: Results, bound: float, *, values: float = VALUE) -> None:
    for one, other in zip(found[0] or (), expected[0] or (), strict=False):
        torch.testing.assert_close(one.double(), other.double(), rtol=values, atol=values)
    for one, other in zip(found[1], expected[1], strict=True):
        if one is not None:
            assert other is not None
            assert error(one, other) <= bound


VARIANTS: dict[str, Callable[[Case], Case]] = {
    "plain": lambda c: replace(c, bias=None),
    "bias": lambda c: c,
    "number as temperature": lambda c: replace(c, temperature=0.7),
    "mask": lambda c: replace(c, mask=torch.arange(len(c.ids)) % 3 > 0),
    "softcap and scale": lambda c: replace(c, softcap=5.0, scale=0.7),
    "mask and softcap": lambda c: replace(c, mask=torch.arange(len(c.ids)) % 2 > 0, softcap=3.0),
    "entropy only": lambda c: replace(c, coefficients=c.coefficients * torch.tensor([[0.0], [1.0], [0.0]])),
    "logsumexp only": lambda c: replace(c, coefficients=c.coefficients * torch.tensor([[0.0], [0.0], [1.0]])),
    "log-probs only": lambda c: replace(c, coefficients=c.coefficients * torch.tensor([[1.0], [0.0], [0.0]])),
    "zero rows": lambda c: replace(c, coefficients=c.coefficients * (torch.arange(len(c.ids)) % 2)),
}


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_mode_equals_the_oracle(variant: str, dtype: torch.dtype) -> None:
    c = VARIANTS[variant](case(dtype=dtype))
    expected = oracle(c)
    stats, gradients = by_panels(c)
    assert stats is not None
    assert stats.logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradients[0] is not None and gradients[0].dtype == dtype
    for found in ((stats, gradients), by_panels(c, frozen=True), by_rows(c)):
        assert_close(found, expected, BOUND[dtype])


@pytest.mark.parametrize("vocab_size", [1, 2, 61, 64, 65, 128, 1100])
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_every_size(num_rows: int, vocab_size: int) -> None:
    # 1100 is no multiple of a panel: verl's kernel counts the columns that are not there.
    c = case(num_rows, vocab_size)
    if num_rows == 0:
        for _, gradients in (by_panels(c), by_rows(c)):
            assert all(one is not None and not one.any() for one in gradients)
        assert by_panels(c, frozen=True)[1][0].shape == (0, 16)
        return
    expected = oracle(c)
    for found in (by_panels(c), by_panels(c, frozen=True), by_rows(c)):
        assert_close(found, expected, BOUND[torch.float32])


def apart(matrix: Tensor) -> Tensor:
    """The same numbers, every other one in memory."""
    return matrix.repeat_interleave(2, dim=1)[:, ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows apart": lambda matrix: torch.cat([matrix, matrix], dim=1)[:, : matrix.shape[1]],
    "transposed": lambda matrix: matrix.t().contiguous().t(),
    "apart": apart,
    "apart and transposed": lambda matrix: apart(matrix.t().contiguous()).t(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("which", ["hidden", "weight", "both"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_equals_the_oracle(layout: str, which: str, dtype: torch.dtype) -> None:
    c = case(dtype=dtype)
    names = ("hidden", "weight") if which == "both" else (which,)
    strided = replace(c, **{name: LAYOUTS[layout](getattr(c, name)) for name in names})
    expected = oracle(c)
    for run in (by_panels, partial(by_panels, frozen=True), partial(by_panels, chunk_bytes=2**24), by_rows):
        assert_close(run(strided), expected, BOUND[dtype])


@settings(max_examples=80, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    vocab_size=st.integers(1, 300),
    hidden_size=st.integers(1, 9),
    dtype=st.sampled_from(list(BOUND)),
    chunk_bytes=st.sampled_from([1, 20_000, 2**20, 2**24]),
    chunk_rows=st.integers(1, 40),
    temperature=st.sampled_from([0.05, 0.7, 20.0, None]),
    masked=st.booleans(),
    biased=st.booleans(),
    scores=st.sampled_from([{}, {"scale": 0.3}, {"softcap": 5.0}, {"softcap": 3.0, "scale": 2.0}]),
    layouts=st.tuples(*[st.sampled_from([None, *LAYOUTS])] * 2),
)
def test_any_shape_dtype_temperature_layout_and_scores(
    num_rows: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, chunk_bytes: int, chunk_rows: int,
    temperature: float | None, masked: bool, biased: bool, scores: dict[str, float],
    layouts: tuple[str | None, str | None],
) -> None:  # fmt: skip
    c = case(num_rows, vocab_size, dtype, hidden_size)
    hidden, weight = (
        one if layout is None else LAYOUTS[layout](one)
        for one, layout in zip((c.hidden, c.weight), layouts, strict=True)
    )
    for_each_row = 0.05 * 400 ** torch.rand(num_rows, generator=torch.Generator().manual_seed(vocab_size))
    c = replace(
        c,
        hidden=hidden,
        weight=weight,
        bias=c.bias if biased else None,
        temperature=for_each_row if temperature is None else temperature,
        mask=torch.arange(num_rows) % 2 > 0 if masked else None,
        **scores,
    )
    (values, gradients), (largest, sizes) = oracle(c), terms(c)
    for run in (by_panels, partial(by_panels, frozen=True), partial(by_rows, chunk_rows=chunk_rows)):
        found = run(c, chunk_bytes=chunk_bytes)
        assert_close((found[0], []), (values, []), 0.0, values=VALUE * largest)
        for one, exact, size in zip(found[1], gradients, sizes, strict=True):
            # Twice: the bounds are of many numbers, and of a few each may be rounded the worst way.
            assert one is None or (one.double() - exact).norm() <= 2 * BOUND[dtype] * largest * size


def terms(c: Case) -> tuple[float, list[Tensor]]:
    """The largest score, at least 1, whose rounding is what an exponent is off by; and how large hidden's, weight's and
    bias' gradients would be if none of their terms canceled each other: few terms may cancel altogether.
    """
    hidden, weight = c.hidden.double(), c.weight.double()
    logits = (hidden @ weight.T + (0 if c.bias is None else c.bias.double())).requires_grad_()
    c.loss(slice(None), selective_log_softmax(logits, c.ids, c.temperature, **c.options)).backward()
    assert logits.grad is not None
    driven, scores = logits.grad.abs(), logits.detach() * c.scale / torch.as_tensor(c.temperature).reshape(-1, 1)
    sizes = [(driven @ weight.abs()).norm(), (driven.T @ hidden.abs()).norm(), driven.sum(dim=0).norm()]
    return max(1.0, float(scores.abs().max())), sizes


@pytest.mark.parametrize("frozen", [False, True])
def test_gradcheck(frozen: bool) -> None:
    c = case(5, 70, torch.float64, 3)
    inputs = [one for one in leaves(c, frozen=frozen) if one is not None]

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        hidden, weight, bias = arguments
        return tuple(linear_logprobs(hidden, weight, c.ids, c.temperature, bias=bias, softcap=4.0, chunk_bytes=1))

    assert torch.autograd.gradcheck(run, inputs)


def nearly_certain(dtype: torch.dtype) -> Case:
    """A case in which the chosen token of every row has probability 0.9998, by its temperature."""
    c = case(31, 130, dtype, hidden_size=64)
    hidden = (c.hidden.double() + 2 * c.weight[c.ids].double()).to(dtype)
    scores = hidden.double() @ c.weight.double().T
    low, high = torch.zeros(31, dtype=torch.float64), torch.ones(31, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        probability = (scores * middle[:, None]).softmax(dim=1).gather(1, c.ids[:, None]).squeeze(1)
        low, high = middle.where(probability < 0.9998, low), high.where(probability < 0.9998, middle)
    only_logprobs = c.coefficients * torch.tensor([[1.0], [0.0], [0.0]])
    return replace(c, hidden=hidden, bias=None, temperature=1 / high, coefficients=only_logprobs)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 4e-3)], ids=str)
def test_gradients_stay_exact_when_the_chosen_token_is_nearly_certain(dtype: torch.dtype, bound: float) -> None:
    # Rounding p to bfloat16 before the one-hot is taken from it would leave errors of 650 % here. The float32 bound is
    # what the rounding of logits of 128 leaves of 1 - p = 2e-4, in plain torch too.
    c = nearly_certain(dtype)
    expected = oracle(c)
    assert expected[0] is not None
    torch.testing.assert_close(expected[0].logprobs.exp(), torch.full((31,), 0.9998).double(), rtol=1e-6, atol=0)
    for found in (by_panels(c), by_panels(c, frozen=True), by_rows(c)):
        assert_close(found, expected, bound)


HAS_PRODUCTS = dispatch.bfloat16_products() is not None
ways = pytest.mark.parametrize(
    "native",
    [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_PRODUCTS, reason="the CPU has no bfloat16 products"))],
)
"""Products of widened panels, and of bfloat16 where the processor has them."""


def use(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(dispatch, "bfloat16_products", lambda: None)


@ways
def test_bfloat16_products_and_widened_panels_keep_the_bounds(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use(native, monkeypatch)
    cases = [variant(case(45, 300, torch.bfloat16, 24)) for variant in VARIANTS.values()]
    for c in (*cases, nearly_certain(torch.bfloat16)):
        expected = oracle(c)
        for found in (by_panels(c), by_panels(c, frozen=True), by_rows(c), by_rows(c, chunk_rows=45)):
            assert_close(found, expected, BOUND[torch.bfloat16])
    monkeypatch.setattr(linear_panels, "CPU_BLOCK_ROWS", 8)
    assert_close(by_panels(cases[0]), oracle(cases[0]), BOUND[torch.bfloat16])


@ways
def test_bfloat16_is_not_worse_than_plain_torch(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Plain torch rounds the logits to bfloat16; here they stay float32.
    use(native, monkeypatch)
    c = replace(VARIANTS["log-probs only"](case(40, 1009, torch.bfloat16, 64)), bias=None, temperature=1.0)
    hidden, weight, _ = leaves(c)
    logprobs = (hidden @ weight.T).float().log_softmax(dim=1).gather(1, c.ids[:, None]).squeeze(1)
    (c.coefficients[0] * logprobs).sum().backward()
    (stats, gradients), expected = by_panels(c, chunk_bytes=1), oracle(c)
    assert error(stats.logprobs, expected[0].logprobs) < 0.01 * error(logprobs, expected[0].logprobs)
    for ours, plain, exact in zip(gradients[:2], (hidden.grad, weight.grad), expected[1], strict=False):
        assert error(ours, exact) < error(plain, exact)


def product_kinds() -> range:
    """Everything that multiplies bfloat16 on this processor: AVX512_BF16, AMX."""
    if not HAS_PRODUCTS:
        return range(0)
    return range(1, dispatch.bfloat16_products().kind() + 1)


@pytest.mark.skipif(not HAS_PRODUCTS, reason="the CPU has no bfloat16 products")
@pytest.mark.parametrize("by", product_kinds())
@pytest.mark.parametrize(
    ("num_rows", "num_columns", "depth"), [(1, 1, 1), (5, 37, 13), (12, 32, 64), (64, 160, 96), (29, 65, 2051)]
)
def test_bfloat16_products_are_summed_in_float32(num_rows: int, num_columns: int, depth: int, by: int) -> None:
    generator = torch.Generator().manual_seed(0)
    multiply = partial(dispatch.bfloat16_products().multiply, by=by)
    a = torch.randn(num_rows, depth + 3, generator=generator).bfloat16()[:, 1 : depth + 1]
    b = torch.randn(depth, num_columns, generator=generator).bfloat16()
    exact = a.double() @ b.double()
    for left in (a, a.t().contiguous().t()):
        for other in (b, b.t().contiguous().t()):
            out, alone = torch.empty(num_rows, num_columns), torch.empty(1, num_columns)
            multiply(left, other, out, add=False)
            assert error(out, exact) < 2e-6
            multiply(left[-1:], other, alone, add=False)
            assert torch.equal(alone, out[-1:])
            multiply(left, other, out, add=True)
            assert error(out, 2 * exact) < 2e-6


WITHOUT_ENTROPY = torch.tensor([[1.0], [0.0], [1.0]])
"""Times coefficients: a frozen head's backward is then a scaling."""


def sweeping(c: Case, by: int, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Results]:
    """`by_panels` in one pass of C++, which must be what runs, multiplying by what is named."""
    module, swept = dispatch.bfloat16_sweeps(), []
    kind, forward, backward = module.products.kind, module.Sweeps.forward, module.Sweeps.backward
    monkeypatch.setattr(module.products, "kind", lambda: by)
    monkeypatch.setattr(
        module.Sweeps, "forward", lambda *given, frozen: swept.append(frozen) or forward(*given, frozen=frozen)
    )
    monkeypatch.setattr(module.Sweeps, "backward", lambda *given: swept.append("back") or backward(*given))

    def run(**options: bool) -> Results:
        swept.clear()
        found = by_panels(c, chunk_bytes=2**24, **options)
        entropy = bool(c.coefficients[1].any())
        passes = [True, *["back"] * entropy] if options.get("frozen") else [False, "back"]
        assert len(c.ids) == 1 or swept == (passes if c.softcap is None else [])
        return found

    assert kind() >= by
    return run


@pytest.mark.skipif(not HAS_PRODUCTS, reason="the CPU has no bfloat16 products")
@pytest.mark.parametrize("by", product_kinds())
@pytest.mark.parametrize("shape", [(45, 300, 24), (1, 1, 1), (33, 1500, 70), (64, 1024, 96)], ids=str)
def test_one_pass_equals_the_oracle(shape: tuple[int, int, int], by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows, vocab_size, hidden_size = shape
    for variant in VARIANTS.values():
        c = variant(case(num_rows, vocab_size, torch.bfloat16, hidden_size))
        if vocab_size == 1:
            c = replace(c, coefficients=c.coefficients * torch.tensor([[0.0], [0.0], [1.0]]))
        run, expected = sweeping(c, by, monkeypatch), oracle(c)
        for options in ({}, {"frozen": True}):
            assert_close(run(**options), expected, BOUND[torch.bfloat16])
        assert_close(by_panels(c, chunk_bytes=2**24, skip_zero_rows=False), expected, BOUND[torch.bfloat16])
    c = nearly_certain(torch.bfloat16)
    run, expected = sweeping(c, by, monkeypatch), oracle(c)
    for frozen in (False, True):
        assert_close(run(frozen=frozen), expected, BOUND[torch.bfloat16])


@pytest.mark.skipif(not HAS_PRODUCTS, reason="the CPU has no bfloat16 products")
@pytest.mark.parametrize("frozen", [False, True])
def test_one_pass_gives_the_same_bits_on_any_number_of_threads(frozen: bool) -> None:
    c = case(70, 5000, torch.bfloat16, 64)
    if frozen:
        c = replace(c, coefficients=c.coefficients * WITHOUT_ENTROPY)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(by_panels(c, chunk_bytes=2**24, frozen=frozen))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, same in zip((*found[0][0], *found[0][1]), (*other[0], *other[1]), strict=True):
            assert one is same is None or torch.equal(one, same)


@pytest.mark.skipif(not HAS_PRODUCTS, reason="the CPU has no bfloat16 products")
def test_scores_that_rise_from_group_to_group_shrink_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward of a frozen head, whose terms are relative to the highest score so far."""
    c = case(40, 3000, torch.bfloat16, 32)
    assert c.bias is not None
    c = replace(c, bias=torch.linspace(-40, 40, 3000).bfloat16() + c.bias / 4, ids=c.ids % 600 + 2400)
    c = replace(c, coefficients=c.coefficients * WITHOUT_ENTROPY)
    run, expected = sweeping(c, dispatch.bfloat16_sweeps().products.kind(), monkeypatch), oracle(c)
    for options in ({}, {"frozen": True}):
        assert_close(run(**options), expected, BOUND[torch.bfloat16])


@pytest.mark.skipif(not HAS_PRODUCTS, reason="the CPU has no bfloat16 products")
def test_one_pass_keeps_to_its_room_or_leaves_it_to_panels() -> None:
    module = dispatch.bfloat16_sweeps()
    weight = torch.zeros(151_936, 896, dtype=torch.bfloat16)
    rows = torch.zeros(512, 896, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.int64), torch.ones(512)
    wide, narrow, least = (module.Sweeps(weight, None, 1.0, rows, size).room_bytes() for size in (2**24, 3 * 2**20, 1))
    assert least < narrow <= 3 * 2**20 < wide <= 2**24
    assert 3 * 2**20 < module.Sweeps(weight, None, 1.0, rows, 2**24).room_bytes(frozen=True) <= 2**24
    head = linear_panels.Head(weight, None, None, 1.0)
    assert linear_logprobs_module._sweeps(head, linear_panels.Rows(*rows), 3 * 2**20) is not None
    assert linear_logprobs_module._sweeps(head, linear_panels.Rows(*rows), 3 * 2**20, frozen=True) is None
    assert linear_logprobs_module._sweeps(head, linear_panels.Rows(*rows), 2**24, frozen=True) is not None
    assert linear_logprobs_module._sweeps(head, linear_panels.Rows(*rows), least - 1) is None


@pytest.mark.skipif(not HAS_PRODUCTS, reason="the CPU has no bfloat16 products")
def test_one_pass_bans_tokens_and_leaves_what_is_not_a_number_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(9, 700, torch.bfloat16)
    assert c.bias is not None
    bias = c.bias.clone()
    bias[:600] = -math.inf
    c = replace(c, bias=bias, ids=c.ids % 100 + 600, coefficients=c.coefficients * WITHOUT_ENTROPY)
    run, expected = sweeping(c, dispatch.bfloat16_sweeps().products.kind(), monkeypatch), oracle(c)
    for frozen in (False, True):
        stats, gradients = run(frozen=frozen)
        torch.testing.assert_close(stats.entropy.double(), expected[0].entropy, rtol=1e-5, atol=1e-5)
        assert error(gradients[0], expected[1][0]) < BOUND[torch.bfloat16]
    c.hidden[2] = math.nan
    for frozen in (False, True):
        stats, gradients = run(frozen=frozen)
        assert stats.logprobs.isnan().tolist() == [row == 2 for row in range(9)]
        assert gradients[0].isnan().any(dim=1).tolist() == [row == 2 for row in range(9)]


@pytest.mark.skipif(not HAS_PRODUCTS, reason="the CPU has no bfloat16 products")
@pytest.mark.parametrize("by", product_kinds())
def test_a_product_rounds_what_is_wide_once(by: int) -> None:
    a, b = torch.randn(45, 70), torch.randn(70, 50).bfloat16()
    wide, narrow, out = torch.empty(45, 50), torch.empty(45, 50), torch.empty(45, 50, dtype=torch.bfloat16)
    multiply = partial(dispatch.bfloat16_products().multiply, add=False, by=by)
    multiply(a, b, wide)
    multiply(a.bfloat16(), b, narrow)
    multiply(a, b, out)
    assert torch.equal(wide, narrow)
    assert torch.equal(out, wide.bfloat16())


@pytest.mark.skipif(not HAS_PRODUCTS, reason="the CPU has no bfloat16 products")
@pytest.mark.parametrize("by", product_kinds())
def test_what_is_not_a_number_stays_in_its_row(by: int) -> None:
    a, b, out = torch.randn(40, 64), torch.randn(64, 64).bfloat16(), torch.empty(40, 64)
    a[3, 5], a[7, 9] = float("nan"), float("inf")
    dispatch.bfloat16_products().multiply(a, b, out, add=False, by=by)
    assert out[3].isnan().all() and not out[7].isfinite().any()
    others = [row for row in range(40) if row not in (3, 7)]
    assert out[others].isfinite().all()


@pytest.mark.skipif(not HAS_PRODUCTS, reason="the CPU has no bfloat16 products")
def test_bfloat16_products_do_not_depend_on_the_threads() -> None:
    a, b = torch.randn(70, 900).bfloat16(), torch.randn(500, 900).bfloat16().t()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(torch.empty(70, 500))
            dispatch.bfloat16_products().multiply(a, b, found[-1], add=False)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_the_reference_backend_widens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.bfloat16_products() is None
    head = linear_panels.Head(torch.zeros(3, 2, dtype=torch.bfloat16), None, None, 1.0)
    assert head.operand == torch.float32


def test_modes_and_chunks_agree() -> None:
    c = case(40, 1009, hidden_size=32)
    expected = by_panels(c, chunk_bytes=2**24)
    for chunk_bytes in (1, 100_000, 300_000):
        assert_close(by_panels(c, chunk_bytes=chunk_bytes), expected, 1e-6)
        assert_close(by_panels(c, chunk_bytes=chunk_bytes, frozen=True), expected, 1e-6)
        for chunk_rows in (1, 16, 40):
            assert_close(by_rows(c, chunk_rows=chunk_rows, chunk_bytes=chunk_bytes), expected, 1e-6)


def test_blocks_of_rows_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    c = replace(case(50, 300), mask=torch.arange(50) % 5 > 0)
    c.coefficients[:, ::3] = 0
    expected = oracle(c)
    monkeypatch.setattr(linear_panels, "CPU_BLOCK_ROWS", 8)
    for found in (by_panels(c), by_panels(c, frozen=True), by_rows(c, chunk_rows=23)):
        assert_close(found, expected, 1e-6)


def without_some(c: Case, fraction: float) -> Case:
    """``c`` with a loss that does not depend on this share of the rows."""
    num_rows = len(c.ids)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1))
    return replace(c, coefficients=c.coefficients * (order >= num_rows * fraction))


@pytest.mark.parametrize("run", [by_panels, partial(by_panels, frozen=True), by_rows], ids=["panels", "frozen", "rows"])
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.7, 1.0])
def test_skipping_changes_the_order_of_sums_at_most(
    run: Callable[..., Results], dtype: torch.dtype, fraction: float
) -> None:
    c = without_some(case(30, 150, dtype), fraction)
    skipped, computed = run(c, skip_zero_rows=True), run(c, skip_zero_rows=False)
    for one, other in zip(skipped[1], computed[1], strict=True):
        assert one is None or error(one, other) <= BOUND[dtype]
    zero = (c.coefficients == 0).all(dim=0)
    for _, (hidden, *_) in (skipped, computed):
        assert hidden is not None
        assert hidden.any(dim=1).tolist() == (~zero).tolist()


@pytest.mark.skipif(not HAS_PRODUCTS, reason="the CPU has no bfloat16 products")
@pytest.mark.parametrize("fraction", [0.5, 0.95])
def test_skipping_in_one_pass_changes_no_bit_of_hidden_and_bias(fraction: float) -> None:
    c = without_some(case(200, 700, torch.bfloat16, 40), fraction)
    skipped, computed = (by_panels(c, chunk_bytes=2**24, skip_zero_rows=skip)[1] for skip in (True, False))
    assert skipped[0].any() and torch.equal(skipped[0], computed[0])
    assert skipped[2].any() and torch.equal(skipped[2], computed[2])
    assert error(skipped[1], computed[1]) < 1e-6


@pytest.mark.parametrize("run", [by_panels, by_rows])
def test_skipped_rows_take_no_part_in_products(run: Callable[..., Results], monkeypatch: pytest.MonkeyPatch) -> None:
    c = replace(case(20, 100), mask=torch.arange(20) < 15)
    c.coefficients[:, :5] = 0
    rows_multiplied = []
    multiply = linear_panels.multiply

    def counting(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
        rows_multiplied.append(a.shape[0])
        multiply(a, b, out, add=add)

    monkeypatch.setattr(linear_panels, "multiply", counting)
    options = {"chunk_rows": 20} if run is by_rows else {}
    run(replace(c, bias=None), chunk_bytes=2**24, **options)
    forward, *again, by_hidden, by_weight = rows_multiplied
    assert (forward, by_hidden, by_weight) == (15, 10, 100)
    assert again == ([] if run is by_rows else [10])


def test_masked_and_zero_rows_are_never_read() -> None:
    c = case(12, 90)
    mask = torch.arange(12) != 4
    c.coefficients[:, 7] = 0
    clean = by_panels(replace(c, mask=mask))
    hidden, ids = c.hidden.clone(), c.ids.clone()
    hidden[4], ids[4] = math.nan, -100
    dirty = replace(c, hidden=hidden, ids=ids, mask=mask)
    for frozen in (False, True):
        stats, gradients = by_panels(dirty, frozen=frozen)
        assert stats is not None and clean[0] is not None
        assert [values[4].item() for values in stats] == [0.0, 0.0, 0.0]
        torch.testing.assert_close(stats.logprobs, clean[0].logprobs)
        assert gradients[0] is not None and clean[1][0] is not None
        torch.testing.assert_close(gradients[0], clean[1][0])
        assert not gradients[0][4].any()
    _, gradients = by_rows(dirty)
    assert_close((None, gradients), clean, 1e-6)


def test_all_rows_masked() -> None:
    c = replace(case(6, 50), mask=torch.zeros(6, dtype=torch.bool))
    for stats, gradients in (by_panels(c), by_rows(c)):
        assert stats is None or not any(values.any() for values in stats)
        assert all(one is not None and not one.any() for one in gradients)
    assert not by_panels(c, frozen=True)[1][0].any()


def test_not_a_number_stays_in_its_row() -> None:
    c = replace(case(6, 150), bias=None)
    c.hidden[2] = math.nan
    for frozen in (False, True):
        stats, gradients = by_panels(c, frozen=frozen)
        assert stats is not None and gradients[0] is not None
        assert stats.logprobs.isnan().tolist() == [row == 2 for row in range(6)]
        assert gradients[0].isnan().any(dim=1).tolist() == [row == 2 for row in range(6)]


def test_banned_tokens_and_logits_far_below_zero() -> None:
    # A bias of -inf bans the whole first panel; with logits near -120 a maximum that starts at 0 would overflow.
    c = case(9, 200)
    assert c.bias is not None
    bias = c.bias - 120
    bias[:64] = -math.inf
    c = replace(c, bias=bias, ids=c.ids.clamp(min=64))
    expected = oracle(c)
    for found in (by_panels(c), by_panels(c, frozen=True), by_rows(c)):
        stats, gradients = found
        if stats is not None:
            torch.testing.assert_close(stats.logprobs.double(), expected[0].logprobs, rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(stats.entropy.double(), expected[0].entropy, rtol=1e-5, atol=1e-5)
        for one, other in zip(gradients, expected[1], strict=True):
            assert one is None or error(one, other) < 1e-5


def test_entropy_alone_has_a_gradient() -> None:
    # TRL's chunked function drops it without a word.
    c = VARIANTS["entropy only"](case(8, 40))
    for found in (by_panels(c), by_panels(c, frozen=True), by_rows(c)):
        assert found[1][0] is not None
        assert found[1][0].norm() > 0.1


def test_temperature_as_a_number_or_for_each_row() -> None:
    c = replace(case(), temperature=0.7)
    one, each = by_panels(c), by_panels(replace(c, temperature=torch.full((19,), 0.7)))
    assert_close(one, each, 1e-7)


def test_a_frozen_head_costs_no_product_in_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    c = VARIANTS["log-probs only"](case())
    hidden, weight, bias = leaves(c, frozen=True)
    stats = linear_logprobs(hidden, weight, c.ids, c.temperature, bias=bias, chunk_bytes=1)
    monkeypatch.setattr(linear_panels, "multiply", None)
    stats.logprobs.sum().backward()
    assert hidden is not None and hidden.grad is not None


def test_gradients_of_chunks_are_summed_in_float32() -> None:
    c = case(256, dtype=torch.bfloat16)
    exact = oracle(c)[1][1]
    found = by_rows(c, chunk_rows=1)[1][1]
    rounded_each_time = torch.zeros_like(c.weight)
    for row in (slice(at, at + 1) for at in range(256)):
        own = {name: getattr(c, name)[row] for name in ("hidden", "ids", "temperature")}
        rounded_each_time += by_rows(replace(c, coefficients=c.coefficients[:, row], **own))[1][1]
    assert error(found, exact) < 0.5 * error(rounded_each_time, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_bytes", [20_000, 2**24])
def test_offsets_beyond_two_to_the_31(chunk_bytes: int, dtype: torch.dtype) -> None:
    # Addresses of which 70 rows are ever touched; the 70th lies more than 2^31 numbers from the first.
    c = case(9, 70, dtype)
    stride = 2**31 // 69 + 1
    weight = torch.empty(69 * stride + 16, dtype=dtype).as_strided((70, 16), (stride, 1)).copy_(c.weight)
    far, here = replace(c, weight=weight), c
    for run in (by_panels, by_rows, partial(by_panels, frozen=True)):
        found, expected = run(far, chunk_bytes=chunk_bytes), run(here, chunk_bytes=chunk_bytes)
        assert_close(found, expected, BOUND[dtype])


def test_tied_embeddings() -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    ids = torch.randint(50, (10,), generator=generator)

    def gradient(run: Callable[..., TokenStats]) -> Tensor:
        weight = embedding.clone().requires_grad_()
        run(weight[ids], weight, ids.roll(-1), 1.0).logprobs.sum().backward()
        assert weight.grad is not None
        return weight.grad

    torch.testing.assert_close(gradient(linear_logprobs), gradient(reference.linear_logprobs))


def test_the_weight_alone_may_need_a_gradient() -> None:
    c = case()
    weight = c.weight.clone().requires_grad_()
    stats = linear_logprobs(c.hidden, weight, c.ids, c.temperature, bias=c.bias)
    c.loss(slice(None), stats).backward()
    assert weight.grad is not None
    assert error(weight.grad, oracle(c)[1][1]) < 1e-6


def test_row_loss_is_the_sum_of_its_chunks_and_is_scaled() -> None:
    c = case(dtype=torch.bfloat16)
    seen = []

    def loss(rows: slice, stats: TokenStats) -> Tensor:
        seen.append((rows, stats.entropy.detach().clone()))
        return c.loss(rows, stats)

    hidden, weight, _ = leaves(c)
    value = linear_loss(hidden, weight, c.ids, c.temperature, loss, chunks=[slice(8), slice(8, 19)], bias=c.bias)
    expected = reference.linear_logprobs(c.hidden, c.weight, c.ids, c.temperature, bias=c.bias)
    torch.testing.assert_close(value, c.loss(slice(None), expected), rtol=1e-5, atol=1e-5)
    assert [rows for rows, _ in seen] == [slice(0, 8), slice(8, 19)]
    torch.testing.assert_close(torch.cat([entropy for _, entropy in seen]), expected.entropy, rtol=1e-5, atol=1e-5)
    (value / 3).backward()
    assert weight is not None and weight.grad is not None and weight.grad.dtype == torch.bfloat16
    assert error(weight.grad, oracle(c)[1][1] / 3) < BOUND[torch.bfloat16]
    with torch.no_grad():
        silent = linear_loss(hidden, weight, c.ids, c.temperature, c.loss, chunks=[slice(0, 19)], bias=c.bias)
    assert not silent.requires_grad
    torch.testing.assert_close(silent, value.detach(), rtol=1e-5, atol=1e-5)


def test_row_loss_without_gradient_and_rows_in_no_chunk() -> None:
    c = case()
    hidden, weight, _ = leaves(c)
    value = linear_loss(hidden, weight, c.ids, 1.0, lambda _, stats: stats.logprobs.detach().sum(), chunks=[slice(4)])
    value.backward()
    assert weight is not None and weight.grad is not None and not weight.grad.any()
    hidden, weight, _ = leaves(c)
    linear_loss(hidden, weight, c.ids, 1.0, lambda _, stats: stats.logprobs.sum(), chunks=[slice(3, 6)]).backward()
    assert hidden is not None and hidden.grad is not None
    assert hidden.grad.any(dim=1).tolist() == [3 <= row < 6 for row in range(19)]


def test_opcheck() -> None:
    c = case(6, 100, torch.float64, 4)
    hidden, weight, bias = leaves(c)
    s = 1 / torch.as_tensor(c.temperature).double()
    mask = torch.arange(6) > 1
    for frozen in (False, True):
        arguments = (hidden, weight, bias, c.ids, s, mask, None, 1.0, 10_000, True, frozen)
        torch.library.opcheck(torch.ops.grpoforge.linear_logprobs.default, arguments)
        detached = tuple(one.detach() if isinstance(one, Tensor) else one for one in arguments)
        logprobs, _, _, stats, expectation = torch.ops.grpoforge.linear_logprobs(*detached)
        needs = [True, not frozen, not frozen]
        saved = (logprobs, stats, expectation, torch.ones(6).double(), None, None, needs)
        torch.library.opcheck(torch.ops.grpoforge.linear_logprobs_backward.default, (*detached[:-1], *saved))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_whole_graph(compiler: str) -> None:
    c = case()

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        stats = linear_logprobs(hidden * 2, weight, c.ids, c.temperature, chunk_bytes=20_000)
        return (stats.logprobs.exp() + 0.1 * stats.entropy).sum()

    gradients = []
    for run in (step, torch.compile(step, backend=compiler, fullgraph=True)):
        hidden, weight, _ = leaves(c)
        run(hidden, weight).backward()
        gradients.append((hidden.grad, weight.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_checkpoint_of_a_row_loss() -> None:
    c = case()
    expected = by_rows(replace(c, bias=None))
    hidden, weight, _ = leaves(c)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        chunks = [slice(0, 7), slice(7, 14), slice(14, 19)]
        return linear_loss(hidden * 1, weight, c.ids, c.temperature, c.loss, chunks=chunks, chunk_bytes=20_000)

    checkpoint(loss, hidden, weight, use_reentrant=False).backward()
    assert_close((None, [hidden.grad, weight.grad, None]), expected, 1e-6)


def test_checkpoint() -> None:
    c = case()
    expected = by_panels(replace(c, bias=None))
    hidden, weight, _ = leaves(c)
    stats = checkpoint(linear_logprobs, hidden, weight, c.ids, c.temperature, use_reentrant=False)
    c.loss(slice(None), stats).backward()
    assert_close((stats, [hidden.grad, weight.grad, None]), expected, 1e-6)


def test_runs_give_the_same_bits() -> None:
    c = case(64, 3000, hidden_size=32)
    first, second = by_panels(c), by_panels(c)
    for one, other in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.full((19,), 211)}, "token id 211 is outside the vocabulary of 211 tokens"),
        ({"ids": torch.full((19,), -1)}, "token id -1 is outside the vocabulary of 211 tokens"),
        ({"ids": torch.zeros(4, dtype=torch.int64)}, "ids are torch.int64 [4], not int64 [19]"),
        ({"weight": torch.zeros(211, 4)}, "weight is torch.float32 [211, 4], not torch.float32 [V, 16]"),
        (
            {"weight": torch.zeros(211, 16).double()},
            "weight is torch.float64 [211, 16], not torch.float32 [V, 16]",
        ),
        ({"hidden": torch.zeros(19)}, "hidden is torch.float32 [19], not floats [N, H]"),
        ({"bias": torch.zeros(3)}, "bias has shape [3], not [211]"),
        ({"mask": torch.zeros(19)}, "mask is torch.float32 [19], not bool [19]"),
        ({"temperature": 0.0}, "temperature = 0.0 is not a positive number"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, object], message: str) -> None:
    c = replace(case(), **change)
    options = {"bias": c.bias, **c.options}
    for run in (
        lambda: linear_logprobs(c.hidden, c.weight, c.ids, c.temperature, **options),
        lambda: linear_loss(c.hidden, c.weight, c.ids, c.temperature, c.loss, chunks=[slice(0, 19)], **options),
    ):
        with pytest.raises(KernelError) as caught:
            run()
        assert caught.value.message == message


def test_row_loss_refuses_what_it_would_get_wrong() -> None:
    c = case()
    hidden, weight, _ = leaves(c)

    def run(loss: Callable[[slice, TokenStats], Tensor], *chunks: slice) -> Tensor:
        return linear_loss(hidden, weight, c.ids, 1.0, loss, chunks=chunks)

    with pytest.raises(KernelError, match=r"chunks have slice\(3, 9, None\) after row 5, with 19 rows"):
        run(c.loss, slice(0, 5), slice(3, 9))
    with pytest.raises(KernelError, match=r"chunks have slice\(0, 20, None\) after row 0, with 19 rows"):
        run(c.loss, slice(0, 20))
    with pytest.raises(KernelError, match=r"the loss of a chunk has shape \[5\]") as caught:
        run(lambda _, stats: stats.logprobs, slice(0, 5))
    assert "scalar" in caught.value.hint
    other = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(KernelError, match=r"depends on another tensor that requires a gradient, of shape \[2, 3\]"):
        run(lambda _, stats: stats.logprobs.sum() * other.sum(), slice(0, 5))
    value = run(c.loss, slice(0, 19))
    value.backward(retain_graph=True)
    with pytest.raises(KernelError, match="a second backward pass reached a linear_loss"):
        value.backward()


MEASURE = """
import gc, torch
from grpoforge_kernels.linear_logprobs import linear_logprobs, peak_extra_bytes
from grpoforge_kernels.linear_loss import linear_loss

torch.set_num_threads(1)
CHUNK_BYTES, CHUNK_ROWS = 2**21, 64

def status(key):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

def step(mode, dtype, num_rows, vocab_size, hidden_size):
    hidden = torch.randn(num_rows, hidden_size).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, dtype=dtype).mul_(0.05).requires_grad_(mode != "frozen")
    ids = torch.randint(vocab_size, (num_rows,))
    gc.collect()
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    options = {"chunk_bytes": CHUNK_BYTES}
    if mode == "rows":
        options["chunks"] = [slice(at, min(at + CHUNK_ROWS, num_rows)) for at in range(0, num_rows, CHUNK_ROWS)]
        loss = linear_loss(hidden, weight, ids, 1.0, lambda _, stats: stats.logprobs.sum(), **options)
    else:
        loss = linear_logprobs(hidden, weight, ids, 1.0, **options).logprobs.sum()
    loss.backward()
    gradients = sum(one.grad.nbytes for one in (hidden, weight) if one.grad is not None)
    rows = CHUNK_ROWS if mode == "rows" else 0
    return status("VmHWM") - before, gradients, peak_extra_bytes(
        hidden, weight, chunk_bytes=CHUNK_BYTES, chunk_rows=rows
    )

for dtype in ("float32", "bfloat16"):
    for mode in ("panels", "frozen", "rows"):
        step(mode, getattr(torch, dtype), 64, 1000, 64)  # libraries, threads and their buffers
        print(mode, dtype, *step(mode, getattr(torch, dtype), 512, 65_536, 64))
"""


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], tuple[int, ...]]:
    """For each mode and dtype: peak resident bytes above the inputs, bytes of the gradients, and the formula."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {(mode, dtype): tuple(map(int, sizes)) for mode, dtype, *sizes in lines}


@pytest.mark.needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["panels", "frozen", "rows"])
def test_peak_memory_is_within_its_formula(
    mode: str, dtype: str, measured: dict[tuple[str, str], tuple[int, ...]]
) -> None:
    # All logits would be 128 MB; a panel is 2 MiB. The allowance is for packing buffers of the products, and pages.
    peak, gradients, formula = measured[mode, dtype]
    assert peak <= gradients + formula + 4 * 2**20
    if mode != "rows":
        assert peak - gradients < 8 * 2**20


def test_formula_does_not_grow_with_the_vocabulary() -> None:
    hidden, weight = torch.empty(1024, 896, device="meta"), torch.empty(151_936, 896, device="meta")
    small = torch.empty(1000, 896, device="meta")
    for dtype in (torch.float32, torch.bfloat16):
        extra = peak_extra_bytes(hidden.to(dtype), weight.to(dtype), chunk_bytes=2**24)
        assert extra == peak_extra_bytes(hidden.to(dtype), small.to(dtype), chunk_bytes=2**24)
        assert extra <= 32 * 2**20
    with_rows = peak_extra_bytes(hidden, weight, chunk_bytes=2**24, chunk_rows=256)
    assert with_rows == 2**24 + 3 * 1024 * 896 * 4 + 32 * 1024 * 4 + 256 * 151_936 * 4
    half = hidden.bfloat16(), weight.bfloat16()
    one, many = (peak_extra_bytes(*half, chunk_bytes=2**24, chunk_rows=rows) for rows in (1024, 512))
    assert one - many == (512 - 896) * 151_936 * 4
