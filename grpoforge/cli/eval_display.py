"""What `eval` prints on stdout: figures with their uncertainty, what went wrong, and the comparison of two models."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from typing import TYPE_CHECKING, Any

from grpoforge.cli.tables import count_of, make_console, make_table
from grpoforge.sanitize import one_line

if TYPE_CHECKING:
    from rich.table import Table

    from grpoforge.comparison import Comparison
    from grpoforge.measure import Measurement
    from grpoforge.statistics import Estimate


def print_evaluation(measured: Measurement, *, as_json: bool) -> None:
    """What was measured, as tables or as JSON; problem by problem it is in a file of its own."""
    if as_json:
        whole = dataclasses.asdict(dataclasses.replace(measured, outcomes=()))
        del whole["outcomes"]
        sys.stdout.write(json.dumps(_finite(whole), indent=2, allow_nan=False) + "\n")
        return
    console = make_console()
    console.print(_figures(measured))
    if measured.comparison is not None:
        for letter in ("a", "b"):
            console.print(f"{letter.upper()}  {one_line(getattr(measured.comparison, letter), max_chars=400)}")
        console.print(_contingency(measured.comparison))
        console.print(_differences(measured.comparison))
        console.print(measured.comparison.verdict)


def _finite(value: Any) -> Any:
    """``value`` with null for what is not a number: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figures(measured: Measurement) -> Table:
    table = make_table(one_line(f"{measured.model} on {measured.dataset}", max_chars=200))
    table.show_header = False
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("problems", str(measured.num_problems))
    table.add_row("right is what gets 1 from", one_line(measured.correctness, max_chars=200))
    if measured.max_completion_length is not None:
        table.add_row("longest completion", count_of(measured.max_completion_length, "token"))
    if measured.samples:
        temperatures = " and ".join(f"{one:g}" for one in measured.temperatures)
        table.add_row("sampled", f"{measured.samples} per problem, temperature {temperatures}")
    table.add_row("seed", str(measured.seed), end_section=True)
    for name, one in measured.intervals.items():
        table.add_row(name, _with_interval(one))
    table.add_section()
    for name, value in measured.metrics.items():
        if name not in measured.intervals:
            table.add_row(name, f"{value:.4f}")
    for kind, counts in measured.counts.items():
        table.add_section()
        total = sum(counts.values())
        for verdict, number in counts.items():
            table.add_row(f"{kind}: {verdict}", f"{number} of {total}")
    table.caption = "value [95% interval] standard error, over problems"
    return table


def _with_interval(one: Estimate) -> str:
    """``0.5254 [0.4824, 0.5684] 0.0221``; a single problem has no standard error."""
    error = "-" if math.isnan(one.standard_error) else f"{one.standard_error:.4f}"
    return f"{one.value:.4f} [{one.low:.4f}, {one.high:.4f}] {error}"


def _contingency(comparison: Comparison) -> Table:
    table = make_table("Greedy, in problems")
    for title in ("", "B right", "B wrong"):
        table.add_column(title, justify="right" if title else "left")
    table.add_row("A right", str(comparison.both_right), str(comparison.only_a_right))
    table.add_row("A wrong", str(comparison.only_b_right), str(comparison.both_wrong))
    table.caption = f"exact McNemar test: p = {comparison.p_value:.3g}"
    return table


def _differences(comparison: Comparison) -> Table:
    table = make_table("A against B, problem by problem")
    for title in ("", "A", "B", "A - B"):
        table.add_column(title, justify="right" if title else "left")
    for name, one in comparison.differences.items():
        gap = one.a_minus_b
        shown = f"{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
        table.add_row(name, f"{one.a:.4f}", f"{one.b:.4f}", shown)
    return table
