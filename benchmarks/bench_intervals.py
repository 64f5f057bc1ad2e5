"""How often does a 95% interval cover the truth? Simulated evaluations of models whose accuracy is known.

    python benchmarks/bench_intervals.py [--trials 1000] [--json FILE] [--guide docs/guides/evaluation.md]

`percentile` is `grpoforge.statistics.estimate`, what `grpoforge eval` reports. `BCa` (Efron 1987) and `normal` (1.96
standard errors) stand beside it for comparison. Simulations in which every problem has the same value are counted too:
BCa and normal are then the single point that a bootstrap sees.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy

from grpoforge.seeds import mix
from grpoforge.statistics import estimate, standard_error

NORMAL = NormalDist()
SIZES = (30, 100, 500)
CASES: dict[str, tuple[Callable[[Any, int], Any], float]] = {
    "right with chance 0.5": (lambda random, n: random.random(n) < 0.5, 0.5),
    "right with chance 0.9": (lambda random, n: random.random(n) < 0.9, 0.9),
    "right with chance 0.97": (lambda random, n: random.random(n) < 0.97, 0.97),
    "mean of 8 samples, most problems hard": (lambda random, n: random.binomial(8, random.beta(0.3, 3, n)) / 8, 1 / 11),
    "mean of 8 samples, most problems easy": (lambda random, n: random.binomial(8, random.beta(2, 1, n)) / 8, 2 / 3),
}


def percentile(values: list[float], seed: int) -> tuple[float, float]:
    """What the program reports."""
    found = estimate(values, seed=seed)
    return found.low, found.high


def bca(values: list[float], seed: int) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap of the mean, 2,000 resamples."""
    sample = numpy.asarray(values)
    mean, gaps = sample.mean(), sample - sample.mean()
    if not gaps.any():
        return float(mean), float(mean)
    random = numpy.random.default_rng(seed)
    means = sample[random.integers(len(sample), size=(2000, len(sample)))].mean(axis=1)
    below = ((means < mean).mean() + (means <= mean).mean()) / 2
    bias = NORMAL.inv_cdf(min(max(float(below), 1e-6), 1 - 1e-6))
    acceleration = float((gaps**3).sum() / (6 * (gaps**2).sum() ** 1.5))
    ends = [bias + NORMAL.inv_cdf(end) for end in (0.025, 0.975)]
    low, high = numpy.quantile(means, [NORMAL.cdf(bias + end / (1 - acceleration * end)) for end in ends])
    return float(low), float(high)


def normal(values: list[float], seed: int) -> tuple[float, float]:
    """The mean and 1.96 standard errors to both sides."""
    mean, error = sum(values) / len(values), standard_error(values)
    return mean - 1.96 * error, mean + 1.96 * error


METHODS = (percentile, bca, normal)


def coverage(case: str, size: int, trials: int) -> dict[str, float]:
    """Percent of ``trials`` simulations of ``size`` problems in which each interval holds the truth."""
    draw, truth = CASES[case]
    random = numpy.random.default_rng(mix(1, size))
    hits = dict.fromkeys((method.__name__ for method in METHODS), 0)
    for trial in range(trials):
        values = draw(random, size).astype(float).tolist()
        for method in METHODS:
            low, high = method(values, trial)
            hits[method.__name__] += low - 1e-12 <= truth <= high + 1e-12
    return {name: round(100 * count / trials, 1) for name, count in hits.items()}


def table(figures: list[dict[str, Any]], date: str, trials: int) -> str:
    """The figures as Markdown."""
    lines = ["| simulated | problems | percentile (reported) | BCa | normal |", "|---|---|---|---|---|"]
    lines += [
        f"| {one['case']} | {one['problems']} | {one['percentile']:.1f}% | {one['bca']:.1f}% | {one['normal']:.1f}% |"
        for one in figures
    ]
    return "\n".join([*lines, "", f"({date}, {trials:,} simulations each.)"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--guide", type=Path, help="also write the table into this page")
    arguments = parser.parse_args()
    date = datetime.date.today().isoformat()
    figures: list[dict[str, Any]] = []
    for case in CASES:
        for size in SIZES:
            figures.append({"case": case, "problems": size} | coverage(case, size, arguments.trials))
            print(figures[-1], flush=True)
    if arguments.json:
        machine = {"date": date, "numpy": numpy.__version__, "python": platform.python_version()}
        whole = {"machine": machine, "trials": arguments.trials, "coverage": figures}
        arguments.json.write_text(json.dumps(whole, indent=2) + "\n")
    if arguments.guide:
        text = arguments.guide.read_text(encoding="utf-8")
        begin, end = "<!-- bench: intervals -->", "<!-- end of intervals -->"
        shown = f"{begin}\n\n{table(figures, date, arguments.trials)}\n\n{end}"
        arguments.guide.write_text(re.sub(f"{begin}.*{end}", lambda _: shown, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
