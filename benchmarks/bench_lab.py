"""The tables of docs/guides/lab.md, from the command line itself: `python benchmarks/bench_lab.py [--check]`.

Runs ``grpoforge lab`` over the components that come with the package and writes its figures between the markers of the
guide, its plot beside it, and all figures to benchmarks/results/lab.json. The figures are exact, or sampled from a
fixed seed: they do not depend on the machine. ``--check`` writes nothing and ends with 1 when the guide's tables are
not those of the code.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs/guides/lab.md"
PLOT = ROOT / "docs/guides/lab.svg"
FIGURES = ROOT / "benchmarks/results/lab.json"

Row = dict[str, Any]


def measure(*flags: str) -> Row:
    """What `grpoforge lab` writes as JSON; a component that fails ends the program."""
    command = [sys.executable, "-m", "grpoforge", "lab", "--json", "-", *flags]
    found: Row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is code."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(f"| {row[0]} | {' | '.join(row[1:])} |" for row in rows)])


def number(value: float | None, digits: int = 2) -> str:
    """``value`` with so many decimals; - for none."""
    if value is None:
        return "-"
    # Neither the last bit, which differs between machines, nor the sign of a zero is a figure.
    return f"{0.0 if abs(value) < 0.5 * 10**-digits else round(value, 9):.{digits}f}"


def kl_tables(report: Row) -> str:
    rows = report["kl"]["rows"]
    titles = ("bias", "std", "gradient of", "gradient variance")
    one_token = table(
        ("", *titles, *(f"{title}, off" for title in titles)),
        ([f"`{row['name']}`", *one_case(row, "on_policy"), *one_case(row, "off_policy")] for row in rows),
    )
    header = ("", "in loss: distance", "cosine", "noise", "in reward: distance", "cosine", "noise")
    two_tokens = table(header, ([f"`{row['name']}`", *three(row["in_loss"]), *three(row["in_reward"])] for row in rows))
    return f"{one_token}\n\nCompletions of two tokens:\n\n{two_tokens}"


def one_case(row: Row, case: str) -> list[str]:
    one = row[case]
    is_exact = abs(one["bias"]) < 1e-10
    bias = "0" if is_exact else f"{one['bias']:+.3f}"
    return [bias, number(one["variance"] ** 0.5), one["gradient"], number(one["gradient_variance"])]


def three(one: Row | None) -> list[str]:
    if one is None:
        return ["-"] * 3
    return [number(one["bias"]), number(one["cosine"]), number(one["noise"], 1)]


def advantage_tables(report: Row) -> str:
    section = report["advantage"]
    header = ["", *(f"G = {size}: cosine | scale | noise" for size in section["rows"][0]["groups"])]
    header = " | ".join(header).split(" | ")
    groups = table(
        header,
        (
            [f"`{row['name']}`", *(cell for one in row["groups"].values() for cell in four(one))]
            for row in section["rows"]
        ),
    )
    places = [section["difficulties"].index(p) for p in (0.1, 0.3, 0.5, 0.7, 0.9)]
    header = ["", *(f"p = {section['difficulties'][index]}" for index in places)]
    curves = table(
        header,
        ([f"`{row['name']}`", *(number(row["weight_by_difficulty"][i]) for i in places)] for row in section["rows"]),
    )
    errors = [row["groups"]["8"]["error"] for row in section["rows"]]
    sampled = f"(Groups of 8 are sampled, {report['samples']} batches: standard errors of {100 * min(errors):.1f}% to "
    return f"{groups}\n\n{sampled}{100 * max(errors):.1f}% of the gradient.)\n\nThe weight of a prompt:\n\n{curves}"


def four(one: Row | None) -> list[str]:
    return ["-"] * 3 if one is None else [number(one["cosine"]), number(one["scale"]), number(one["noise"], 1)]


def loss_table(report: Row) -> str:
    section = report["loss"]
    header = [
        "",
        *(f"gap {gap:g}: cosine | scale | noise" for gap in section["gaps"][1:]),
        "noise at ratio 1",
        "from -A",
    ]
    header = " | ".join(header).split(" | ")
    reference = {"name": "", "gaps": section["exact_ratio"], "at_ratio_1": None}
    rows = []
    for row in (reference, *section["rows"]):
        cells = [cell for one in row["gaps"][1:] for cell in four(one)]
        name = f"`{row['name']}`" if row["name"] else "exact ratio"
        rows.append([name, *cells, number(row["gaps"][0]["noise"], 1), number(row["at_ratio_1"])])
    divergences = ", ".join(f"{value:.3f}" for value in section["divergences"][1:])
    return f"{table(header, rows)}\n\n(KL(old || policy) at these gaps: {divergences} nats.)"


TABLES = {"kl": kl_tables, "advantage": advantage_tables, "loss": loss_table}


def filled(text: str, report: Row) -> str:
    """The guide with the tables of ``report`` between its markers."""
    for kind, write in TABLES.items():
        start, end = f"<!-- lab: {kind} -->", f"<!-- end of {kind} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n\n{write(report)}\n\n{end}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 when the guide is out of date")
    check = parser.parse_args().check
    report = measure(*([] if check else ["--plot", str(PLOT)]))
    guide = GUIDE.read_text(encoding="utf-8")
    wanted = filled(guide, report)
    if check:
        print("up to date" if guide == wanted else f"out of date: run python {Path(__file__).relative_to(ROOT)}")
        return int(guide != wanted)
    GUIDE.write_text(wanted, encoding="utf-8")
    FIGURES.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {GUIDE.relative_to(ROOT)}, {PLOT.relative_to(ROOT)}, {FIGURES.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
