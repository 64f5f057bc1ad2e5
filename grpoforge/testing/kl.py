"""What a KL estimator promises: 0 where the policies agree, a right gradient, and what its mean is worth, measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpoforge.binding import DISTRIBUTION_DATA, KL_DATA, Bound, bind
from grpoforge.contracts import kl_of
from grpoforge.testing.general import deterministic, leaves_data_alone, quick, state, travels
from grpoforge.testing.gradients import compare_slopes, gradient
from grpoforge.testing.kit import Broken, Rule, expect_same, foreign, rule
from grpoforge.testing.tokens import (
    Tokens,
    TokenSubject,
    coupling,
    empty_row,
    masked_as_engine,
    padding,
    row_order,
    rows_alone,
    token_table,
)

VOCABULARY = 5


@dataclass(frozen=True, kw_only=True)
class KLSubject(TokenSubject):
    """A KL estimator, asked about four rows of sampled tokens, or about four whole distributions."""

    @property
    def whole(self) -> bool:
        """True when it reads the log-probs of the whole vocabulary."""
        return any(one.name in DISTRIBUTION_DATA for one in self.component.data)

    @property
    def current(self) -> str:
        """The name of the data that has a gradient."""
        return DISTRIBUTION_DATA[0] if self.whole else KL_DATA[0]

    def question(self) -> Tokens:
        return distributions() if self.whole else token_table()

    def answer(self, built: Any, question: Tokens) -> dict[str, Tensor]:
        return {"estimate": self.estimate(built, question).detach()}

    def values(self, question: Tokens) -> dict[str, Tensor]:
        return self.answer(self.build(), question)

    def estimate(self, built: Any, question: Tokens) -> Tensor:
        """The estimate with its gradient, 0 where masked, as the engine takes it."""
        data = masked_as_engine(question)
        shape = data[self.current].shape[:1] if self.whole else data[self.current].shape
        with foreign():
            bound: Bound = bind("kl", built)
            estimate = kl_of(bound, data, shape)
        if self.whole:
            return estimate
        return torch.where(data["completion_mask"], estimate, torch.zeros_like(estimate))

    def total(self, question: Tokens, point: Tensor, weights: Tensor | float = 1.0) -> Tensor:
        """The estimates at the log-probs ``point``, each times its weight, summed."""
        return (self.estimate(self.build(), {**question, self.current: point}) * weights).sum()


def distributions(seed: int = 0) -> dict[str, Tensor]:
    """Log-probs of the whole vocabulary at four tokens, ``[n, V]``, of a policy and of a reference."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, VOCABULARY, generator=generator, dtype=torch.float64)
    policy, reference = logits.log_softmax(dim=-1)
    return {"distribution": policy, "ref_distribution": reference}


def agreeing(question: Tokens) -> dict[str, Tensor]:
    """The question with every log-prob that of the policy."""
    current = question.get("logprobs", question.get("distribution"))
    assert current is not None
    return {
        name: current.clone() if name.endswith(("logprobs", "distribution")) else one for name, one in question.items()
    }


@rule(f"positional parameters are data, of: {', '.join(KL_DATA + DISTRIBUTION_DATA)}", decisive=True)
def signature(subject: KLSubject) -> str:
    """Its data are names that the engine knows: log-probs per token, or whole distributions, not both."""
    with foreign():
        names = bind("kl", subject.build()).data
    if subject.whole and any(name in KL_DATA for name in names):
        raise Broken(f"it mixes data per token with whole distributions: {', '.join(names)}")
    return f"reads {', '.join(names)}"


@rule("return one value per token and normalize nothing", decisive=True)
def returns(subject: KLSubject) -> str:
    """It returns one finite value for each token."""
    found = subject.ask()["estimate"]
    if not bool(found.isfinite().all()):
        raise Broken("a value is not finite")
    return f"{list(found.shape)}, from {float(found.min()):.3g} to {float(found.max()):.3g}"


@rule("make constants with `torch.zeros_like` or a plain number, never with a dtype of your own")
def keeps_dtype(subject: KLSubject) -> str:
    """The estimate has the dtype of the log-probs."""
    for dtype in (torch.float64, torch.float32):
        question = {n: one if one.dtype == torch.bool else one.to(dtype) for n, one in subject.question().items()}
        found = subject.values(question)["estimate"]
        if found.dtype != dtype:
            raise Broken(f"{str(dtype)[6:]} log-probs give a {str(found.dtype)[6:]} estimate")
    return "float32 and float64"


@rule("every term must vanish when the log-ratio is 0")
def zero_when_equal(subject: KLSubject) -> str:
    """Where policy and reference agree, the estimate is exactly 0."""
    found = subject.values(agreeing(subject.question()))["estimate"]
    if bool((found.abs() > 1e-15).any()):
        raise Broken(f"it is up to {float(found.abs().max()):.3g}")
    return "0 at every token"


@rule("guard square roots, divisions and logarithms where the log-ratio is 0: their slope is not finite there")
def finite_gradient(subject: KLSubject) -> str:
    """The gradient is finite, where policy and reference agree too, and 0 where masked."""
    question = subject.question()
    mask = question.get("completion_mask", torch.ones(len(question[subject.current]), 1, dtype=torch.bool))
    for data, where in ((question, "at random points"), (agreeing(question), "where policy and reference agree")):

        def total(point: Tensor, data: Tokens = data) -> Tensor:
            return subject.total(data, point)

        slope = gradient(total, data[subject.current])
        if not bool(slope.isfinite().all()):
            raise Broken(f"it is not finite {where}")
        if bool(slope[~mask.expand_as(slope)].any()):
            raise Broken(f"it is not 0 where masked, {where}")
    return f"at random points and in agreement, {int((~mask).sum())} positions masked"


@rule("look for a hand-written backward, a wrong sign, or a branch whose gradient is lost")
def gradient_is_the_slope(subject: KLSubject) -> str:
    """The gradient equals finite differences in float64, stop-gradients held fixed, at random points."""
    slopes = []
    for seed in (1, 2):
        question = distributions(seed) if subject.whole else token_table(seed)
        where = question.get("completion_mask", torch.ones_like(question[subject.current], dtype=torch.bool))

        def total(point: Tensor, question: Tokens = question) -> Tensor:
            return subject.total(question, point)

        slopes.append(compare_slopes(total, question[subject.current], where))
    return str(max(slopes, key=lambda one: one.gap))


@rule("correct the estimator, or drop its attribute `unbiased`")
def mean_over_the_policy(subject: KLSubject) -> str:
    """Its exact mean over a policy of five tokens is measured; it is the KL if `unbiased` is declared."""
    logits = torch.tensor([0.9, -0.4, 0.1, -1.2, 0.5], dtype=torch.float64, requires_grad=True)
    policy = logits.log_softmax(dim=0)
    reference = torch.tensor([0.1, 0.3, -0.8, 0.6, 0.0], dtype=torch.float64).log_softmax(dim=0)
    reverse = (policy.exp() * (policy - reference)).sum()
    forward = (reference.exp() * (reference - policy)).sum()
    mean = _mean(subject, policy, reference)
    found = torch.autograd.grad(mean, logits, retain_graph=True, allow_unused=True)[0]
    found = torch.zeros_like(logits) if found is None else found
    known = {"KL(policy || reference)": reverse, "KL(reference || policy)": forward}
    value = next((name for name, one in known.items() if abs(float((one - mean).detach())) < 1e-6), "neither KL")
    slope = "a constant" if bool((found.abs() < 1e-9).all()) else "neither KL"
    for name, one in known.items():
        if bool(((found - torch.autograd.grad(one, logits, retain_graph=True)[0]).abs() < 1e-6).all()):
            slope = name
    if subject.declared("unbiased", False):
        expect_same(mean, reverse, "it declares `unbiased`, and its mean", tolerance=1e-9)
    worth = f"mean {float(mean.detach()):.4f} where KL(policy || reference) is {float(reverse.detach()):.4f}: {value}"
    return f"{worth}; on-policy gradient: that of {slope}"


def _mean(subject: KLSubject, policy: Tensor, reference: Tensor) -> Tensor:
    """``E_pi`` of the estimate; its gradient is the expected gradient of the estimate, on-policy."""
    if subject.whole:
        question = {"distribution": policy[None], "ref_distribution": reference[None]}
        return subject.estimate(subject.build(), question).sum()
    column, frozen = policy[:, None], policy.detach()[:, None]
    question = {name: frozen for name in KL_DATA} | {
        "logprobs": column,
        "ref_logprobs": reference[:, None],
        "completion_mask": torch.ones_like(column, dtype=torch.bool),
    }
    return (policy.detach().exp() * subject.estimate(subject.build(), question)[:, 0]).sum()


RULES: tuple[Rule[KLSubject], ...] = (
    signature,
    returns,
    keeps_dtype,
    deterministic,
    leaves_data_alone,
    row_order,
    rows_alone,
    coupling,
    padding,
    empty_row,
    zero_when_equal,
    finite_gradient,
    gradient_is_the_slope,
    mean_over_the_policy,
    state,
    travels,
    quick,
)
