"""Golden vectors of advantages, KL estimators and corrections: the papers' formulas, one scalar at a time.

Run it to write ``advantages/``, ``kl/`` and ``corrections/`` beside it. It imports nothing of grpoforge. KL values and
their derivatives (with respect to ``logprobs``, all else constant, written out by hand) are computed with 50 digits.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from decimal import Decimal, getcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
getcontext().prec = 50

# One row that no reward scored, two with a missing reward, a group of equal totals (all exactly representable).
REWARDS: list[list[list[float | None]]] = [
    [[1.0, 0.25], [0.0, 0.75], [None, None], [0.5, None], [2.0, -0.5]],
    [[1.0, 0.5], [0.75, 1.0], [1.25, 0.0], [1.25, None], [1.0, 0.5]],
    [[0.0, 0.125], [0.0, 0.5], [1.0, 0.25], [None, 1.5], [0.0, 3.0]],
]
WEIGHTS = [1.0, 0.5]
LENGTHS = [[3, 7, 5, 2, 11], [4, 4, 9, 1, 6], [6, 2, 8, 3, 0]]

Group = list[float | None]
Groups = list[Group]


def totals(rewards: list[list[list[float | None]]] = REWARDS) -> Groups:
    """Weighted sums; None where no reward scored the row."""
    return [
        [
            None
            if all(part is None for part in row)
            else sum(w * part for w, part in zip(WEIGHTS, row) if part is not None)
            for row in group
        ]
        for group in rewards
    ]


def known(group: Sequence[float | None]) -> list[float]:
    return [value for value in group if value is not None]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def spread(values: Sequence[float], std: str) -> float:
    center = mean(values)
    freedom = len(values) - (1 if std == "sample" else 0)
    return math.sqrt(math.fsum((value - center) ** 2 for value in values) / freedom)


def every(group: Group, formula: Callable[[int, float], float]) -> list[float]:
    """``formula(index, R)`` of the scored rows, 0 for the others."""
    return [0.0 if value is None else formula(index, value) for index, value in enumerate(group)]


def by_group(formula: Callable[[Group, int, float], float], groups: Groups | None = None) -> list[list[float]]:
    return [every(group, functools.partial(formula, group)) for group in groups or totals()]


def grpo(groups: Groups, std: str, epsilon: float) -> list[list[float]]:
    return by_group(lambda g, _, r: (r - mean(known(g))) / (spread(known(g), std) + epsilon), groups)


def rloo(group: Group, index: int, value: float) -> float:
    return value - mean([other for j, other in enumerate(group) if j != index and other is not None])


def maxrl(group: Group, _: int, value: float) -> float:
    center = mean(known(group))
    return (value - center) / center if center > 0 else 0.0


def opo() -> list[list[float]]:
    out = []
    for group, lengths in zip(totals(), LENGTHS):
        tokens = sum(n for n, value in zip(lengths, group) if value is not None)
        baseline = math.fsum(n * value for n, value in zip(lengths, group) if value is not None) / tokens
        out.append([0.0 if value is None else value - baseline for value in group])
    return out


def gpg() -> list[list[float]]:
    centered = by_group(lambda g, _, r: r - mean(known(g)))
    rows = sum(len(known(group)) for group in totals())
    alpha = rows / sum(value != 0 for group in centered for value in group)
    return [[alpha * value for value in group] for group in centered]


def median(values: Sequence[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def robust(epsilon: float, limit: float, fallback: str) -> list[list[float]]:
    def formula(group: Group, _: int, value: float) -> float:
        center = median(known(group))
        mad = median([abs(other - center) for other in known(group)])
        if mad == 0:
            return value - mean(known(group)) if fallback == "mean" else 0.0
        return max(-limit, min(limit, (value - center) / (1.4826 * mad + epsilon)))

    return by_group(formula)


def pass_at_k(k: int | None, std: str, epsilon: float) -> list[list[float]]:
    def formula(group: Group, index: int, value: float) -> float:
        others = [other for j, other in enumerate(group) if j != index and other is not None]
        size = len(others) + 1 if k is None else k
        gains = [max(value, *rest) - max(rest) for rest in itertools.combinations(others, size - 1)]
        deviation = spread(known(group), std) if std != "none" else 0.0
        # A group of equal totals has gains of 0, so what they are divided by does not matter.
        return mean(gains) / (1.0 if std == "none" else deviation + epsilon)

    return by_group(formula)


def batch_std(std: str, epsilon: float) -> list[list[float]]:
    deviation = spread([value for group in totals() for value in known(group)], std)
    return by_group(lambda g, _, r: (r - mean(known(g))) / (deviation + epsilon))


def prpo(std: str, epsilon: float) -> list[list[float]]:
    return grpo([list(itertools.chain(*totals()))], std, epsilon)


def tokens_whitened(values: Groups, std: str, epsilon: float) -> list[list[float]]:
    """Whitened over tokens: every value is repeated once for each token of its row."""
    repeated = [
        value
        for group, lengths in zip(values, LENGTHS)
        for value, n in zip(group, lengths)
        if value is not None
        for _ in range(n)
    ]
    center, variance = mean(repeated), spread(repeated, std) ** 2
    return [
        [
            0.0 if value is None or n == 0 else (value - center) / math.sqrt(variance + epsilon)
            for value, n in zip(group, lengths)
        ]
        for group, lengths in zip(values, LENGTHS)
    ]


def centered() -> Groups:
    return [[None if value is None else value - mean(known(group)) for value in group] for group in totals()]


def gdpo(std: str, epsilon: float, whiten: str) -> list[list[float]]:
    parts = [grpo([[row[k] for row in group] for group in REWARDS], std, epsilon) for k in range(len(WEIGHTS))]
    summed: Groups = [
        [
            None if value is None else sum(w * part[p][g] for w, part in zip(WEIGHTS, parts))
            for g, value in enumerate(group)
        ]
        for p, group in enumerate(totals())
    ]
    if whiten == "tokens":
        return tokens_whitened(summed, std, 1e-8)
    return regrouped(grpo([list(itertools.chain(*summed))], std, epsilon))


def regrouped(flat: list[list[float]]) -> list[list[float]]:
    size = len(REWARDS[0])
    return [flat[0][start : start + size] for start in range(0, len(flat[0]), size)]


# Gaps of the weighted sums: 1.25 - 0.25, a row unscored; 0.0625, below the threshold, and -0.75; a tie, and 1.5 - 0.25.
PAIRS: list[list[list[float | None]]] = [
    [[1.0, 0.5], [0.0, 0.5], [None, None], [1.0, 0.0]],
    [[0.0, 0.125], [0.0, 0.0], [0.25, None], [0.5, 1.0]],
    [[1.0, 0.0], [0.5, 1.0], [0.0, 3.0], [None, 0.5]],
]


def paired_gaps(threshold: float, baselines: Sequence[float]) -> list[list[float]]:
    """Half the gap of each pair and its opposite; 0 below the threshold and where a row is unscored."""
    out = []
    for group in totals(PAIRS):
        row: list[float] = []
        for first, second in zip(group[0::2], group[1::2]):
            gap = 0.0 if first is None or second is None else (first - baselines[0]) - (second - baselines[1])
            half = gap / 2 if abs(gap) >= threshold else 0.0
            row += [half, -half]
        out.append(row)
    return out


def paired_cases() -> list[tuple[str, dict[str, Any], list[list[float]]]]:
    cold, hot = (known([one for group in totals(PAIRS) for one in group[start::2]]) for start in (0, 1))
    spread_of_all = spread(cold + hot, "sample") + 1e-4
    scaled = [[value / spread_of_all for value in row] for row in paired_gaps(0.1, (0.0, 0.0))]
    return [
        ("paired", {}, paired_gaps(0.1, (0.0, 0.0))),
        ("paired-every_gap", {"preference_threshold": 0.0}, paired_gaps(0.0, (0.0, 0.0))),
        ("paired-std", {"std": "sample", "epsilon": 1e-4}, scaled),
        ("paired-baseline", {"baseline_decay": 0.9}, paired_gaps(0.1, (mean(cold), mean(hot)))),
    ]


def advantages() -> dict[str, dict[str, Any]]:
    """By file name: component, options and expected advantages."""
    cases: list[tuple[str, str, dict[str, Any], list[list[float]]]] = [
        ("group-trl", "group", {"std": "sample", "epsilon": 1e-4}, grpo(totals(), "sample", 1e-4)),
        ("group-verl", "group", {"std": "sample", "epsilon": 1e-6}, grpo(totals(), "sample", 1e-6)),
        ("group-population", "group", {"std": "population", "epsilon": 1e-4}, grpo(totals(), "population", 1e-4)),
        ("group_mean", "group_mean", {}, by_group(lambda g, _, r: r - mean(known(g)))),
        ("leave_one_out", "leave_one_out", {}, by_group(rloo)),
        ("opo", "opo", {}, opo()),
        ("maxrl", "maxrl", {}, by_group(maxrl)),
        ("gpg", "gpg", {}, gpg()),
        ("robust", "robust", {}, robust(1e-4, 3.0, "mean")),
        ("robust-zero", "robust", {"fallback": "zero", "limit": 1.0}, robust(1e-4, 1.0, "zero")),
        ("pass_at_k", "pass_at_k", {}, pass_at_k(None, "none", 0.0)),
        ("pass_at_k-2", "pass_at_k", {"k": 2}, pass_at_k(2, "none", 0.0)),
        ("pass_at_k-3", "pass_at_k", {"k": 3}, pass_at_k(3, "none", 0.0)),
        ("pass_at_k-verl", "pass_at_k", {"std": "sample", "epsilon": 1e-6}, pass_at_k(None, "sample", 1e-6)),
        ("batch_std-trl", "batch_std", {"std": "sample", "epsilon": 1e-4}, batch_std("sample", 1e-4)),
        ("batch_std-population", "batch_std", {"std": "population"}, batch_std("population", 1e-4)),
        ("prpo", "prpo", {}, regrouped(prpo("sample", 1e-6))),
        ("reinforce_pp-verl", "reinforce_pp", {}, tokens_whitened(totals(), "sample", 1e-8)),
        (
            "reinforce_pp-openrlhf",
            "reinforce_pp",
            {"std": "population", "epsilon": 0.0},
            tokens_whitened(totals(), "population", 0.0),
        ),
        ("reinforce_pp_baseline-verl", "reinforce_pp_baseline", {}, tokens_whitened(centered(), "sample", 1e-8)),
        ("gdpo-trl", "gdpo", {"std": "sample", "epsilon": 1e-4}, gdpo("sample", 1e-4, "rows")),
        ("gdpo-verl", "gdpo", {"std": "sample", "epsilon": 1e-6, "whiten": "tokens"}, gdpo("sample", 1e-6, "tokens")),
    ]
    inputs = {"rewards": REWARDS, "weights": WEIGHTS, "lengths": LENGTHS}
    pairs = {"rewards": PAIRS, "weights": WEIGHTS, "temperatures": [[0.75, 1.25] * 2] * 3}
    return {
        name: {"component": component, "options": options, "inputs": inputs, "advantages": expected}
        for name, component, options, expected in cases
    } | {
        name: {"component": "paired", "options": options, "inputs": pairs, "advantages": expected}
        for name, options, expected in paired_cases()
    }


LOGPROBS = [[-0.5, -2.25, -1.0, -30.0], [-4.0, -0.125, -3.0000001, -0.75]]
REF_LOGPROBS = [[-0.5, -1.5, -3.5, -5.0], [-1.0, -25.5, -3.0, -0.625]]
OLD_LOGPROBS = [[-0.5, -2.0, -1.125, -29.5], [-3.5, -0.25, -3.0, -0.75]]
SAMPLING_LOGPROBS = [[-0.5, -2.5, -0.875, -29.75], [-4.5, -0.125, -2.875, -1.0]]

Exact = tuple[Decimal, Decimal]
"""A value and its derivative by ``logprobs``."""


def bounded(pair: Exact, bound: float) -> Exact:
    """Clamped to +-bound: beyond it the value is constant."""
    limit = Decimal(bound)
    if abs(pair[0]) <= limit:
        return pair
    return (limit if pair[0] > 0 else -limit), Decimal(0)


def schulman(name: str, difference: Decimal, clamp: Sequence[float] = (math.inf, math.inf)) -> Exact:
    x, slope = bounded((difference, Decimal(1)), clamp[0])
    value, derivative = {
        "k1": (x, Decimal(1)),
        "k2": (x * x / 2, x),
        "k3": ((-x).exp() + x - 1, 1 - (-x).exp()),
        "abs": (abs(x), Decimal((x > 0) - (x < 0))),
    }[name]
    return bounded((value, derivative * slope), clamp[1])


def corrected(name: str, difference: Decimal, log_ratio: Decimal) -> Exact:
    """``r f(x)`` and ``r (f(x) + f'(x))``."""
    value, derivative = schulman(name, difference)
    return log_ratio.exp() * value, log_ratio.exp() * (value + derivative)


def plus(name: str, difference: Decimal, clamp: Sequence[float]) -> Exact:
    return schulman(name, difference, clamp)[0], difference


def per_token(formula: Callable[[Decimal, Decimal, Decimal], Exact]) -> dict[str, list[list[float]]]:
    """``formula(x, log ratio to old, log ratio to sampling)`` of every token."""
    pairs = [
        [
            formula(Decimal(ours) - Decimal(ref), Decimal(ours) - Decimal(old), Decimal(ours) - Decimal(sampling))
            for ours, ref, old, sampling in zip(*rows)
        ]
        for rows in zip(LOGPROBS, REF_LOGPROBS, OLD_LOGPROBS, SAMPLING_LOGPROBS)
    ]
    return {
        "estimate": [[float(value) for value, _ in row] for row in pairs],
        "gradient": [[float(derivative) for _, derivative in row] for row in pairs],
    }


CLAMPS = {"": None, "-verl": [20.0, 10.0], "-openrlhf": [math.inf, 10.0], "-open_instruct": [40.0, math.inf]}


def token_estimators() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}

    def add(component: str, dialect: str, options: dict[str, Any], formula: Callable[..., Exact]) -> None:
        found[component + dialect] = {"component": component, "options": options, **per_token(formula)}

    for dialect, clamp in CLAMPS.items():
        options = {} if clamp is None else {"clamp": clamp}
        limits = clamp or [math.inf, math.inf]
        for name in ("k1", "k2", "k3", "abs"):
            add(name, dialect, options, lambda x, *_, at=(name, limits): schulman(at[0], x, at[1]))
        for name in ("k1", "k3"):
            add(f"{name}_plus", dialect, options, lambda x, *_, at=(name, limits): plus(at[0], x, at[1]))
    for name in ("k1", "k3"):
        add(f"{name}_corrected", "", {}, lambda x, _, to_sampling, name=name: corrected(name, x, to_sampling))
        old = {"behavior": "old"}
        add(f"{name}_corrected", "-trl", old, lambda x, to_old, _, name=name: corrected(name, x, to_old))
    inputs = {
        "logprobs": LOGPROBS,
        "ref_logprobs": REF_LOGPROBS,
        "old_logprobs": OLD_LOGPROBS,
        "sampling_logprobs": SAMPLING_LOGPROBS,
    }
    return {name: {**case, "inputs": inputs} for name, case in found.items()}


def log_softmax(logits: Sequence[float]) -> list[float]:
    norm = sum((Decimal(logit).exp() for logit in logits), Decimal(0)).ln()
    return [float(Decimal(logit) - norm) for logit in logits]


DISTRIBUTION = [log_softmax(row) for row in ([0.3, -1.2, 0.8, 2.0], [0.0, 0.0, 0.0, 0.0], [9.0, -9.0, 1.0, 0.0])]
REF_DISTRIBUTION = [log_softmax(row) for row in ([1.1, 0.2, -0.5, 0.9], [3.0, -1.0, 0.5, 0.0], [9.0, -9.0, 1.0, 0.0])]


def full_estimators() -> dict[str, dict[str, Any]]:
    """The derivative is by each log-prob of the policy, taken as a free number."""
    reverse, forward = [], []
    for ours, theirs in zip(DISTRIBUTION, REF_DISTRIBUTION):
        pairs = [(Decimal(p), Decimal(q)) for p, q in zip(ours, theirs)]
        reverse.append((sum(p.exp() * (p - q) for p, q in pairs), [p.exp() * (p - q + 1) for p, q in pairs]))
        forward.append((sum(q.exp() * (q - p) for p, q in pairs), [-q.exp() for _, q in pairs]))
    inputs = {"distribution": DISTRIBUTION, "ref_distribution": REF_DISTRIBUTION}
    return {
        name: {
            "component": name,
            "options": {},
            "inputs": inputs,
            "estimate": [float(value) for value, _ in rows],
            "gradient": [[float(number) for number in gradient] for _, gradient in rows],
        }
        for name, rows in (("full", reverse), ("full_forward", forward))
    }


# The last position of row 0 is masked, and all of row 3; what stands there would overflow.
CURRENT = [[-1.0, -2.0, -0.5, 0.0], [-0.25, -3.0, -1.5, -2.0], [-4.0, -1.0, -2.5, -1.0], [0.0, 0.0, 0.0, 0.0]]
OLD = [[-1.25, -2.0, -0.75, 1e4], [-0.25, -1.0, -1.5, -2.0], [-2.0, -0.99, -2.5, -1.0], [1e4, -1e4, 0.0, 0.0]]
SAMPLING = [[-1.0, -2.5, -0.75, -1e4], [-0.26, -3.5, -1.5, -2.0], [-2.01, -1.0, -2.5, -1.0], [-1e4, 1e4, 0.0, 0.0]]
TARGET = [[-0.75, -2.0, -0.5, -1e4], [-0.5, -2.0, -1.25, -3.0], [-1.0, -0.75, -2.75, -1.0], [-1e4, 1e4, 0.0, 0.0]]
MASK = [[True, True, True, False], [True] * 4, [True] * 4, [False] * 4]
ADVANTAGES = [[-1.0] * 4, [0.5] * 4, [-0.25] * 4, [-2.0] * 4]


def rows_of(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> list[list[float]]:
    """``left - right`` at the real tokens, one list per row."""
    return [[a - b for a, b, real in zip(*row) if real] for row in zip(left, right, MASK)]


def token_weights(
    formula: Callable[[float, list[float]], float],
    left: Sequence[Sequence[float]] = OLD,
    right: Sequence[Sequence[float]] = SAMPLING,
) -> list[list[float]]:
    """``formula(log ratio of the token, log ratios of its row)``; masked positions have log ratio 0."""
    out = []
    for ours, theirs, mask, row in zip(left, right, MASK, rows_of(left, right)):
        out.append([formula(a - b if real else 0.0, row) for a, b, real in zip(ours, theirs, mask)])
    return out


def row_mean(row: Sequence[float]) -> float:
    return math.fsum(row) / len(row) if row else 0.0


def kept(ratio: float, weight: float, low: float, high: float) -> float:
    return weight if low <= ratio <= high else 0.0


def opsm(delta: float) -> list[list[float]]:
    behind = [row_mean(row) for row in rows_of(SAMPLING, CURRENT)]
    return [[float(a >= 0 or behind[i] <= delta) for a in row] for i, row in enumerate(ADVANTAGES)]


def corrections() -> dict[str, dict[str, Any]]:
    """By file name: component, options and expected weights."""
    exp = math.exp
    cases: list[tuple[str, str, dict[str, Any], list[list[float]]]] = [
        ("tis", "tis", {}, token_weights(lambda d, _: min(exp(d), 2.0))),
        ("tis-trl", "tis", {"cap": 3.0}, token_weights(lambda d, _: min(exp(d), 3.0))),
        ("tis_sequence-trl", "tis_sequence", {}, token_weights(lambda _, row: min(exp(sum(row)), 3.0))),
        ("tis_sequence-verl", "tis_sequence", {"cap": 2.0}, token_weights(lambda _, row: min(exp(sum(row)), 2.0))),
        ("tis_two_sided", "tis_two_sided", {}, token_weights(lambda d, _: max(0.5, min(exp(d), 5.0)))),
        ("icepop", "icepop", {}, token_weights(lambda d, _: kept(exp(d), exp(d), 0.5, 5.0))),
        ("icepop-one", "icepop", {"kept": "one"}, token_weights(lambda d, _: kept(exp(d), 1.0, 0.5, 5.0))),
        (
            "icepop-trl",
            "icepop",
            {"low": 0.0, "high": 3.0},
            token_weights(lambda d, _: kept(exp(d), exp(d), 0.0, 3.0)),
        ),
        (
            "sequence_mask-trl",
            "sequence_mask",
            {},
            token_weights(lambda _, row: kept(exp(sum(row)), exp(sum(row)), 0.0, 3.0)),
        ),
        (
            "sequence_mask-verl",
            "sequence_mask",
            {"low": 0.5, "high": 2.0, "kept": "one"},
            token_weights(lambda _, row: kept(exp(sum(row)), 1.0, 0.5, 2.0)),
        ),
        (
            "geometric_mask",
            "geometric_mask",
            {},
            token_weights(lambda d, row: kept(exp(row_mean(row)), exp(d), 0.99, 1.01)),
        ),
        (
            "geometric_mask-verl",
            "geometric_mask",
            {"low": 0.9, "high": 1.1, "kept": "one"},
            token_weights(lambda _, row: kept(exp(row_mean(row)), 1.0, 0.9, 1.1)),
        ),
        ("opsm-trl", "opsm", {}, opsm(0.5)),
        ("opsm-slime", "opsm", {"delta": 1e-4}, opsm(1e-4)),
        ("target_tis", "target_tis", {}, token_weights(lambda d, _: min(exp(d), 2.0), TARGET, OLD)),
        (
            "target_sequence_mask",
            "target_sequence_mask",
            {"target_temperature": 0.9},
            token_weights(lambda _, row: kept(exp(sum(row)), exp(sum(row)), 0.0, 3.0), TARGET, OLD),
        ),
        (
            "target_sequence_mask-one",
            "target_sequence_mask",
            {"low": 0.25, "high": 4.0, "kept": "one"},
            token_weights(lambda _, row: kept(exp(sum(row)), 1.0, 0.25, 4.0), TARGET, OLD),
        ),
    ]
    inputs = {
        "logprobs": CURRENT,
        "old_logprobs": OLD,
        "sampling_logprobs": SAMPLING,
        "target_logprobs": TARGET,
        "advantages": ADVANTAGES,
        "completion_mask": MASK,
    }
    return {
        name: {"component": component, "options": options, "inputs": inputs, "weights": expected}
        for name, component, options, expected in cases
    }


def documents() -> dict[str, dict[str, Any]]:
    """Every golden file: its path without the suffix, and what is in it."""
    return {
        **{f"advantages/{name}": case for name, case in advantages().items()},
        **{f"kl/{name}": case for name, case in (token_estimators() | full_estimators()).items()},
        **{f"corrections/{name}": case for name, case in corrections().items()},
    }


if __name__ == "__main__":
    for path, document in documents().items():
        (HERE / f"{path}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(path)
