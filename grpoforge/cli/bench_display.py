"""What `bench` prints on stdout: tables of what was measured, certified or compiled."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpoforge.cli.plugins_command import PIPE_WIDTH

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from grpoforge_kernels.certify import Certificate, Failure

NONE = "-"


def print_report(report: Mapping[str, Any]) -> None:
    """The machine, a table for each case, and what was not measured."""
    console = _console()
    for line in _head(report):
        console.print(line)
    for case in report["cases"]:
        console.print()
        console.print(case["title"], style="bold", soft_wrap=True)
        console.print(_case_table(case, report))
        for line in (*_promises(case), *_missing(case)):
            console.print(line)
    console.print()
    for line in _foot(report):
        console.print(line)


def _console() -> Console:
    """Standard output; what goes to a file or a pipe is not wrapped."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)


def _plain_table() -> Table:
    from rich.table import Table

    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))


def _add_column(table: Table, title: str) -> None:
    """The first column is a name; all others are numbers."""
    table.add_column(title, justify="right" if table.columns else "left", no_wrap=bool(table.columns))


def _head(report: Mapping[str, Any]) -> list[str]:
    machine, versions, rates = report["machine"], report["versions"], report["rates"]
    gemm = ", ".join(f"{name} {value:,.0f}" for name, value in rates["gemm_gflop_s"].items())
    lines = [
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, load {machine['load']}",
        f"torch {versions['torch']}, commit {report['commit'] or 'unknown'}, {report['date']}",
        f"copy {rates['copy_gb_s']:.1f} GB/s; matrix product GFLOP/s: {gemm}",
    ]
    if machine["gpu"]:
        lines.insert(1, machine["gpu"])
    if report["first_use_compile_s"] is not None:
        lines.append(f"first use compiles the C++ in {report['first_use_compile_s']:.2f} s")
    return [*lines, *_against(report["against"])] if report.get("against") else lines


def _against(against: Mapping[str, Any]) -> list[str]:
    matched = f"{against['num_matched']} of {against['num_timings']} timings were measured then too"
    lines = [f"`x then` is relative to commit {against['commit'] or 'unknown'}, {against['date']}: {matched}"]
    changed = [f"{name} {_option(then)} then, {_option(now)} now" for name, (then, now) in against["options"].items()]
    return [*lines, f"other options then: {'; '.join(changed)}"] if changed else lines


def _option(value: Any) -> str:
    """An option of a plan as it is written on the command line."""
    if isinstance(value, list):
        return ", ".join("x".join(map(str, one)) if isinstance(one, list) else str(one) for one in value) or "default"
    return "default" if value is None else str(value)


def _case_table(case: Mapping[str, Any], report: Mapping[str, Any]) -> Table:
    mallocs, compared = _mallocs(case), bool(report.get("against"))
    table = _plain_table()
    for title in ("", "value", "gradient"):
        _add_column(table, title)
    for malloc in mallocs:
        for title in ("median", "IQR", "x ours", "speed", "share", *(["x then"] if compared else [])):
            _add_column(table, f"{title}\n{malloc}" if len(mallocs) > 1 else title)
    for title in ("memory", "promised"):
        _add_column(table, title)
    for row in case["rows"]:
        if row["note"]:
            continue
        cells = [_name(row, case), _error(row, "value"), _error(row, "gradient")]
        for malloc in mallocs:
            cells += _timing_cells(row["timings"].get(malloc), compared=compared)
        over = " OVER" if row["over_promise"] else ""
        table.add_row(*cells, _megabytes(row["peak_bytes"]) + over, _megabytes(row["formula_bytes"]))
    return table


def _mallocs(case: Mapping[str, Any]) -> list[str]:
    return sorted({malloc for row in case["rows"] for malloc in row["timings"]}, reverse=True) or ["stock"]


def _name(row: Mapping[str, Any], case: Mapping[str, Any]) -> str:
    if not row["ours"]:
        return str(row["name"])
    return f"ours: {row['name']}" + (" *" if row["name"] == case["lead"] else "")


def _error(row: Mapping[str, Any], what: str) -> str:
    error, bound = row[f"{what}_error"], row[f"{what}_bound"]
    shown = "not finite" if error is None else f"{error:.1e}"
    return shown if bound is None or (error is not None and error <= bound) else f"{shown} WRONG"


def _timing_cells(timing: Mapping[str, Any] | None, *, compared: bool) -> list[str]:
    if timing is None:
        return [NONE] * (5 + compared)
    spread = (timing["third_quartile_s"] - timing["first_quartile_s"]) / timing["median_s"]
    cells = [_seconds(timing["median_s"]), f"{100 * spread:.0f}%", _ratio(timing["ratio"]), *_speed(timing)]
    return [*cells, _ratio(timing["against"])] if compared else cells


def _ratio(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}"


def _speed(timing: Mapping[str, Any]) -> tuple[str, str]:
    if timing["gb_s"] is not None:
        return f"{timing['gb_s']:.1f} GB/s", f"{100 * timing['gb_share']:.0f}%"
    return f"{timing['gflop_s']:.0f} GFLOP/s", f"{100 * timing['gflop_share']:.0f}%"


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"


def _megabytes(number: int | None) -> str:
    return NONE if number is None else f"{number / 2**20:.1f} MB"


def _promises(case: Mapping[str, Any]) -> list[str]:
    return [f"promised: ours: {row['name']}: {row['formula']}" for row in case["rows"] if row["formula"]]


def _missing(case: Mapping[str, Any]) -> list[str]:
    return [f"not measured: {row['name']}: {row['note']}" for row in case["rows"] if row["note"]]


def _foot(report: Mapping[str, Any]) -> list[str]:
    lines = ["* what `x ours` is relative to: how many times as long the others take"]
    if report["plan"]["device"] != "cuda":
        why = "run with `--device cuda`" if report["machine"]["gpu"] else "there is no CUDA device here"
        lines.append(f"GPU: not measured ({why})")
    return lines


def print_certification(results: Sequence[Certificate | Failure]) -> None:
    """Worst errors and bounds of each backend, or the check that failed."""
    from grpoforge_kernels.certify import Failure, folder

    console = _console()
    for result in results:
        where = f"{result.identity.backend} on {result.identity.device}, kernels {result.identity.kernels[:12]}"
        if isinstance(result, Failure):
            console.print(f"FAILED: {where}: {result.reason}")
            continue
        console.print(f"certified: {where}: {result.num_checks} checks hold", style="bold", soft_wrap=True)
        table = _plain_table()
        for title in ("", "value", "bound", "gradient", "bound"):
            _add_column(table, title)
        for key, (value, gradient) in result.worst.items():
            value_bound, gradient_bound = result.bounds[key]
            table.add_row(key, *(f"{number:.1e}" for number in (value, value_bound, gradient, gradient_bound)))
        console.print(table)
    console.print(f"certificates  {folder()}")


def print_static(table: Mapping[str, Any]) -> None:
    """Plain forms of every kernel and configuration for every target, all that spills, and what columns leave open."""
    console = _console()
    for name, product in table["targets"].items():
        console.print(f"{name} ({product})", style="bold", soft_wrap=True)
        shown = [one for one in table["kernels"] if not one["form"] or not one["is_sound"]]
        console.print(_static_table([one for one in shown if one["target"] == name]))
        console.print()
    spilling, num_forms = table["num_spilling"], sum(bool(one["form"]) for one in table["kernels"])
    console.print(f"compiled as well, and shown only where they spill: {num_forms} with masks, softcaps, odd sizes ...")
    console.print(f"that spill: {spilling}" + (" (this fails)" if spilling else ""))
    console.print(
        "* the default configuration. GPU times: not measured. The share of the memory bandwidth is a bound from"
    )
    console.print("  the machine code and published clocks: what the kernel cannot exceed, not what it reaches.")


def _static_table(kernels: Sequence[Mapping[str, Any]]) -> Table:
    table = _plain_table()
    for title in ("", "registers", "spills", "shared", "occupancy", "bytes/token", "minimum", "share <=", "limit"):
        _add_column(table, title)
    for one in kernels:
        bound = one["bound"]
        table.add_row(
            _static_name(one),
            str(one["registers"]),
            str(one["spills"]) + ("" if one["is_sound"] else " SPILLS"),
            str(one["shared_bytes"]),
            f"{100 * one['occupancy']:.0f}%",
            _whole(one["bytes_per_token"]),
            _whole(one["minimal_bytes_per_token"]),
            NONE if bound is None else f"{100 * bound['bandwidth']:.0f}%",
            NONE if bound is None else bound["limit"],
        )
    return table


def _static_name(one: Mapping[str, Any]) -> str:
    form = f", {one['form']}" if one["form"] else ""
    return f"{one['kernel']} {one['variant']}{form} {one['configuration']}" + (" *" if one["is_default"] else "")


def _whole(number: float | None) -> str:
    return NONE if number is None else f"{number:,.0f}"
