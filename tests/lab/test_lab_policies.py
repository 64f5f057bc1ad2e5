"""The small policies: every completion is there once, and every derivative is autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grpoforge.lab.moments import compare
from grpoforge.lab.policies import SoftmaxPolicy, Space, completions, random_policy
from grpoforge.testing.kit import Broken

SPACES = {"fixed": completions(3, 2), "ending": completions(3, 3, can_end=True)}


def of_logits(space: Space, logits: Tensor) -> Tensor:
    """Log-probs of the completions ``[N]``, by autograd."""
    chosen = logits.log_softmax(dim=1)[space.states, space.tokens]
    return torch.where(space.mask, chosen, 0.0).sum(dim=1)


def test_completions_of_a_fixed_length() -> None:
    space = completions(2, 2)
    assert space.tokens.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert space.states.tolist() == [[0, 1], [0, 1], [0, 2], [0, 2]]
    assert space.num_states == 3 and bool(space.mask.all())


def test_completions_that_end() -> None:
    space = completions(2, 3, can_end=True)
    rows = [row[keep].tolist() for row, keep in zip(space.tokens, space.mask)]
    assert rows == [[0], [1, 0], [1, 1, 0], [1, 1, 1]]
    assert space.lengths.tolist() == [1, 2, 3, 3]


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_probabilities_sum_to_1(space: Space) -> None:
    assert float(random_policy(space, 0).probabilities.sum()) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_derivatives_are_autograds(space: Space) -> None:
    policy = random_policy(space, 7)
    slopes = torch.autograd.functional.jacobian(lambda logits: of_logits(space, logits), policy.logits).flatten(1)
    torch.testing.assert_close(policy.sequence_scores, slopes, rtol=0, atol=1e-13)
    values = torch.linspace(-1, 2, len(slopes), dtype=torch.float64)
    logits = policy.logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad((of_logits(space, logits).exp() * values).sum(), logits)
    torch.testing.assert_close(policy.slope_of_mean(values), slope.flatten(), rtol=0, atol=1e-13)


def test_entropy_is_that_of_the_state() -> None:
    space = completions(2, 1)
    policy = SoftmaxPolicy(space=space, logits=torch.zeros(1, 2, dtype=torch.float64))
    assert policy.entropy.tolist() == [[pytest.approx(0.6931471805599453)]] * 2


def test_an_estimate_by_hand() -> None:
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    gradients, true = torch.tensor([[4.0, 0.0], [2.0, 2.0]]).double(), torch.tensor([1.0, 0.0]).double()
    found = compare(weights, gradients, true, num_rows=4, num_samples=50)
    assert found.cosine == pytest.approx(3 / 10**0.5) and found.scale == 3
    assert found.bias == pytest.approx(5**0.5)
    assert found.variance == 8 and found.noise == pytest.approx(0.8)
    assert found.error == pytest.approx((2 / 50) ** 0.5 / 10**0.5)


def test_a_gradient_of_0_has_no_direction() -> None:
    found = compare(torch.ones(1).double(), torch.zeros(1, 2).double(), torch.ones(2).double())
    assert (found.cosine, found.noise, found.scale, found.bias, found.error) == (None, None, 0, 1, None)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    with pytest.raises(Broken, match="a gradient is not finite"):
        compare(torch.ones(1).double(), torch.full((1, 2), torch.nan).double(), torch.ones(2).double())
