"""What a loss promises: values per token, nothing normalized, a gradient that is right and 0 where masked."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpoforge.contracts import loss_of
from grpoforge.testing.general import deterministic, leaves_data_alone, quick, state, travels
from grpoforge.testing.gradients import compare_slopes, gradient
from grpoforge.testing.kit import Broken, NotApplicable, Rule, difference, expect_same, foreign, rule
from grpoforge.testing.tokens import (
    TIGHT,
    Tokens,
    TokenSubject,
    coupling,
    empty_row,
    far_where_masked,
    padded,
    padding,
    pick,
    row_order,
    rows_alone,
    token_table,
)
from grpoforge.types import Coupling, LossInputs

NOT_FOR_LOSSES = ("ref_logprobs", "target_logprobs")
"""What KL estimators and corrections are given besides."""


@dataclass(frozen=True, kw_only=True)
class LossSubject(TokenSubject):
    """A loss, asked about four rows off policy."""

    @property
    def coupling(self) -> Coupling:
        return typing.cast(Coupling, self.declared("coupling", "sequence"))

    def answer(self, built: Any, question: Tokens) -> dict[str, Tensor]:
        per_token_loss, metrics = self.call(built, question)
        return kept({"per_token_loss": per_token_loss, **metrics}, question)

    def values(self, question: Tokens) -> dict[str, Tensor]:
        return self.answer(self.build(), question)

    def call(self, built: Any, question: Tokens) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What ``built`` returns, per-token loss and metrics."""
        inputs = LossInputs(**{name: values for name, values in question.items() if name not in NOT_FOR_LOSSES}, seed=7)
        with foreign():
            return loss_of(built, inputs)

    def slope(self, question: Tokens) -> Tensor:
        """The gradient of the summed loss of all real tokens, ``[b, T]``."""
        return gradient(lambda logprobs: self.total(question, logprobs), question["logprobs"])

    def total(self, question: Tokens, logprobs: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss at ``logprobs`` summed over all real tokens, each times its weight; summed as the engine does it."""
        per_token_loss, _ = self.call(self.build(), {**question, "logprobs": logprobs})
        mask = question["completion_mask"]
        real = torch.where(mask, per_token_loss, torch.zeros_like(per_token_loss))
        return (real if weights is None else real * weights).sum()


def kept(values: Mapping[str, Tensor], question: Tokens) -> dict[str, Tensor]:
    """``values`` without gradient, 0 where masked."""
    mask = question["completion_mask"]
    return {name: torch.where(mask, one.detach(), torch.zeros_like(one)) for name, one in values.items()}


@rule("a loss takes `inputs`, a `LossInputs`; everything else is keyword-only", decisive=True)
def signature(subject: LossSubject) -> str:
    """It takes one thing positionally, the inputs."""
    names = [one.name for one in subject.component.data if one.required]
    if len(names) != 1:
        raise Broken(f"it takes {', '.join(names) or 'nothing'}")
    return f"takes {names[0]}"


@rule("return `(per_token_loss, metrics)`, tensors of [b, T] each", decisive=True)
def returns(subject: LossSubject) -> str:
    """It returns a loss for each token and metrics for each token, `[b, T]`, finite at real tokens."""
    found = subject.ask()
    for name, values in found.items():
        if not bool(values.isfinite().all()):
            raise Broken(f"`{name}` is not finite at a real token")
    metrics = ", ".join(name for name in found if name != "per_token_loss")
    return f"{list(found['per_token_loss'].shape)}; metrics: {metrics or 'none'}"


@rule("make constants with `torch.zeros_like` or a plain number, never with a dtype of your own")
def keeps_dtype(subject: LossSubject) -> str:
    """The loss has the dtype of the log-probs, float32 and float64, and both agree."""
    question = subject.question()
    single = {name: one if one.dtype == torch.bool else one.float() for name, one in question.items()}
    answers = {}
    for dtype, data in ((torch.float64, question), (torch.float32, single)):
        answers[dtype] = subject.values(data)["per_token_loss"]
        if answers[dtype].dtype != dtype:
            raise Broken(f"{str(dtype)[6:]} log-probs give a loss of {str(answers[dtype].dtype)[6:]}")
    expect_same(answers[torch.float32], answers[torch.float64], "float32 against float64", tolerance=1e-4)
    return "float32 and float64"


@rule("return the bare value of each token: the engine divides, once per optimizer step and over all ranks")
def normalizes_nothing(subject: LossSubject) -> str:
    """Having every row twice, and more padding, leaves the value of each token as it is."""
    if subject.coupling == "batch":
        raise NotApplicable("it looks at the whole minibatch (`coupling` is `batch`)")
    question = subject.question()
    plain = subject.values(question)["per_token_loss"]
    twice = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    found = subject.values(pick(question, twice))["per_token_loss"]
    expect_same(found, plain[twice], "with every row twice", tolerance=TIGHT)
    wide = subject.values(padded(question, 5))["per_token_loss"]
    expect_same(wide[:, : plain.shape[1]], plain, "with five columns of padding", tolerance=TIGHT)
    return "rows twice, five columns more"


@rule("replace masked log-probs before any exp, as `inputs.log_ratio` does, and sum with `inputs.sequence_sum`")
def masked_tokens(subject: LossSubject) -> str:
    """Log-probs 1e4 apart where masked change no real value and no gradient, which is 0 there."""
    question = subject.question()
    mask, far = question["completion_mask"], far_where_masked(question)
    found, plain = subject.values(far), subject.values(question)
    expect_same(found, plain, "values with log-probs 1e4 apart where masked", tolerance=TIGHT)
    slope, clean = subject.slope(far), subject.slope(question)
    if not bool(slope.isfinite().all()):
        raise Broken("with log-probs 1e4 apart where masked the gradient is not finite")
    outside = float(torch.where(mask, torch.zeros_like(slope), slope).abs().max())
    if outside:
        raise Broken(f"the gradient is up to {outside:.3g} where masked")
    expect_same(slope, clean, "gradient with log-probs 1e4 apart where masked", tolerance=TIGHT)
    return f"{int((~mask).sum())} masked positions"


@rule("look for a hand-written backward, a wrong sign, or a branch whose gradient is lost")
def gradient_is_the_slope(subject: LossSubject) -> str:
    """The gradient equals finite differences in float64, stop-gradients held fixed, at random points off policy."""
    slopes = []
    for seed in (1, 2):
        question = token_table(seed)
        generator = torch.Generator().manual_seed(seed)
        mask = question["completion_mask"]
        weights = 0.5 + torch.rand(mask.shape, generator=generator, dtype=torch.float64)

        def total(point: Tensor, question: Tokens = question, weights: Tensor = weights) -> Tensor:
            return subject.total(question, point, weights)

        slopes.append(compare_slopes(total, question["logprobs"], mask))
    return str(max(slopes, key=lambda one: one.gap))


@rule("check sign and scale; a loss that means it declares `on_policy_gradient: ClassVar[bool] = False`")
def on_policy_gradient(subject: LossSubject) -> str:
    """Where policy, old policy and sampler agree, the gradient of each token is minus its advantage."""
    if not subject.declared("on_policy_gradient", True):
        raise NotApplicable("it declares `on_policy_gradient = False`" + _seen(subject))
    question = token_table(on_policy=True)
    expected = torch.where(question["completion_mask"], -question["advantages"], 0.0)
    expect_same(subject.slope(question), expected, "gradient at ratio 1", tolerance=TIGHT)
    return "-A at every token"


def _seen(subject: LossSubject) -> str:
    question = token_table(on_policy=True)
    expected = torch.where(question["completion_mask"], -question["advantages"], 0.0)
    place = difference(subject.slope(question), expected, TIGHT)
    return f"; observed: {place}" if place else "; observed: it is -A all the same"


RULES: tuple[Rule[LossSubject], ...] = (
    signature,
    returns,
    keeps_dtype,
    deterministic,
    leaves_data_alone,
    row_order,
    rows_alone,
    coupling,
    normalizes_nothing,
    padding,
    empty_row,
    masked_tokens,
    gradient_is_the_slope,
    on_policy_gradient,
    state,
    travels,
    quick,
)
