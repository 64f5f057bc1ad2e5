"""What an off-policy correction promises: a finite weight per token that is 1 where nothing needs correcting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpoforge.binding import CORRECTION_DATA, bind
from grpoforge.contracts import correction_of
from grpoforge.testing.general import deterministic, leaves_data_alone, quick, state, travels
from grpoforge.testing.kit import Broken, Rule, foreign, rule
from grpoforge.testing.tokens import (
    FAR,
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


@dataclass(frozen=True, kw_only=True)
class CorrectionSubject(TokenSubject):
    """A correction, asked about four rows whose sampler, old, current and target policy differ."""

    def answer(self, built: Any, question: Tokens) -> dict[str, Tensor]:
        data = masked_as_engine(question)
        with foreign(), torch.no_grad():
            weights = correction_of(bind("correction", built), data)
        return {"weights": torch.where(data["completion_mask"], weights, torch.zeros_like(weights))}

    def values(self, question: Tokens) -> dict[str, Tensor]:
        return self.answer(self.build(), question)

    def weights(self, question: Tokens) -> Tensor:
        """The weights of the real tokens."""
        return self.values(question)["weights"][question["completion_mask"]]


@rule(f"positional parameters are data, of: {', '.join(CORRECTION_DATA)}", decisive=True)
def signature(subject: CorrectionSubject) -> str:
    """Its data are names that the engine knows."""
    with foreign():
        return f"reads {', '.join(bind('correction', subject.build()).data)}"


@rule("return one weight per token: [b, T], 0 or more", decisive=True)
def returns(subject: CorrectionSubject) -> str:
    """It returns one finite weight of at least 0 for each token."""
    return f"weights from {_range(subject.weights(subject.question()))}"


@rule("make constants with `torch.ones_like`, and return masks as `mask.to(old_logprobs.dtype)`")
def keeps_dtype(subject: CorrectionSubject) -> str:
    """The weights have the dtype of the log-probs."""
    for dtype in (torch.float64, torch.float32):
        question = {n: one if one.dtype == torch.bool else one.to(dtype) for n, one in subject.question().items()}
        found = subject.values(question)["weights"]
        if found.dtype != dtype:
            raise Broken(f"{str(dtype)[6:]} log-probs give {str(found.dtype)[6:]} weights")
    return "float32 and float64"


@rule("a ratio of 1 lies within every bound: correct nothing there")
def on_policy_weight_is_1(subject: CorrectionSubject) -> str:
    """Where sampler, old, current and target policy agree, every weight is exactly 1."""
    question = token_table(on_policy=True)
    found = subject.weights(question)
    if bool((found != 1).any()):
        raise Broken(f"weights from {_range(found)}")
    return f"1 at {found.numel()} tokens"


@rule("bound the ratio from above: truncate it or drop the token")
def bounded_far_off_policy(subject: CorrectionSubject) -> str:
    """Log-probs 1e4 apart, either way, give finite weights: it is there for just that."""
    seen = []
    for sign in (1.0, -1.0):
        question = dict(subject.question())
        question["sampling_logprobs"] = question["sampling_logprobs"] + sign * FAR
        question["target_logprobs"] = question["target_logprobs"] - sign * FAR
        seen.append(_range(subject.weights(question)))
    return f"weights from {seen[0]} and from {seen[1]}"


def _range(weights: Tensor) -> str:
    """The smallest and the largest weight; raises `Broken` for those that no token can have."""
    if not bool(weights.isfinite().all()):
        raise Broken("a weight is not finite")
    if bool((weights < 0).any()):
        raise Broken(f"a weight is {float(weights.min()):.6g}: negative weights turn the gradient around")
    return f"{float(weights.min()):.3g} to {float(weights.max()):.3g}"


RULES: tuple[Rule[CorrectionSubject], ...] = (
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
    on_policy_weight_is_1,
    bounded_far_off_policy,
    state,
    travels,
    quick,
)
