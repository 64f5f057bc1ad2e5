"""What `lab` prints on stdout: tables of figures, with bars and small curves beside them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grpoforge.cli.plugins_command import PIPE_WIDTH
from grpoforge.sanitize import one_line

if TYPE_CHECKING:
    from rich.console import Console

    from grpoforge.lab import LabReport
    from grpoforge.lab.moments import Estimate

NONE = "-"
BAR_CELLS = 8
BAR = " ▏▎▍▌▋▊▉█"
CURVE = "▁▂▃▄▅▆▇█"
PLAIN_BAR, PLAIN_CURVE = " #", "_.-="
OF, CURVE_OVER = "gradient\nof", "over p = "
"""Titles of columns that are not numbers."""
SHOWN_DIFFICULTIES = (0.1, 0.5, 0.9)


def print_report(report: LabReport) -> None:
    """A section for each kind that was measured, and what failed."""
    console = _console()
    plain = not _can_draw()
    sections = [section for section in (_kl, _advantages, _losses) if section(console, report, plain)]
    if report.failed:
        if sections:
            console.print()
        rows = [
            [one.kind, one.id, one_line(one.reason, max_chars=400), one_line(one.source, max_chars=400)]
            for one in report.failed
        ]
        _table(console, ("failed", "component", "reason", "source"), rows, num_names=4)


def _kl(console: Console, report: LabReport, plain: bool) -> bool:
    from grpoforge.lab.kl import setting

    if not report.kl:
        return False
    exact = setting(1, on_policy=True).reverse
    for title, case in (("on-policy", "on_policy"), ("off-policy", "off_policy")):
        console.print(f"KL estimators, one token, {title}; KL(policy || reference) is {exact:.4f}", style="bold")
        rows = []
        for row in report.kl:
            one = getattr(row, case)
            bar = _bar(one.from_reverse, 2.0, plain)
            figures = (_signed(one.bias), _number(one.variance), one.gradient, _number(one.from_reverse), bar)
            rows.append([row.name, *figures, _number(one.from_forward), _number(one.gradient_variance)])
        header = ("", "bias", "variance", OF, "from\nreverse", "", "from\nforward", "gradient\nvariance")
        _table(console, header, rows)
        console.print()
    _two_tokens(console, report)
    return True


def _two_tokens(console: Console, report: LabReport) -> None:
    console.print("KL estimators, two tokens, on-policy: in the loss and in the reward", style="bold")
    header = ("", *(f"{place}\n{title}" for place in ("loss", "reward") for title in ("bias", "cosine", "noise")))
    rows = [[row.name, *_three(row.in_loss), *_three(row.in_reward)] for row in report.kl]
    _table(console, header, rows)


def _three(one: Estimate | None) -> list[str]:
    return [NONE] * 3 if one is None else [_number(one.bias), _cosine(one), _number(one.noise)]


def _advantages(console: Console, report: LabReport, plain: bool) -> bool:
    from grpoforge.lab.advantages import CURVE_GROUP, DIFFICULTIES, EXACT_GROUPS

    if not report.advantage:
        return False
    if report.kl:
        console.print()
    for size in report.advantage[0].groups:
        how = "enumerated" if size in EXACT_GROUPS else f"{report.samples} batches sampled, seed {report.seed}"
        console.print(f"Advantages, two prompts, groups of {size}; {how}", style="bold")
        rows = [[row.name, *_estimate(row.groups[size], plain)] for row in report.advantage]
        _table(console, ("", "cosine", "", "scale", "bias", "noise", "error"), rows)
        console.print()
    console.print(f"Advantages: weight of a prompt by its success rate p, groups of {CURVE_GROUP}", style="bold")
    shown = [DIFFICULTIES.index(p) for p in SHOWN_DIFFICULTIES]
    rows = []
    for row in report.advantage:
        curve = row.weight_by_difficulty
        rows.append([row.name, _curve(curve, plain), *(_number(curve[index]) for index in shown)])
    titles = [f"p = {p}" for p in SHOWN_DIFFICULTIES]
    _table(console, ("", f"{CURVE_OVER}{DIFFICULTIES[0]} to {DIFFICULTIES[-1]}", *titles), rows)
    return True


def _losses(console: Console, report: LabReport, plain: bool) -> bool:
    from grpoforge.lab.losses import GAPS, at_gap

    if not report.loss:
        return False
    if report.kl or report.advantage:
        console.print()
    for number, gap in enumerate(GAPS):
        where = "ratio 1" if not gap else f"log-ratios of {gap:g}, KL {at_gap(gap).divergence:.3f}"
        console.print(f"Losses, three tokens, at {where}", style="bold")
        rows = [["(exact ratio)", *_estimate(report.exact_ratio[number], plain)]]
        rows += [[row.name, *_estimate(row.gaps[number], plain)] for row in report.loss]
        _table(console, ("", "cosine", "", "scale", "bias", "noise", "error"), rows)
        console.print()
    console.print("Losses: furthest from -A at ratio 1, then cosines over the gaps", style="bold")
    rows = [
        [row.name, _number(row.at_ratio_1), _curve([one.cosine or 0.0 for one in row.gaps], plain, top=1.0)]
        for row in report.loss
    ]
    _table(console, ("", "from -A", ", ".join(f"{gap:g}" for gap in GAPS)), rows)
    return True


def _estimate(one: Estimate | None, plain: bool) -> list[str]:
    """Cosine with a bar, scale, bias, noise, error; dashes where the group is too small for it."""
    if one is None:
        return [NONE, "", NONE, NONE, NONE, NONE]
    error = "exact" if one.error is None else f"±{100 * one.error:.1f}%"
    bar = _bar(one.cosine or 0.0, 1.0, plain)
    return [_cosine(one), bar, _number(one.scale), _number(one.bias), _number(one.noise), error]


def _cosine(one: Estimate) -> str:
    return NONE if one.cosine is None else f"{one.cosine:.3f}"


def _number(value: float | None) -> str:
    """Three digits; 0 for what is rounding."""
    if value is None:
        return NONE
    return "0" if abs(value) < 1e-12 else f"{value:.3g}"


def _signed(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:+.4f}"


def _bar(value: float, top: float, plain: bool) -> str:
    """``value`` between 0 and ``top`` as a bar of `BAR_CELLS`."""
    marks = PLAIN_BAR if plain else BAR
    steps = len(marks) - 1
    filled = round(min(max(value / top, 0.0), 1.0) * BAR_CELLS * steps)
    whole, part = divmod(filled, steps)
    return (marks[-1] * whole + (marks[part] if part else "")).ljust(BAR_CELLS)


def _curve(values: Sequence[float], plain: bool, *, top: float | None = None) -> str:
    """``values`` from 0 to the largest (or ``top``) as one character each."""
    marks = PLAIN_CURVE if plain else CURVE
    highest = top or max((*values, 1e-300))
    return "".join(marks[min(int(max(value / highest, 0.0) * len(marks)), len(marks) - 1)] for value in values)


def _can_draw() -> bool:
    try:
        (BAR + CURVE).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _console() -> Console:
    """Standard output; what goes to a file or a pipe is not wrapped."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)


def _table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]], *, num_names: int = 1) -> None:
    """The first columns are names, and so are those without a number; all others are numbers."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, title in enumerate(header):
        is_text = number < num_names or title in ("", OF) or title.startswith(CURVE_OVER)
        table.add_column(title, justify="left" if is_text else "right", no_wrap=num_names == 1)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
