"""Golden vectors of the losses: the papers' formulas, one scalar at a time.

Run it to write ``losses/`` beside it. It imports nothing of grpoforge. Gradients are complex steps: the formulas are
evaluated at ``logprob + 1e-30 i``, and the imaginary part of the loss is its slope to the last bit, without a second
formula. `stop` drops the imaginary part, which is what a stop-gradient does; comparisons look at real parts.

A name ends in the system whose form of the formula it is: ``clip-verl`` is dual clip as verl writes it.
"""

from __future__ import annotations

import cmath
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STEP = 1e-30
NUM_COLUMNS = 5
FAR = 1e4
"""Stands where masked: the log-ratio is 2e4 there."""


@dataclass(frozen=True)
class Token:
    """Log-probs of one token under the policy, the old policy and the sampler."""

    new: complex
    old: float
    sampler: float

    @property
    def d(self) -> complex:
        return self.new - self.old

    @property
    def ratio(self) -> complex:
        return cmath.exp(self.d)


@dataclass(frozen=True)
class Row:
    advantage: float
    tokens: tuple[Token, ...]


Rows = Sequence[Row]
Values = list[list[complex]]
Formula = Callable[[Rows], Values]


def row(advantage: float, *tokens: tuple[float, float, float]) -> Row:
    """Tokens as ``(log pi_old, log pi - log pi_old, log pi_old - log pi_sampler)``."""
    return Row(advantage, tuple(Token(old + d, old, old - gap) for old, d, gap in tokens))


ROWS = (
    # Every region of every clip: above and below, pushed outward and back, far above.
    row(1.25, (-0.55, 0.35, 0.01), (-1.2, 0.05, -0.04), (-1.5, -0.4, 0.1), (-4.8, 1.8, -0.2), (-0.7, -0.02, 0.0)),
    row(-0.75, (-1.1, 0.3, 0.05), (-0.4, -0.5, -0.02), (-2.9, 1.4, 0.1), (-0.9, -0.05, 0.03)),
    # Rows whose mean log-ratio is inside the narrow clips of GSPO.
    row(0.6, (-1.3, 0.012, 0.0), (-0.25, -0.0115, 0.002), (-0.8, 0.0003, -0.001)),
    row(-1.4, (-4.0, -0.0002, 0.0004)),
    row(0.0, (-1.0, 0.2, 0.01), (-2.0, -0.3, 0.02)),
    Row(0.9, ()),
    row(-0.5, (-0.3, -0.7, 0.1), (-1.6, -0.2, 0.0), (-0.6, 0.1, -0.1)),
    row(0.8, (-0.9, -0.3, 0.05), (-1.4, -0.1, 0.02), (-0.2, -0.15, 0.01), (-2.2, 0.05, 0.04)),
)
WEIGHTS = [[0.1 + 0.05 * ((3 * i + 5 * t) % 7) for t in range(NUM_COLUMNS)] for i in range(len(ROWS))]


def stop(value: complex) -> complex:
    """The value without its gradient."""
    return complex(value.real)


def least(*values: complex) -> complex:
    return min(values, key=lambda one: one.real)


def most(*values: complex) -> complex:
    return max(values, key=lambda one: one.real)


def clip(value: complex, low: float, high: float) -> complex:
    return complex(low) if value.real < low else complex(high) if value.real > high else value


def mean(values: Sequence[complex]) -> complex:
    return sum(values, 0j) / len(values)


def by_token(formula: Callable[[float, Token], complex]) -> Formula:
    """A loss that looks at one token at a time."""
    return lambda rows: [[formula(one.advantage, token) for token in one.tokens] for one in rows]


def by_row(formula: Callable[[Row], Sequence[complex]]) -> Formula:
    """A loss that looks at one row at a time; never called for a row without tokens."""
    return lambda rows: [list(formula(one)) if one.tokens else [] for one in rows]


def ppo(ratio: complex, advantage: float, low: float, high: float) -> complex:
    return -least(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)


def two_sided(delta: float) -> Formula:
    """INTELLECT-2 and TRL: the ratio is bounded before it meets the clip."""
    return by_token(lambda a, t: -least(clip(t.ratio, 0, delta) * a, clip(t.ratio, 0.8, 1.2) * a))


def dual_clip(c: float) -> Formula:
    """verl's ``compute_policy_loss_vanilla``, its clamp of the log-ratio included."""

    def formula(a: float, token: Token) -> complex:
        ratio = cmath.exp(clip(token.d, -20, 20))
        clipped = most(-a * ratio, -a * clip(ratio, 0.8, 1.2))
        return least(-a * c, clipped) if a < 0 else clipped

    return by_token(formula)


def sequence_ratio(one: Row) -> complex:
    return cmath.exp(mean([token.d for token in one.tokens]))


def gspo(low: float, high: float) -> Formula:
    return by_row(lambda one: [ppo(sequence_ratio(one), one.advantage, low, high)] * len(one.tokens))


def luspo(low: float, high: float) -> Formula:
    def formula(one: Row) -> list[complex]:
        size = len(one.tokens)
        return [size * ppo(sequence_ratio(one), one.advantage, low, high)] * size

    return by_row(formula)


def gspo_token(low: float, high: float) -> Formula:
    def formula(one: Row) -> list[complex]:
        ratios = [stop(sequence_ratio(one)) * cmath.exp(t.new) / stop(cmath.exp(t.new)) for t in one.tokens]
        return [ppo(ratio, one.advantage, low, high) for ratio in ratios]

    return by_row(formula)


def gspo_verl(low: float, high: float) -> Formula:
    """verl's ``compute_policy_loss_gspo``: composed in log space, bounded by 10."""

    def formula(one: Row) -> list[complex]:
        center = stop(mean([token.d for token in one.tokens]))
        logs = [token.new - stop(token.new) + center for token in one.tokens]
        return [ppo(cmath.exp(clip(log, -math.inf, 10)), one.advantage, low, high) for log in logs]

    return by_row(formula)


def cispo(low: float, high: float) -> Formula:
    return by_token(lambda a, t: -stop(clip(t.ratio, low, high)) * a * t.new)


def sapo(positive: float, negative: float) -> Formula:
    def formula(a: float, token: Token) -> complex:
        tau = positive if a > 0 else negative
        return -a * (4 / tau) / (1 + cmath.exp(-tau * (token.ratio - 1)))

    return by_token(formula)


def gmpo(low: float, high: float) -> Formula:
    """In the form of the paper's code: multiplied by the sign, minimum, multiplied back."""

    def formula(one: Row) -> list[complex]:
        sign = (one.advantage > 0) - (one.advantage < 0)
        kept = [sign * least(sign * t.d, sign * clip(t.d, -low, high)) for t in one.tokens]
        return [-one.advantage * cmath.exp(mean(kept))] * len(kept)

    return by_row(formula)


def vespo(positive: tuple[float, float], negative: tuple[float, float], of_sampler: bool = False) -> Formula:
    def formula(one: Row) -> list[complex]:
        differences = [t.new - (t.sampler if of_sampler else t.old) for t in one.tokens]
        weight = math.exp(min(max(sum(min(max(d.real, -20), 20) for d in differences), math.log(1e-8)), 20))
        k, decay = positive if one.advantage >= 0 else negative
        phi = math.exp(decay) * weight**k * math.exp(-decay * weight)
        return [-phi * one.advantage * t.new for t in one.tokens]

    return by_row(formula)


def dppo(moved_too_far: Callable[[float, float, bool], bool], max_ratio: float, of_sampler: bool = False) -> Formula:
    """``moved_too_far(p_old, p, up)``: whether a token that is pushed ``up`` or down is to be dropped."""

    def formula(a: float, token: Token) -> complex:
        old = token.sampler if of_sampler else token.old
        if moved_too_far(math.exp(old), math.exp(token.new.real), a > 0):
            return 0j
        return -min(math.exp(token.new.real - old), max_ratio) * a * token.new

    return by_token(formula)


def variation(low: float, high: float) -> Callable[[float, float, bool], bool]:
    return lambda old, new, up: not (new - old <= high if up else new - old >= -low)


def divergence(low: float, high: float) -> Callable[[float, float, bool], bool]:
    """As verl writes it, with 1e-8 added to the rest of the probability."""

    def moved_too_far(old: float, new: float, up: bool) -> bool:
        kl = old * math.log(old / new) + (1 - old) * math.log((1 - old + 1e-8) / (1 - new + 1e-8))
        return not (kl <= high or new <= old if up else kl <= low or new >= old)

    return moved_too_far


def dro(beta: float) -> Formula:
    return by_token(lambda a, t: -(a * t.new - beta / 2 * t.d**2))


def topr(of_row: bool) -> Formula:
    def formula(one: Row) -> list[complex]:
        logs = (
            [sum(token.d.real for token in one.tokens)] * len(one.tokens) if of_row else [t.d.real for t in one.tokens]
        )
        weights = [min(math.exp(log), 1.0) if one.advantage < 0 else 1.0 for log in logs]
        return [-w * one.advantage * t.new for w, t in zip(weights, one.tokens)]

    return by_row(formula)


def covariances(rows: Rows) -> list[list[float]]:
    pairs = [(one.advantage, token.new.real) for one in rows for token in one.tokens]
    center, height = (math.fsum(values) / len(pairs) for values in zip(*pairs))
    return [[(one.advantage - center) * (token.new.real - height) for token in one.tokens] for one in rows]


def clip_cov(share: float, cov_low: float, cov_high: float, epsilon: float) -> Formula:
    """Only where the draw leaves no choice: a single candidate, or all of them."""

    def formula(rows: Rows) -> Values:
        losses = by_token(lambda a, t: ppo(t.ratio, a, epsilon, epsilon))(rows)
        free = by_token(lambda a, t: (-a * clip(t.ratio, 1 - epsilon, 1 + epsilon)).real <= (-a * t.ratio).real)(rows)
        places = [
            (i, t)
            for i, line in enumerate(covariances(rows))
            for t, cov in enumerate(line)
            if free[i][t] and cov_low < cov < cov_high
        ]
        quota = max(int(share * sum(len(one.tokens) for one in rows)), 1)
        assert 0 < len(places) <= max(quota, 1), f"{len(places)} candidates for {quota}: the result is random"
        for i, t in places:
            losses[i][t] = 0j
        return losses

    return formula


def kl_cov(share: float, coefficient: float) -> Formula:
    def formula(rows: Rows) -> Values:
        losses = by_token(lambda a, t: -t.ratio * a)(rows)
        places = [(cov, i, t) for i, line in enumerate(covariances(rows)) for t, cov in enumerate(line)]
        for _, i, t in sorted(places, reverse=True)[: max(1, int(share * len(places)))]:
            d = rows[i].tokens[t].d
            losses[i][t] += coefficient * (d if d.real > 0 else -d)
        return losses

    return formula


CASES: tuple[tuple[str, dict[str, Any], Formula], ...] = (
    ("clip", {}, by_token(lambda a, t: ppo(t.ratio, a, 0.2, 0.2))),
    ("clip-dapo", {"epsilon_low": 0.2, "epsilon_high": 0.28}, by_token(lambda a, t: ppo(t.ratio, a, 0.2, 0.28))),
    ("clip-trl", {"delta": 4.0}, two_sided(4.0)),
    ("clip-verl", {"dual_clip": 3.0}, dual_clip(3.0)),
    ("gspo", {}, gspo(3e-4, 4e-4)),
    ("gspo-trl", {"epsilon_low": 0.2, "epsilon_high": 0.2}, gspo(0.2, 0.2)),
    ("gspo_token", {}, gspo_token(3e-4, 4e-4)),
    ("gspo_token-verl", {"epsilon_low": 0.2, "epsilon_high": 0.2}, gspo_verl(0.2, 0.2)),
    ("luspo", {}, luspo(2e-3, 2.5e-3)),
    ("luspo-trl", {"epsilon_low": 0.2, "epsilon_high": 0.2}, luspo(0.2, 0.2)),
    ("cispo-trl", {}, cispo(-math.inf, 5.0)),
    ("cispo-verl", {"min_ratio": 0.8, "max_ratio": 1.2}, cispo(0.8, 1.2)),
    ("sapo", {}, sapo(1.0, 1.05)),
    ("sapo-steep", {"tau_positive": 3.0, "tau_negative": 5.0}, sapo(3.0, 5.0)),
    ("gmpo", {}, gmpo(0.4, 0.4)),
    ("gmpo-verl", {"epsilon_low": 0.2, "epsilon_high": 0.2}, gmpo(0.2, 0.2)),
    ("vespo-trl", {}, vespo((2.0, 3.0), (3.0, 2.0))),
    ("vespo-sampling", {"behavior": "sampling"}, vespo((2.0, 3.0), (3.0, 2.0), of_sampler=True)),
    (
        "vespo-soft",
        {"k_positive": 1.0, "lambda_positive": 0.5, "k_negative": 0.5, "lambda_negative": 1.5},
        vespo((1.0, 0.5), (0.5, 1.5)),
    ),
    ("dppo_tv", {}, dppo(variation(0.15, 0.15), 20.0)),
    (
        "dppo_tv-verl",
        {"epsilon_low": 0.2, "epsilon_high": 0.2, "max_ratio": 3.0},
        dppo(variation(0.2, 0.2), 3.0),
    ),
    ("dppo_tv-sampling", {"behavior": "sampling"}, dppo(variation(0.15, 0.15), 20.0, of_sampler=True)),
    ("dppo_kl", {}, dppo(divergence(0.05, 0.05), 20.0)),
    (
        "dppo_kl-verl",
        {"epsilon_low": 0.2, "epsilon_high": 0.1, "max_ratio": 3.0},
        dppo(divergence(0.2, 0.1), 3.0),
    ),
    ("dppo_kl-sampling", {"behavior": "sampling"}, dppo(divergence(0.05, 0.05), 20.0, of_sampler=True)),
    ("reinforce", {}, by_token(lambda a, t: -a * t.new)),
    ("dro", {}, dro(0.1)),
    ("dro-verl", {"beta": 1.5}, dro(1.5)),
    ("topr", {}, topr(of_row=True)),
    ("topr-roll", {"ratio": "token"}, topr(of_row=False)),
    ("clip_cov-verl", {}, clip_cov(2e-4, 1.0, 5.0, 0.2)),
    (
        "clip_cov-all",
        {"share": 1.0, "cov_low": 0.1, "cov_high": 1.0, "epsilon_low": 0.1, "epsilon_high": 0.1},
        clip_cov(1.0, 0.1, 1.0, 0.1),
    ),
    ("kl_cov", {}, kl_cov(2e-4, 1.0)),
    ("kl_cov-verl", {"coefficient": 0.1}, kl_cov(2e-4, 0.1)),
    ("kl_cov-many", {"share": 0.4, "coefficient": 0.5}, kl_cov(0.4, 0.5)),
)


def weighted(losses: Values) -> complex:
    """``sum_it weight_it loss_it``."""
    return sum((w * value for weights, line in zip(WEIGHTS, losses) for w, value in zip(weights, line)), 0j)


def slope(formula: Formula, i: int, t: int) -> float:
    """Of the weighted loss, with respect to the log-prob of token ``t`` of row ``i``."""
    tokens = list(ROWS[i].tokens)
    tokens[t] = replace(tokens[t], new=tokens[t].new + STEP * 1j)
    moved = [*ROWS[:i], replace(ROWS[i], tokens=tuple(tokens)), *ROWS[i + 1 :]]
    return weighted(formula(moved)).imag / STEP


def padded(lines: Sequence[Sequence[Any]], filling: Any) -> list[list[Any]]:
    return [[*line, *[filling] * (NUM_COLUMNS - len(line))] for line in lines]


def inputs() -> dict[str, Any]:
    tokens = [one.tokens for one in ROWS]
    return {
        "logprobs": padded([[t.new.real for t in line] for line in tokens], FAR),
        "old_logprobs": padded([[t.old for t in line] for line in tokens], -FAR),
        "sampling_logprobs": padded([[t.sampler for t in line] for line in tokens], -FAR),
        "advantages": [[one.advantage] * NUM_COLUMNS for one in ROWS],
        "completion_mask": padded([[True] * len(line) for line in tokens], False),
    }


def document(component: str, options: dict[str, Any], formula: Formula) -> dict[str, Any]:
    losses = formula(ROWS)
    return {
        "component": component,
        "options": options,
        "loss": weighted(losses).real,
        "per_token_loss": padded([[value.real for value in line] for line in losses], 0.0),
        "gradient": padded([[slope(formula, i, t) for t in range(len(one.tokens))] for i, one in enumerate(ROWS)], 0.0),
        "weights": WEIGHTS,
        "inputs": inputs(),
    }


def documents() -> dict[str, dict[str, Any]]:
    """Every golden file: its path without the suffix, and what is in it."""
    return {f"losses/{name}": document(name.partition("-")[0], options, formula) for name, options, formula in CASES}


if __name__ == "__main__":
    for path, content in documents().items():
        (HERE / f"{path}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(path)
