"""Two models on the same problems: what differs, and whether chance would do as much."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from grpoforge.errors import DataError
from grpoforge.outcomes import Outcome
from grpoforge.statistics import Estimate, estimate, mcnemar

SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One metric of two models."""

    a: float
    b: float
    a_minus_b: Estimate
    """Of the differences problem by problem: what the problems have in common cancels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Model ``a`` against model ``b``; counts are problems by their greedy completions."""

    a: str
    b: str
    both_right: int
    only_a_right: int
    only_b_right: int
    both_wrong: int
    p_value: float
    """Of the exact McNemar test: see `grpoforge.statistics.mcnemar`."""
    differences: Mapping[str, Difference]
    """The headline metrics that both have."""
    verdict: str
    """In words."""


def check_same_problems(known: Sequence[Outcome], problems: Sequence[Mapping[str, object]], source: str) -> None:
    """Refuse to pair outcomes of other problems; question and gold decide, not where a problem stands.

    Args:
        known: what was measured already.
        problems: what `grpoforge.outcomes.describe_problem` says of the problems to pair with them, in their order.
        source: what has the outcomes that do not fit, for the message.

    Raises:
        DataError: not the same problems in the same order.
    """
    hint = "compare on the same problems: the same `--dataset`, `--num-problems` and `data.*`"
    if len(known) != len(problems):
        raise DataError(f"{source} has other problems: {len(known)} on one side, {len(problems)} on the other", hint)
    for number, (outcome, problem) in enumerate(zip(known, problems, strict=True)):
        if outcome.problem != problem["problem"]:
            raise DataError(
                f"{source} has other problems: number {number} is {outcome.origin} on one side and "
                f"{problem['origin']} on the other, with another question or answer",
                hint,
            )


def compare(
    names: tuple[str, str],
    a: Sequence[Outcome],
    b: Sequence[Outcome],
    figures: Callable[[Outcome], Mapping[str, float]],
    seed: int,
) -> Comparison:
    """The comparison of outcomes ``a`` and ``b`` of the same problems in the same order.

    Args:
        names: of the models.
        figures: the headline metrics of one problem.
        seed: fixes the resamples of the intervals.
    """
    greedy = [(one.greedy.is_right, other.greedy.is_right) for one, other in zip(a, b, strict=True)]
    only_a, only_b = greedy.count((True, False)), greedy.count((False, True))
    p_value = mcnemar(only_a, only_b)
    differences = _differences([figures(one) for one in a], [figures(one) for one in b], seed)
    return Comparison(
        a=names[0],
        b=names[1],
        both_right=greedy.count((True, True)),
        only_a_right=only_a,
        only_b_right=only_b,
        both_wrong=greedy.count((False, False)),
        p_value=p_value,
        differences=differences,
        verdict=" ".join([_greedy_verdict(only_a, only_b, p_value), *_sampled_verdict(differences)]),
    )


def _differences(
    a: Sequence[Mapping[str, float]], b: Sequence[Mapping[str, float]], seed: int
) -> dict[str, Difference]:
    found = {}
    for name in (name for name in a[0] if name in b[0]):
        of_a, of_b = [one[name] for one in a], [one[name] for one in b]
        gaps = [one - other for one, other in zip(of_a, of_b, strict=True)]
        found[name] = Difference(
            a=sum(of_a) / len(of_a),
            b=sum(of_b) / len(of_b),
            a_minus_b=estimate(gaps, seed=seed, bounds=(-1.0, 1.0)),
        )
    return found


def _greedy_verdict(only_a: int, only_b: int, p_value: float) -> str:
    if only_a == only_b == 0:
        return "Greedy, A and B are right on the same problems."
    begins = f"Greedy, A alone is right on {only_a} and B alone on {only_b}"
    if p_value >= SIGNIFICANT:
        return f"{begins}: chance alone does as much (p = {p_value:.2g}), so neither is shown to be better."
    return f"{begins}: {'A' if only_a > only_b else 'B'} is better, by more than chance explains (p = {p_value:.2g})."


def _sampled_verdict(differences: Mapping[str, Difference]) -> list[str]:
    """A sentence on mean@K, where both have it."""
    gap = next((one.a_minus_b for name, one in differences.items() if name.startswith("eval_mean@")), None)
    if gap is None:
        return []
    interval = f"{100 * gap.value:+.1f} points [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"
    if gap.low <= 0 <= gap.high:
        return [f"Sampled, A is ahead by {interval}: no difference is shown."]
    return [f"Sampled, A is ahead by {interval}: {'A' if gap.value > 0 else 'B'} is better."]
