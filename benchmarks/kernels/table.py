"""The newest reports in `benchmarks/results/` as the Markdown tables of `docs/guides/bench.md`.

    python benchmarks/kernels/table.py            # print them
    python benchmarks/kernels/table.py --write    # put them into the page, each under its mark

A mark is a line `<!-- table: NAME -->`, NAME being what a report is called before its date. What stands between it and
`<!-- end -->` is written by this script alone.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grpoforge_kernels.bench.plan import VARIANTS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "guides" / "bench.md"
MARKED = re.compile(r"(?<=<!-- table: )([\w-]+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)
NONE = "-"
PUBLISHED = ("selective_log_softmax", "linear-at-full-size", "grpo_loss")


def newest(name: str) -> Path:
    """The report of that name with the latest date."""
    return max(RESULTS.glob(f"{name}-[0-9]*.json"))


def text(name: str) -> str:
    """The tables of the newest report, and what, where and when was measured."""
    path = newest(name)
    report = json.loads(path.read_text(encoding="utf-8"))
    tables = _cases(report) if "cases" in report else _at_full_size(report)
    return "\n" + "\n\n".join([*tables, _source(report, path)]) + "\n\n"


def _cases(report: Mapping[str, Any]) -> Iterator[str]:
    """A table for each case of a report of `grpoforge bench`."""
    for case in report["cases"]:
        rows = [row for row in case["rows"] if row["timings"]]
        mallocs = sorted({malloc for row in rows for malloc in row["timings"]}, reverse=True)
        titles = [title for malloc in mallocs for title in (malloc, "x ours")]
        lines = [[f"`{case['op']}` {case['dtype']} {case['shape']}", "value", "gradient", *titles, "memory"]]
        for row in rows:
            errors = [_error(row[f"{what}_error"]) for what in ("value", "gradient")]
            times = [cell for malloc in mallocs for cell in _time(row["timings"].get(malloc))]
            lines.append([_name(row, case), *errors, *times, _mebibytes(row["peak_bytes"])])
        yield _table(lines)


def _at_full_size(report: Mapping[str, Any]) -> Iterator[str]:
    """One table with a column of seconds and one of memory for each format."""
    shape = "x".join(map(str, report["shape"]))
    titles = [title for dtype in report["dtypes"] for title in (dtype, "x ours", "memory")]
    lines = [[f"`linear_logprobs` {shape}", *titles]]
    ours = "cpp, vocabulary chunks"
    for name in next(iter(report["dtypes"].values())):
        found = [rows[name] | {"ours": rows[ours]} for rows in report["dtypes"].values()]
        cells = [
            cell
            for row in found
            for cell in (
                _milliseconds(row["median_s"]),
                f"{row['median_s'] / row['ours']['median_s']:.2f}",
                _mebibytes(row["peak_bytes"]),
            )
        ]
        lines.append([("ours: " if name.startswith("cpp") else "") + name + (" *" if name == ours else ""), *cells])
    yield _table(lines)
    if "variants" in report:
        yield _table(list(_savings(report["variants"])))


def _savings(variants: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """What each variant saves: the time of the first way, and that of the second as a multiple of it."""
    yield ["vocabulary chunks", *(title for dtype in variants for title in (dtype, "instead of"))]
    for variant in next(iter(variants.values())):
        cells = []
        for rows in (one[variant] for one in variants.values()):
            saving, other = (row["median_s"] for row in rows.values())
            cells += [_milliseconds(saving), f"{_milliseconds(other)}: {other / saving:.2f}"]
        yield [VARIANTS["linear_logprobs"][variant], *cells]


def _name(row: Mapping[str, Any], case: Mapping[str, Any]) -> str:
    return ("ours: " if row["ours"] else "") + row["name"] + (" *" if row["name"] == case["lead"] else "")


def _time(timing: Mapping[str, Any] | None) -> tuple[str, str]:
    return (NONE, NONE) if timing is None else (_milliseconds(timing["median_s"]), f"{timing['ratio']:.2f}")


def _error(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"


def _milliseconds(seconds: float) -> str:
    number = 1e3 * seconds
    return f"{number:,.0f} ms" if number >= 100 else f"{number:.3g} ms"


def _mebibytes(number: int | None) -> str:
    if number is None:
        return NONE
    return f"{number / 2**20:,.0f} MiB" if number >= 10 * 2**20 else f"{number / 2**20:.1f} MiB"


def _table(lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def _source(report: Mapping[str, Any], path: Path) -> str:
    machine, versions = report.get("machine"), report.get("versions")
    where = (
        f"{machine['cpu']}, {machine['threads']} threads, torch {versions['torch']}, " if machine and versions else ""
    )
    command = f"`{report['command']}`, " if report.get("command") else ""
    return f"{command}{where}{report['date'][:10]}; the report is `benchmarks/results/{path.name}`."


def written(page: str) -> str:
    """The page with every marked table as the newest report has it."""
    return MARKED.sub(lambda mark: f"{mark[1]}{mark[2]}{text(mark[1])}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    if parser.parse_args().write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("".join(text(name) for name in PUBLISHED))


if __name__ == "__main__":
    main()
