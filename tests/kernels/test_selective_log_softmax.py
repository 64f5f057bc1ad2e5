"""Log-prob and entropy against a float64 oracle, at extremes and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from grpoforge_kernels.ops import selective_log_softmax


def oracle(logits: Tensor, ids: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row in float64, with banned tokens taken out of the sum."""
    logprobs, entropies = [], []
    for row, token, degree in zip(logits.double(), ids.tolist(), temperature.double(), strict=True):
        table = (row / degree).log_softmax(dim=0)
        kept = table[table > -math.inf]
        logprobs.append(table[token])
        entropies.append(-(kept.exp() * kept).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(12, 50, generator=generator, dtype=torch.float64)).to(dtype)
    ids = torch.randint(0, 50, (12,), generator=generator)
    temperature = torch.tensor([0.7, 1.3, 1.0, 0.1] * 3, dtype=torch.float64)
    return logits, ids, temperature


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 2e-5), (torch.bfloat16, 2e-5), (torch.float16, 2e-5)],
)
def test_values_and_gradients_equal_the_oracle(dtype: torch.dtype, tolerance: float) -> None:
    logits, ids, temperature = case(dtype)
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = selective_log_softmax(leaf, ids, temperature)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert logprobs.dtype == entropy.dtype == wide
    exact = logits.double().requires_grad_()
    expected, expected_entropy = oracle(exact, ids, temperature)
    torch.testing.assert_close(logprobs.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(entropy.double(), expected_entropy.detach(), rtol=tolerance, atol=tolerance)
    weights = torch.linspace(-1, 1, 12, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((logprobs * weights.to(wide)).sum(), leaf)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), exact)
    assert gradient.dtype == dtype
    # The gradient is rounded once, to the dtype of the logits.
    rounding = max(tolerance, torch.finfo(dtype).eps)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rounding, atol=rounding)


def test_by_hand() -> None:
    # Logits 0 and ln 3: probabilities 1/4 and 3/4. At temperature 1/2 the odds are squared: 1/10 and 9/10.
    logits = torch.tensor([[0.0, math.log(3)]] * 2, dtype=torch.float64)
    logprobs, entropy = selective_log_softmax(logits, torch.tensor([1, 0]), torch.tensor([1.0, 0.5]))
    assert logprobs.tolist() == pytest.approx([math.log(0.75), math.log(0.1)], rel=1e-12)
    expected = [
        -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)),
        -(0.1 * math.log(0.1) + 0.9 * math.log(0.9)),
    ]
    assert entropy.tolist() == pytest.approx(expected, rel=1e-12)


def test_uniform_logits_have_entropy_log_v() -> None:
    logprobs, entropy = selective_log_softmax(torch.full((3, 7), 5.0), torch.tensor([0, 3, 6]), torch.ones(3))
    assert logprobs.tolist() == pytest.approx([-math.log(7)] * 3)
    assert entropy.tolist() == pytest.approx([math.log(7)] * 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_banned_tokens(dtype: torch.dtype) -> None:
    inf = math.inf
    logits = torch.tensor([[0.0, -inf, 0.0, -inf], [3.0, -inf, -inf, -inf]], dtype=dtype, requires_grad=True)
    logprobs, entropy = selective_log_softmax(logits, torch.tensor([2, 0]), torch.tensor([0.7, 1.3]))
    assert logprobs.tolist() == pytest.approx([-math.log(2), 0.0])
    assert entropy.tolist() == pytest.approx([math.log(2), 0.0])
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    # d log p[2] / dz = onehot - p, over the temperature; banned tokens get exactly 0.
    assert gradient[0].tolist() == pytest.approx([-0.5 / 0.7, 0.0, 0.5 / 0.7, 0.0], rel=1e-2)
    assert gradient[1].tolist() == [0.0] * 4


def test_a_banned_token_that_was_drawn_has_no_probability() -> None:
    logprobs, entropy = selective_log_softmax(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]), torch.ones(1))
    assert logprobs.tolist() == [-math.inf] and entropy.tolist() == [0.0]


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_of_great_size(size: float) -> None:
    logits = torch.tensor([[size, 0.0, 0.0], [size, size, size]], requires_grad=True)
    logprobs, entropy = selective_log_softmax(logits, torch.tensor([0, 1]), torch.tensor([0.7, 1.3]))
    first = 0.0 if size > 0 else size / 0.7 - math.log(2)
    assert logprobs.tolist() == pytest.approx([first, -math.log(3)], rel=1e-5, abs=1e-3)
    assert entropy.tolist() == pytest.approx([0.0 if size > 0 else math.log(2), math.log(3)], abs=1e-3)
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    assert bool(gradient.isfinite().all())


def test_gradcheck() -> None:
    logits, ids, temperature = case(torch.float64)
    logits = logits[:4].requires_grad_()
    assert torch.autograd.gradcheck(lambda z: selective_log_softmax(z, ids[:4], temperature[:4])[0], [logits])


def test_entropy_takes_no_gradient() -> None:
    logits, ids, temperature = case(torch.float32)
    assert not selective_log_softmax(logits.requires_grad_(), ids, temperature)[1].requires_grad


def test_no_rows() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    logprobs, entropy = selective_log_softmax(logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and logits.grad.shape == (0, 5)
