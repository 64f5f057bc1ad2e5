"""``grpoforge bench``: are the kernels right here, and how fast are they?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from grpoforge.cli.settings import announce, stdout_is_data

if TYPE_CHECKING:
    from grpoforge_kernels.bench.plan import Plan

WHAT = "What to measure"
HOW = "How"
INSTEAD = "Instead of measuring"
REPORT = "Report"

Ops = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OP ...]", help="selective_log_softmax, linear_logprobs, grpo_loss; all by default."),
]
Device = Annotated[str, typer.Option(metavar="cpu|cuda", rich_help_panel=WHAT, help="Where to run.")]
Dtypes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="fp32|bf16|fp16", rich_help_panel=WHAT, help="Number format; repeatable. By default fp32, bf16."
    ),
]
Backends = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        rich_help_panel=WHAT,
        help="reference, cpp or triton; repeatable. By default all that run here.",
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        # Rich reads what stands in brackets in a help as a style, and drops it.
        metavar="NxV|NxVxH|BxT",
        rich_help_panel=WHAT,
        help="Tokens x vocabulary (selective_log_softmax), tokens x vocabulary x hidden size (linear_logprobs),"
        " rows x tokens (grpo_loss, named alone); repeatable. By default what --quick, --full or neither choose.",
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        metavar="R", min=1, rich_help_panel=HOW, help="Timed runs of each contender. By default 3, 7 or 9, by size."
    ),
]
Quick = Annotated[bool, typer.Option("--quick", rich_help_panel=HOW, help="Small shapes; no memory, nothing compiled.")]
Full = Annotated[
    bool, typer.Option("--full", rich_help_panel=HOW, help="The large shapes that figures are published for.")
]
Malloc = Annotated[
    str,
    typer.Option(
        metavar="stock|reuse|both",
        rich_help_panel=HOW,
        help="stock: memory is fresh; reuse: page faults excluded, for all.",
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", rich_help_panel=REPORT, help="Write the report here.")
]
Against = Annotated[
    Path | None, typer.Option(metavar="FILE", rich_help_panel=REPORT, help="Compare with an earlier report.")
]
Certify = Annotated[
    bool,
    typer.Option(
        "--certify",
        rich_help_panel=INSTEAD,
        help="Try the fused kernels on inputs made to break; keeps a certificate.",
    ),
]
Ptx = Annotated[
    bool,
    typer.Option(
        "--ptx", rich_help_panel=INSTEAD, help="Compile the GPU kernels; needs the package triton, and no GPU."
    ),
]


def bench(
    ops: Ops = None,
    device: Device = "cpu",
    dtype: Dtypes = None,
    backend: Backends = None,
    shape: Shapes = None,
    rounds: Rounds = None,
    quick: Quick = False,
    full: Full = False,
    malloc: Malloc = "stock",
    json_file: JsonFile = None,
    against: Against = None,
    certify: Certify = False,
    ptx: Ptx = False,
) -> None:
    """Check the kernels against float64, then time them against what else is installed.

    Exit code 1: a kernel is wrong, holds more memory than it promises, fails its certification, or spills registers.
    """
    _check_choices(device, dtype, ops, malloc)
    if certify or ptx:
        _refuse_both(certify, ptx)
        _certify(device, json_file) if certify else _ptx(json_file)
        return
    earlier = _read_report(against) if against else None
    announce("loading torch ...")
    plan = _plan(
        ops=ops or (),
        device=device,
        dtypes=dtype or (),
        backends=backend or (),
        shapes=shape or (),
        rounds=rounds,
        effort=_effort(quick, full),
        malloc=malloc,
    )
    _measure(plan, json_file, earlier)


def _check_choices(device: str, dtypes: list[str] | None, ops: list[str] | None, malloc: str) -> None:
    """Refuse a name that is none, before torch is loaded."""
    from grpoforge.errors import ConfigError, suggest
    from grpoforge_kernels.bench.plan import DTYPES, MALLOCS, OPS

    for what, given, known in (
        ("operation", ops or (), OPS),
        ("device", (device,), ("cpu", "cuda")),
        ("number format", dtypes or (), DTYPES),
        ("allocator", (malloc,), MALLOCS),
    ):
        for name in given:
            if name not in known:
                raise ConfigError(f"unknown {what} `{name}`", suggest(name, known))


def _effort(quick: bool, full: bool) -> str:
    from grpoforge.errors import ConfigError

    if quick and full:
        raise ConfigError("`--quick` does not go with `--full`", "leave one out")
    return "quick" if quick else "full" if full else "plain"


def _refuse_both(certify: bool, ptx: bool) -> None:
    from grpoforge.errors import ConfigError

    if certify and ptx:
        raise ConfigError("`--certify` does not go with `--ptx`", "run one after the other")


def _plan(**choices: Any) -> Plan:
    """The plan of the flags; what was not given is the plan's own default."""
    from grpoforge_kernels.bench.plan import Plan, parse_shapes

    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in choices.items() if value
    }
    given["shapes"] = parse_shapes(given.get("shapes", ()))
    plan = Plan(**given)
    # A shape that fits nothing is a mistake in a flag: said before anything is measured.
    plan.cases()
    return plan


def _measure(plan: Plan, json_file: Path | None, earlier: dict[str, Any] | None) -> NoReturn:
    from grpoforge.cli.bench_display import print_report
    from grpoforge_kernels.bench import report as reports

    _require_device(plan.device)
    with stdout_is_data():
        report = reports.measure(plan, command=_command_line(), say=_say)
    if earlier is not None:
        reports.compare(report, earlier)
    _write_json(report, json_file)
    print_report(report)
    wrong = reports.failures(report)
    for line in wrong:
        sys.stderr.write(f"wrong: {line}\n")
    raise typer.Exit(1 if wrong else 0)


def _certify(device: str, json_file: Path | None) -> NoReturn:
    announce("loading torch ...")
    from grpoforge.cli.bench_display import print_certification
    from grpoforge_kernels import certify
    from grpoforge_kernels.errors import KernelError

    _require_device(device)
    with stdout_is_data():
        backends = certify.available(device)
        if not backends:
            raise KernelError(
                f"there is nothing to certify: no fused backend can run on {device}",
                "the reference is in use, which needs no certificate; a C++ compiler on PATH brings the cpp backend",
            )
        results = [certify.certify(backend, device) for backend in backends]
    _write_json({"results": [certify.as_json(result) for result in results]}, json_file)
    print_certification(results)
    raise typer.Exit(0 if all(isinstance(result, certify.Certificate) for result in results) else 1)


def _ptx(json_file: Path | None) -> NoReturn:
    announce("compiling every kernel for every target; some minutes on two cores, seconds once Triton knows them ...")
    from grpoforge.cli.bench_display import print_static
    from grpoforge_kernels.bench import static

    with stdout_is_data():
        table = static.compile_all()
    _write_json(table, json_file)
    print_static(table)
    raise typer.Exit(1 if table["num_spilling"] else 0)


def _require_device(device: str) -> None:
    import torch

    from grpoforge_kernels.errors import KernelError

    if device == "cuda" and not torch.cuda.is_available():
        raise KernelError(
            "`--device cuda`: torch sees no CUDA device here", "`grpoforge bench --ptx` tells what needs none"
        )


def _command_line() -> str:
    return " ".join(["grpoforge", *sys.argv[1:]])


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _read_report(path: Path) -> dict[str, Any]:
    from grpoforge.errors import DataError

    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"`--against {path}`: {error.strerror}", "give a file that `grpoforge bench --json` wrote"
        ) from None
    except ValueError:
        report = None
    parts = {"plan", "machine", "malloc", "cases"}
    if not isinstance(report, dict) or report.get("schema") != 1 or not parts <= set(report):
        raise DataError(f"`--against {path}` is no report", "give a file that `grpoforge bench --json` wrote")
    return report


def _write_json(document: dict[str, Any], path: Path | None) -> None:
    from grpoforge.errors import DataError

    if path is None:
        return
    try:
        path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"`--json {path}` cannot be written: {error.strerror}", "give a file in a folder of yours"
        ) from None
    sys.stderr.write(f"wrote {path}\n")
