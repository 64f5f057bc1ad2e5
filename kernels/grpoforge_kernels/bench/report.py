"""From a plan to a report: every contender of every case, right or wrong, its time, its memory.

A report is a dictionary of JSON values:

    schema, date, commit, command, machine, versions, plan, malloc
    rates       copy_gb_s, and gemm_gflop_s by number format
    first_use_compile_s
    cases       op, device, dtype, shape, variant, title, lead, rows
    rows        name, ours, note, value_error, gradient_error, value_bound, gradient_bound, worse_than_plain, correct,
                timings by allocator (median_s, first_quartile_s, third_quartile_s, rounds, ratio, gb_s, gb_share,
                gflop_s, gflop_share), peak_bytes, formula, formula_bytes, over_promise

What was not measured is null, and ``note`` says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from grpoforge_kernels.bench import child, lineup, problems, tuning
from grpoforge_kernels.bench.accuracy import BOUNDS, TIMES_PLAIN, Bound, Errors, errors
from grpoforge_kernels.bench.contenders import PLAIN_TORCH, Contender
from grpoforge_kernels.bench.forcing import force, restored
from grpoforge_kernels.bench.machine import commit, machine, today, versions
from grpoforge_kernels.bench.measure import Runner, Timing, clock_of, copy_rate, gemm_rate, interleave
from grpoforge_kernels.bench.plan import SECONDS_PER_CONTENDER, Case, Plan
from grpoforge_kernels.bench.problems import LinearProblem, Problem, RowsProblem

SCHEMA = 1
Say = Callable[[str], None]
Report = dict[str, Any]


def measure(plan: Plan, *, command: str = "", say: Say = lambda text: None) -> Report:
    """The report of ``plan``. ``say`` is told what is being measured.

    Raises:
        KernelError: a shape that fits no operation, a backend that cannot run, a process that did not survive.
    """
    plan.cases()
    if plan.malloc == "reuse":
        report = child.measure_with_reuse(replace(plan, malloc="reuse"))
    else:
        report = measure_here(replace(plan, malloc="stock"), say=say)
    if plan.malloc == "both":
        say("once more, with an allocator that keeps freed memory")
        _add_timings(report, child.measure_with_reuse(replace(plan, malloc="reuse", memory=False)))
    return {**report, "command": command, "malloc": plan.malloc}


def measure_here(plan: Plan, *, say: Say = lambda text: None) -> Report:
    """`measure` in this process, with the allocator that it has; timings stand under ``plan.malloc``."""
    head = {"schema": SCHEMA, "date": today(), "commit": commit(), "machine": machine(), "versions": versions()}
    say("rates of this machine")
    rates = {
        "copy_gb_s": copy_rate(plan.device) / 1e9,
        "gemm_gflop_s": {
            name: gemm_rate(plan.device, problems.TORCH_DTYPES[name]) / 1e9 for name in sorted({*plan.dtypes, "fp32"})
        },
    }
    compile_s = child.measure_build(plan) if plan.device == "cpu" and plan.malloc == "stock" else None
    cases = []
    for case in plan.cases():
        say(case.title)
        cases.append(_measure_case(case, plan, rates))
    return {**head, "plan": plan.to_json(), "rates": rates, "first_use_compile_s": compile_s, "cases": cases}


def correct(report: Report) -> bool:
    """Whether every own contender of ``report`` is within its bounds, not worse than plain torch, and as small as it
    promises."""
    return not failures(report)


def failures(report: Report) -> list[str]:
    """A line for every own contender that is not `correct`: wrong, or larger than it promises."""
    return [*_wrong(report), *_larger_than_promised(report)]


def _larger_than_promised(report: Report) -> list[str]:
    return [
        f"{case['title']}: {row['name']}: {row['peak_bytes'] / 2**20:.1f} MB at the peak, {row['formula']} promises"
        f" {row['formula_bytes'] / 2**20:.1f} MB"
        for case in report["cases"]
        for row in case["rows"]
        if row["over_promise"]
    ]


def _wrong(report: Report) -> list[str]:
    return [
        f"{case['title']}: {row['name']}: error of value {_shown(row['value_error'])} (bound"
        f" {row['value_bound']:.1e}), of gradient {_shown(row['gradient_error'])} (bound {row['gradient_bound']:.1e})"
        f"{_beside_plain(case) if row['worse_than_plain'] else ''}"
        for case in report["cases"]
        for row in case["rows"]
        if row["correct"] is False
    ]


def _beside_plain(case: Mapping[str, Any]) -> str:
    plain = next(row for row in case["rows"] if row["name"] == PLAIN_TORCH)
    errors_of_it = f"{_shown(plain['value_error'])} and {_shown(plain['gradient_error'])}"
    return f", more than {TIMES_PLAIN:g} times those of {PLAIN_TORCH}, {errors_of_it}"


def compare(report: Report, earlier: Report) -> None:
    """Write into every timing of ``report`` its ``against``: its median over that of the same row in ``earlier``.

    Null where the earlier report has no such row. ``report["against"]`` says how many timings have one, and which
    options of the two plans differ, as ``[then, now]``.
    """
    before, now = dict(_timings(earlier)), _timings(report)
    for key, timing in now:
        then = before.get(key)
        timing["against"] = timing["median_s"] / then["median_s"] if then else None
    report["against"] = {
        **{name: earlier.get(name) for name in ("date", "commit", "command")},
        "num_timings": len(now),
        "num_matched": sum(key in before for key, _ in now),
        "options": _differences(_options(earlier), _options(report)),
    }


def _options(report: Report) -> dict[str, Any]:
    """What was asked for, and what it was measured on as far as it is chosen too."""
    return {**report["plan"], "malloc": report["malloc"], "threads": report["machine"]["threads"]}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [then.get(name), now[name]] for name in now if then.get(name) != now[name]}


def _timings(report: Report) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    return [
        ((*(case[name] for name in ("op", "device", "dtype", "shape", "variant")), row["name"], malloc), timing)
        for case in report["cases"]
        for row in case["rows"]
        for malloc, timing in row["timings"].items()
    ]


def _add_timings(report: Report, other: Report) -> None:
    found = dict(_timings(other))
    for case in report["cases"]:
        for row in case["rows"]:
            names = (*(case[name] for name in ("op", "device", "dtype", "shape", "variant")), row["name"])
            if (*names, "reuse") in found:
                row["timings"]["reuse"] = found[(*names, "reuse")]


def _measure_case(case: Case, plan: Plan, rates: Mapping[str, Any]) -> dict[str, Any]:
    problem = problems.build(case)
    if case.device == "cuda" and isinstance(problem, RowsProblem):
        tuning.tune(problem)
    rows, runners = _check(case, plan, problem)
    with restored():
        timings = interleave(
            runners, rounds=plan.num_rounds, limit=SECONDS_PER_CONTENDER[plan.effort], clock=clock_of(case.device)
        )
    lead = next((row["name"] for row in rows if row["ours"] and row["name"] in timings), None)
    for row in rows:
        if row["name"] in timings:
            row["timings"][plan.malloc] = _timing_values(
                timings[row["name"]], timings.get(lead or ""), problem, rates, case.dtype
            )
    del problem, runners
    if plan.memory and plan.effort != "quick":
        peaks = child.measure_memory(plan, case, list(timings))
        for row in rows:
            row["peak_bytes"] = peaks.get(row["name"])
            row["over_promise"] = _is_over_promise(row)
    return {
        "op": case.op,
        "device": case.device,
        "dtype": case.dtype,
        "shape": case.shape_text,
        "variant": case.variant,
        "title": case.title,
        "lead": lead,
        "rows": rows,
    }


def _ready(problem: Problem, backend: str) -> Callable[[], None]:
    """What comes before a timed run: the inputs anew, and the backend forced, which takes a while in ``os.environ``."""

    def ready() -> None:
        force(backend)
        problem.refill()

    return ready


def _check(case: Case, plan: Plan, problem: Problem) -> tuple[list[dict[str, Any]], dict[str, Runner]]:
    """A row for every contender with its errors, and those that are to be timed, ready.

    One of ours is wrong when an error is above its bound in `accuracy.BOUNDS`. It is wrong as well when its error is
    above twice that of plain torch in the same format (of the log-probs or the loss, which both compute, and of the
    gradient) and above `accuracy.floor`, a few rounding steps. Where plain torch did not run, the bounds alone decide.
    """
    exact = problems.exact(problem)
    rows, runners, found = [], {}, {}
    for contender in lineup.contenders(case, plan):
        row = _row(contender)
        rows.append(row)
        row["note"] = contender.unable(case) or lineup.left_out(contender, plan)
        if row["note"]:
            continue
        try:
            step = contender.start(problem)
            problem.refill()
            found[contender.name] = errors(step(), exact)
        except Exception as error:
            if contender.ours:
                raise
            row["note"] = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            continue
        runners[contender.name] = Runner(step, _ready(problem, contender.backend))
    bound = BOUNDS[case.op, case.dtype]
    for row in rows:
        if row["name"] in found:
            _judge(row, found[row["name"]], bound, found.get(PLAIN_TORCH), case.dtype)
    # What is wrong is not timed.
    right = [row["name"] for row in rows if row["correct"] is not False]
    return rows, {name: runner for name, runner in runners.items() if name in right}


def _row(contender: Contender) -> dict[str, Any]:
    unknown = (
        "value_error",
        "gradient_error",
        "value_bound",
        "gradient_bound",
        "worse_than_plain",
        "correct",
        "peak_bytes",
        "over_promise",
    )
    return {
        "name": contender.name,
        "ours": contender.ours,
        "note": "",
        **dict.fromkeys(unknown),
        "timings": {},
        "formula": contender.formula,
        "formula_bytes": contender.formula_bytes,
    }


def _is_over_promise(row: Mapping[str, Any]) -> bool | None:
    """Null where the peak was not measured, or nothing was promised."""
    if row["peak_bytes"] is None or row["formula_bytes"] is None:
        return None
    return bool(row["peak_bytes"] > row["formula_bytes"])


def _judge(row: dict[str, Any], found: Errors, bound: Bound, plain: Errors | None, dtype: str) -> None:
    # JSON has no infinity: an error that is none at all is null, and the row is not correct.
    row["value_error"] = found.value if math.isfinite(found.value) else None
    row["gradient_error"] = found.gradient if math.isfinite(found.gradient) else None
    if row["ours"]:
        row["value_bound"], row["gradient_bound"] = bound.value, bound.gradient
        row["worse_than_plain"] = plain is not None and found.worse_than(plain, dtype)
        row["correct"] = found.within(bound) and not row["worse_than_plain"]


def _timing_values(
    timing: Timing, lead: Timing | None, problem: Problem, rates: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "median_s": timing.median,
        "first_quartile_s": timing.first_quartile,
        "third_quartile_s": timing.third_quartile,
        "rounds": timing.rounds,
        "ratio": timing.median / lead.median if lead else None,
        **dict.fromkeys(("gb_s", "gb_share", "gflop_s", "gflop_share")),
    }
    if isinstance(problem, LinearProblem):
        values["gflop_s"] = problem.num_flops / timing.median / 1e9
        values["gflop_share"] = values["gflop_s"] / rates["gemm_gflop_s"][dtype]
    else:
        values["gb_s"] = problem.num_bytes_moved / timing.median / 1e9
        values["gb_share"] = values["gb_s"] / rates["copy_gb_s"]
    return values


def _shown(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"
