"""``grpoforge bench``: what it prints, writes and refuses, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpoforge_kernels import aot, certify, dispatch
from grpoforge_kernels.aot_model import Bound as Bound_
from grpoforge_kernels.bench import adversarial, child, lineup, problems, report
from grpoforge_kernels.bench.accuracy import BOUNDS, Bound
from grpoforge_kernels.bench.contenders import PLAIN_TORCH, Contender
from grpoforge_kernels.bench.plan import OPS, ROUNDS, Plan
from grpoforge_kernels.certify import Certificate, Failure, Identity

SMALL = ("bench", "selective_log_softmax", "--quick", "--rounds", "2", "--shape", "6x300", "--dtype", "fp32")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "copy_rate", lambda device: 10e9)
    monkeypatch.setattr(report, "gemm_rate", lambda device, dtype: 100e9)
    monkeypatch.setattr(child, "measure_build", lambda plan: 0.75)
    monkeypatch.setattr(certify, "folder", lambda: tmp_path / "certificates")


def test_it_measures_and_says_what_it_did_not(cli: Callable[..., Any]) -> None:
    said = cli(*SMALL)
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert "copy 10.0 GB/s; matrix product GFLOP/s: fp32 100" in lines
    assert "first use compiles the C++ in 0.75 s" in lines
    assert "GPU: not measured (there is no CUDA device here)" in lines
    assert "not measured: torch.compile: compiles first: left out by --quick" in lines
    assert any(line.startswith("not measured: TRL: ") for line in lines)
    (header,) = [line.split() for line in lines if "gradient" in line and "median" in line]
    assert header == ["value", "gradient", "median", "IQR", "x", "ours", "speed", "share", "memory", "promised"]
    (eager,) = [line for line in lines if line.startswith("torch eager")]
    assert "GB/s" in eager
    assert any(line.startswith("ours: ") and " * " in line for line in lines)
    promises = any(line.startswith("promised: ours: ") and line.endswith("20 N + 4 MB") for line in lines)
    has_cpp = dispatch.obstacle("cpp", "selective_log_softmax", "cpu", torch.float32) is None
    assert promises == has_cpp, "the reference promises nothing"
    # What it does now is talk.
    assert "selective_log_softmax fp32 6x300 on cpu: forward and backward\n" in said.err


def test_the_help_names_operations_defaults_and_what_is_needed(cli: Callable[..., Any]) -> None:
    said = cli("bench", "--help")
    text = " ".join(said.out.replace("│", " ").split())
    assert ", ".join(OPS) in text and f"By default {', '.join(Plan().dtypes)}." in text
    assert (
        "tokens x vocabulary x hidden size (linear_logprobs)" in text
        and "rows x tokens (grpo_loss, named alone)" in text
    )
    assert f"By default {', '.join(str(n) for n in list(ROUNDS.values())[:2])} or {ROUNDS['full']}" in text
    assert "keeps a certificate" in text and "needs the package triton" in text
    assert "a kernel is wrong, holds more memory than it promises" in text


def test_the_report_is_written_and_compared_with(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/grpoforge", "bench", "--quick"])
    assert cli(*SMALL, "--json", "first.json").err.endswith("wrote first.json\n")
    first = json.loads((tmp_path / "first.json").read_text())
    for row in first["cases"][0]["rows"]:
        for timing in row["timings"].values():
            timing["median_s"] /= 1000
    (tmp_path / "first.json").write_text(json.dumps(first))
    said = cli(*SMALL, "--against", "first.json", "--json", "second.json")
    # Slower than then is told, and is no failure.
    assert said.code == 0
    assert f"`x then` is relative to commit {first['commit'] or 'unknown'}, {first['date']}" in said.out
    assert "x then" in said.out
    assert ": 0 of " not in said.out and " timings were measured then too" in said.out
    assert "other options then" not in said.out
    second = json.loads((tmp_path / "second.json").read_text())
    lead = next(row for row in second["cases"][0]["rows"] if row["ours"])
    assert lead["timings"]["stock"]["against"] > 10
    assert second["command"] == "grpoforge bench --quick"


def test_a_kernel_beyond_its_bound_ends_with_1(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BOUNDS, ("selective_log_softmax", "fp32"), Bound(0.0, 0.0))  # type: ignore[arg-type]
    said = cli(*SMALL, "--backend", "reference")
    assert said.code == 1
    assert "WRONG" in said.out
    assert (
        "wrong: selective_log_softmax fp32 6x300 on cpu: forward and backward: reference, in place: error" in said.err
    )


def off_by(error: float) -> Callable[[problems.Problem], Any]:
    """A contender whose gradient is off by ``error`` times the largest of its row."""

    def start(problem: problems.Problem) -> Any:
        exact = problems.exact(problem)
        logits = exact.gradients["logits"]
        off = {"logits": logits + error * logits.abs().amax(dim=1, keepdim=True)}
        return lambda: problems.Outcome(exact.values, off)

    return start


@pytest.mark.parametrize(("plain", "code"), [(4e-7, 1), (8e-7, 0)])
def test_a_kernel_worse_than_plain_torch_ends_with_1_within_its_bounds(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, plain: float, code: int
) -> None:
    fakes = [Contender("fake", off_by(9e-7), ours=True), Contender(PLAIN_TORCH, off_by(plain))]
    monkeypatch.setattr(lineup, "contenders", lambda case, plan: fakes)
    said = cli(*SMALL)
    assert said.code == code
    (row,) = [line.split() for line in said.out.splitlines() if line.startswith("ours: ")]
    assert row[:5] == (["ours:", "fake", "WRONG", "0.0e+00", "9.0e-07"] if code else ["ours:", "fake", "*", *row[3:5]])
    assert ("more than 2 times those of torch eager" in said.err) == bool(code)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("grpo_los",), "unknown operation `grpo_los`", "did you mean `grpo_loss`?"),
        (("--device", "cdua"), "unknown device `cdua`", "did you mean `cuda`?"),
        (("--dtype", "fp23"), "unknown number format `fp23`", "did you mean `fp32`?"),
        (("--malloc", "resue"), "unknown allocator `resue`", "did you mean `reuse`?"),
        (("--quick", "--full"), "`--quick` does not go with `--full`", "leave one out"),
        (("--certify", "--ptx"), "`--certify` does not go with `--ptx`", "run one after the other"),
        (
            ("--shape", "12"),
            "`--shape 12` is no shape",
            "write tokens x vocabulary, `1024x32000`, or tokens x vocabulary x hidden size, `512x151936x896`",
        ),
        (
            ("grpo_loss", "--shape", "1x2x3"),
            "the shape 1x2x3 fits none of grpo_loss",
            "give BxT",
        ),
        (
            ("--against", "nowhere.json"),
            "`--against nowhere.json`: No such file or directory",
            "give a file that `grpoforge bench --json` wrote",
        ),
        (
            (*SMALL[1:], "--backend", "fortran"),
            "`--backend fortran` cannot run selective_log_softmax fp32 on cpu: there is none of that name",
            "the backends are reference, cpp, triton",
        ),
        (
            (*SMALL[1:], "--json", "no/such/folder.json"),
            "`--json no/such/folder.json` cannot be written: No such file or directory",
            "give a file in a folder of yours",
        ),
    ],
)
def test_mistakes(cli: Callable[..., Any], arguments: tuple[str, ...], message: str, hint: str) -> None:
    said = cli("bench", *arguments)
    assert (said.code, said.out) == (2, "")
    assert said.err.endswith(f"error: {message}\nhint: {hint}\n")


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 0}', '{"schema": 1, "cases": []}', "\x00"])
def test_a_file_that_is_no_report(cli: Callable[..., Any], tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.json").write_text(text)
    said = cli("bench", "--against", "odd.json")
    assert said.code == 2
    assert "error: `--against odd.json` is no report" in said.err


def test_without_a_gpu_it_points_to_what_needs_none(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = cli("bench", "--device", "cuda")
    assert said.code == 2
    assert "error: `--device cuda`: torch sees no CUDA device here\n" in said.err
    assert "hint: `grpoforge bench --ptx` tells what needs none\n" in said.err


IDENTITY = Identity("cpp", "some processor", "flags", "f" * 64, "2.13", None)


def test_a_certification_is_shown(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    earned = Certificate(IDENTITY, "2026-11-23", 3, {"grpo_loss fp32": [1e-6, 2e-6]}, {"grpo_loss fp32": [5e-7, 1e-7]})
    monkeypatch.setattr(certify, "available", lambda device: ["cpp"])
    monkeypatch.setattr(certify, "certify", lambda backend, device: earned)
    said = cli("bench", "--certify", "--json", "certificate.json")
    assert said.code == 0
    assert "certified: cpp on some processor, kernels ffffffffffff: 3 checks hold" in said.out
    assert "grpo_loss fp32  5.0e-07  1.0e-06   1.0e-07  2.0e-06" in said.out
    (result,) = json.loads((tmp_path / "certificate.json").read_text())["results"]
    assert result["certified"] is True and result["identity"]["backend"] == "cpp"


def test_a_certification_that_fails_ends_with_1(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "available", lambda device: ["cpp"])
    monkeypatch.setattr(certify, "certify", lambda backend, device: Failure(IDENTITY, "a check: it moved"))
    said = cli("bench", "--certify")
    assert said.code == 1
    assert "FAILED: cpp on some processor, kernels ffffffffffff: a check: it moved" in said.out


def test_nothing_to_certify(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "available", lambda device: [])
    said = cli("bench", "--certify")
    assert said.code == 2
    assert "error: there is nothing to certify: no fused backend can run on cpu\n" in said.err
    assert "hint: the reference is in use, which needs no certificate" in said.err


def test_certification_is_the_real_one(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(certify, "available", lambda device: ["reference"])
    monkeypatch.setattr(adversarial, "checks", lambda device: iter(asked.append(device) or ()))  # type: ignore[func-returns-value]
    assert cli("bench", "--certify").code == 0
    assert asked == ["cpu"]


def compiled(spills: int, form: str = "", *, is_default: bool = True) -> Any:
    return aot.Compiled(
        *("row_stats", "bf16", form, "u4w4", is_default, "sm_90", 48, spills, 0, 16, 0.625),
        *(303_902, 303_900, 7.8, 1.03),
        Bound_(0.44, 0.47, 4.0),
    )


@pytest.mark.parametrize(("spills", "code"), [(0, 0), (3, 1)])
def test_spills_end_with_1(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spills: int, code: int
) -> None:
    monkeypatch.setattr(aot, "compile_all", lambda: [compiled(spills)])
    said = cli("bench", "--ptx", "--json", "ptx.json")
    assert said.code == code
    (row,) = [line.split() for line in said.out.splitlines() if line.startswith("row_stats")]
    shown = ["3", "SPILLS"] if spills else ["0"]
    assert row == [
        *("row_stats", "bf16", "u4w4", "*", "48", *shown, "16", "62%", "303,902", "303,900", "100%", "exponentials")
    ]
    assert f"that spill: {code}" in said.out
    assert "GPU times: not measured." in said.out
    (kernel,) = json.loads((tmp_path / "ptx.json").read_text())["kernels"]
    assert kernel["bound"]["bandwidth"] == 1.0 and kernel["is_sound"] is (spills == 0)


@pytest.mark.parametrize(("spills", "code"), [(0, 0), (2, 1)])
def test_a_form_of_another_configuration_counts_and_is_shown_where_it_spills(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, spills: int, code: int
) -> None:
    found = [compiled(0), compiled(spills, "softcap", is_default=False)]
    monkeypatch.setattr(aot, "compile_all", lambda: found)
    said = cli("bench", "--ptx")
    assert said.code == code
    assert ("row_stats bf16, softcap u4w4  " in said.out) is bool(spills)
    assert "shown only where they spill: 1 with masks" in said.out


def test_options_that_differ_from_then_are_said(cli: Callable[..., Any]) -> None:
    assert cli(*SMALL, "--backend", "reference", "--json", "then.json").code == 0
    other = [word if word != "6x300" else "7x300" for word in SMALL]
    said = cli(*other, "--backend", "reference", "--against", "then.json")
    assert said.code == 0
    line = next(line for line in said.out.splitlines() if line.startswith("`x then`"))
    # Both modes of the reference and the peers that need no compiler, none of them in this shape.
    assert " 0 of " in line
    assert "other options then: shapes 6x300 then, 7x300 now" in said.out.splitlines()


@pytest.mark.parametrize(("peak", "code"), [(3 * 2**20, 1), (2**20, 0)])
def test_more_memory_than_promised_ends_with_1(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, peak: int, code: int
) -> None:
    def start(problem: problems.Problem) -> Any:
        exact = problems.exact(problem)
        return lambda: exact

    fake = Contender("fake", start, ours=True, formula="20 N", formula_bytes=2 * 2**20)
    monkeypatch.setattr(lineup, "contenders", lambda case, plan: [fake])
    monkeypatch.setattr(child, "measure_memory", lambda plan, case, names: {"fake": peak})
    said = cli(*(word for word in SMALL if word != "--quick"))
    assert said.code == code
    assert ("3.0 MB OVER    2.0 MB" in said.out) == bool(code)
    wrong = (
        "wrong: selective_log_softmax fp32 6x300 on cpu: forward and backward: fake: 3.0 MB at the peak, 20 N promises"
    )
    assert (f"{wrong} 2.0 MB\n" in said.err) == bool(code)
