"""The benchmark itself: what it compares, what it calls right, and how it counts. No measured time is asserted."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpoforge_kernels import dispatch, ops
from grpoforge_kernels.bench import accuracy, child, lineup, machine, measure, memory, ours, peers, problems, report
from grpoforge_kernels.bench.accuracy import Bound, Errors
from grpoforge_kernels.bench.contenders import PLAIN_TORCH, Contender
from grpoforge_kernels.bench.plan import OPS, Case, Plan, parse_shape
from grpoforge_kernels.errors import KernelError

TINY = {
    "selective_log_softmax": Case("selective_log_softmax", "fp32", (6, 300)),
    "linear_logprobs": Case("linear_logprobs", "fp32", (8, 300, 16)),
    "grpo_loss": Case("grpo_loss", "fp32", (4, 30)),
}
QUICK = Plan(effort="quick", rounds=2, memory=False)


@pytest.fixture(autouse=True)
def _fast_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates of the machine and the cold compile take seconds and are no concern of these tests."""
    monkeypatch.setattr(report, "copy_rate", lambda device: 10e9)
    monkeypatch.setattr(report, "gemm_rate", lambda device, dtype: 100e9)
    monkeypatch.setattr(child, "measure_build", lambda plan: 0.5)


def test_the_plain_plan_measures_every_operation_in_two_formats() -> None:
    cases = [(case.op, case.dtype, case.shape_text, case.variant) for case in Plan().cases()]
    assert cases == [
        ("selective_log_softmax", "fp32", "512x32000", ""),
        ("selective_log_softmax", "bf16", "512x32000", ""),
        ("linear_logprobs", "fp32", "256x32000x256", ""),
        ("linear_logprobs", "fp32", "256x32000x256", "zero50"),
        ("linear_logprobs", "fp32", "256x32000x256", "zero70"),
        ("linear_logprobs", "fp32", "256x32000x256", "frozen"),
        ("linear_logprobs", "bf16", "256x32000x256", ""),
        ("grpo_loss", "fp32", "64x1024", ""),
    ]


def test_the_full_plan_measures_the_published_shapes() -> None:
    shapes = {(case.op, case.shape_text) for case in Plan(effort="full").cases()}
    assert shapes == {
        ("selective_log_softmax", "1024x32000"),
        ("selective_log_softmax", "512x151936"),
        ("linear_logprobs", "512x151936x896"),
        ("grpo_loss", "64x1024"),
    }


def test_a_shape_goes_to_the_operations_that_it_fits() -> None:
    both = Plan(shapes=((4, 50), (4, 50, 8)), dtypes=("bf16",))
    assert [case.op for case in both.cases() if not case.variant] == ["selective_log_softmax", "linear_logprobs"]
    assert [case.op for case in Plan(ops=("grpo_loss",), shapes=((4, 50),)).cases()] == ["grpo_loss"]


def test_a_shape_that_fits_nothing_is_refused() -> None:
    with pytest.raises(KernelError) as refused:
        Plan(ops=("linear_logprobs",), shapes=((4, 50),)).cases()
    assert refused.value.message == "the shape 4x50 fits none of linear_logprobs"
    assert refused.value.hint == "give NxVxH"


@pytest.mark.parametrize("text", ["", "5", "5x", "0x5", "5x-1", "5x6x7x8", "axb", "5X6"])
def test_text_that_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(KernelError) as refused:
        parse_shape(text)
    assert refused.value.message == f"`--shape {text}` is no shape"
    assert "1024x32000" in refused.value.hint


def test_a_shape_and_a_plan_survive_their_texts() -> None:
    assert parse_shape("512x151936x896") == (512, 151_936, 896)
    plan = Plan(ops=("grpo_loss",), shapes=((4, 50),), rounds=3, backends=("cpp",))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


# --- what is compared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_exact_answer_is_what_the_operations_give_in_float64(op: str, dtype: str) -> None:
    problem = problems.build(replace(TINY[op], dtype=dtype))
    wide = type(problem)(**{name: _wide(value) for name, value in vars(problem).items()})
    exact = problems.exact(problem)
    (best, *_) = lineup.contenders(TINY[op], Plan(backends=("reference",)))
    found = accuracy.errors(best.start(wide)(), exact)
    assert found.value < 1e-12 and found.gradient < 1e-11


def _wide(value: Tensor) -> Tensor:
    return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_peer_and_mode_that_runs_here_computes_the_same(op: str, dtype: str) -> None:
    case = replace(TINY[op], dtype=dtype)
    limit = 5e-6 if dtype == "fp32" or op == "grpo_loss" else 5e-2
    problem = problems.build(case)
    exact, names = problems.exact(problem), []
    for contender in lineup.contenders(case, Plan()):
        if contender.unable(case) or contender.compiled:
            continue
        problem.refill()
        found = accuracy.errors(contender.start(problem)(), exact)
        assert found.value < limit and found.gradient < limit, contender.name
        names.append(contender.name)
    assert PLAIN_TORCH in names and any(name.startswith("reference") for name in names)


@pytest.mark.parametrize("variant", ["zero50", "zero70", "frozen"])
def test_the_variants_of_the_head_are_exact_too(variant: str) -> None:
    case = replace(TINY["linear_logprobs"], shape=(40, 300, 16), variant=variant)
    problem = problems.build(case)
    assert isinstance(problem, problems.LinearProblem)
    share = problems.NO_GRADIENT.get(variant, 0.0)
    assert int((problem.weights == 0).sum()) == share * 40
    assert problem.weight.requires_grad == (variant != "frozen")
    exact = problems.exact(problem)
    modes = [one for one in lineup.contenders(case, Plan(backends=("reference",))) if one.ours]
    assert len(modes) == 2
    for mode in modes:
        found = accuracy.errors(mode.start(problem)(), exact)
        assert found.value < 1e-6 and found.gradient < 2e-6, mode.name


def test_the_trl_form_of_a_head_takes_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "TRL_CHUNK_COLUMNS", 128)
    problem = problems.build(TINY["linear_logprobs"])
    found = accuracy.errors(peers.linear_step(problem, peers.trl_form_linear)(), problems.exact(problem))
    assert found.value < 1e-6 and found.gradient < 2e-6


@pytest.mark.slow
def test_liger_computes_the_same_loss() -> None:
    pytest.importorskip("liger_kernel")
    case = replace(TINY["linear_logprobs"], shape=(40, 300, 16))
    (liger,) = [one for one in lineup.contenders(case, Plan()) if one.name == "Liger fused linear GRPO"]
    assert liger.unable(case) == ""
    problem = problems.build(case)
    # Two sequences of one advantage each, clipped tokens among them, the KL term and the mean over all tokens.
    found = accuracy.errors(liger.start(problem)(), problems.exact(problem))
    assert found.value < 2e-6 and found.gradient < 5e-6


def test_who_cannot_run_says_why() -> None:
    case = TINY["selective_log_softmax"]
    absent = Contender("absent", lambda problem: lambda: None, module="no_such_module", package="no-such-package")  # type: ignore[arg-type,return-value]
    assert absent.unable(case) == "no-such-package is not installed"
    on_gpu = replace(absent, module="torch", devices=("cuda",))
    assert on_gpu.unable(case) == "runs on cuda only"
    assert on_gpu.unable(replace(case, device="cuda")) == ""
    compiled = replace(absent, module="torch", compiled=True)
    assert lineup.left_out(compiled, QUICK) == "compiles first: left out by --quick"
    assert lineup.left_out(compiled, Plan()) == ""


def test_a_backend_that_cannot_run_is_an_error() -> None:
    with pytest.raises(KernelError, match="`--backend triton` cannot run selective_log_softmax fp32 on cpu") as refused:
        lineup.contenders(TINY["selective_log_softmax"], Plan(backends=("triton",)))
    assert refused.value.hint == "the backends are reference, cpp, triton"
    with pytest.raises(KernelError, match="there is none of that name"):
        lineup.contenders(TINY["selective_log_softmax"], Plan(backends=("fortran",)))


def test_the_one_kernel_of_a_head_is_compared_where_triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_linear_bytes", lambda case, chunk_rows: 0)
    monkeypatch.setattr(ours, "_obstacle", lambda name, case: None)
    case = replace(TINY["linear_logprobs"], device="cuda")
    names = [one.name for one in ours.contenders(case, ("triton", "reference"))]
    assert names == [
        *("triton, row chunks", "triton, vocabulary chunks", "triton, one kernel forward"),
        "reference, row chunks",
    ]
    assert "reference, one kernel forward" not in [one.name for one in ours.contenders(case, ("reference",))]


def test_a_backend_is_forced_for_the_time_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    seen = []

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(dispatch.os.environ[dispatch.VARIABLE])
        raise KernelError("enough")

    monkeypatch.setattr(ops, "selective_log_softmax", spy)
    case = TINY["selective_log_softmax"]
    (first, *_) = lineup.contenders(case, Plan(backends=("reference",)))
    monkeypatch.setenv(dispatch.VARIABLE, "cpp")
    with pytest.raises(KernelError):
        first.start(problems.build(case))()
    assert seen == ["reference"]
    assert dispatch.os.environ[dispatch.VARIABLE] == "cpp"


# --- counting --------------------------------------------------------------------------------------------------------


def test_errors_by_hand() -> None:
    exact = problems.Outcome(
        {"logprobs": torch.tensor([-1.0, -3.0], dtype=torch.float64)},
        {"logits": torch.tensor([[4.0, -2.0], [0.5, 0.25]], dtype=torch.float64)},
    )
    given = problems.Outcome(
        {"logprobs": torch.tensor([-1.5, -3.0])}, {"logits": torch.tensor([[4.0, -1.0], [0.5, 0.5]])}
    )
    # 0.5 / (1 + 1); 0.25 / 0.5 is worse than 1 / 4.
    assert accuracy.errors(given, exact) == Errors(0.25, 0.5)
    given.values["logprobs"][1] = math.nan
    assert accuracy.errors(given, exact).value == math.inf


def test_the_error_of_a_head_is_relative_to_its_norm() -> None:
    right = torch.tensor([[3.0], [4.0]], dtype=torch.float64)
    found = accuracy.errors(
        problems.Outcome({"loss": torch.tensor(1.0)}, {"weight": torch.tensor([[3.0], [4.5]])}),
        problems.Outcome({"loss": torch.tensor(1.0, dtype=torch.float64)}, {"weight": right}),
    )
    assert found == Errors(0.0, 0.1)


def test_a_bound_holds_for_both_errors() -> None:
    assert Errors(1e-6, 1e-6).within(Bound(1e-6, 1e-6))
    assert not Errors(2e-6, 1e-6).within(Bound(1e-6, 1e-6))
    assert not Errors(1e-6, math.inf).within(Bound(1e-6, 1e-6))


@pytest.mark.parametrize(
    ("dtype", "ours", "plain", "worse"),
    [
        ("fp32", Errors(9e-7, 0.0, 9e-7), Errors(4e-7, 0.0, 4e-7), True),
        ("fp32", Errors(9e-7, 0.0, 9e-7), Errors(5e-7, 0.0, 5e-7), False),
        ("fp32", Errors(0.0, 9e-7), Errors(0.0, 4e-7), True),
        # Below the floor, however good plain torch is: 4 ulps of float32 are 4.8e-7.
        ("fp32", Errors(4e-7, 4e-7, 4e-7), Errors(0.0, 0.0), False),
        # The entropy is in `value` alone, and plain torch has none.
        ("fp32", Errors(9e-7, 0.0, 1e-7), Errors(1e-7, 0.0, 1e-7), False),
        # A gradient rounded once to bfloat16 is off by 2**-8 at most; the values are float32 all the same.
        ("bf16", Errors(0.0, 2**-8), Errors(0.0, 1e-4), False),
        ("bf16", Errors(0.0, 6e-3), Errors(0.0, 1e-3), True),
        ("bf16", Errors(9e-7, 0.0, 9e-7), Errors(4e-7, 0.0, 4e-7), True),
        ("fp16", Errors(0.0, 1e-3), Errors(0.0, 1e-4), True),
        # Nothing is worse than no number.
        ("fp32", Errors(1e-6, 1e-6, 1e-6), Errors(math.inf, math.inf, math.inf), False),
    ],
)
def test_worse_than_plain_torch_by_hand(dtype: str, ours: Errors, plain: Errors, worse: bool) -> None:
    assert ours.worse_than(plain, dtype) == worse


def test_quartiles_by_hand() -> None:
    assert measure.timing([4.0, 1.0, 2.0, 3.0, 5.0]) == measure.Timing(3.0, 2.0, 4.0, 5)
    assert measure.timing([2.0]) == measure.Timing(2.0, 2.0, 2.0, 1)


def test_runs_are_interleaved_and_refilled_and_the_first_changes() -> None:
    order: list[str] = []
    runners = {
        name: measure.Runner(lambda name=name: order.append(name), lambda name=name: order.append(f"refill {name}"))  # type: ignore[misc]
        for name in "abc"
    }

    def clock(run: Any) -> float:
        run()
        return 1.0

    timings = measure.interleave(runners, rounds=3, limit=100, clock=clock)
    assert [name for name in order if len(name) == 1] == [*"abc", *"bca", *"cab"]
    assert order[:2] == ["refill a", "a"]
    assert timings == {name: measure.Timing(1.0, 1.0, 1.0, 3) for name in "abc"}


def test_a_slow_runner_sits_out() -> None:
    costs = iter([9.0, 1.0, 1.0, 1.0])
    runners = {name: measure.Runner(lambda: None, lambda: None) for name in ("slow", "fast")}
    timings = measure.interleave(runners, rounds=3, limit=5, clock=lambda run: next(costs))
    assert (timings["slow"].rounds, timings["fast"].rounds) == (1, 3)


def test_bytes_and_operations_by_hand() -> None:
    rows = problems.build(Case("selective_log_softmax", "bf16", (6, 300)))
    assert isinstance(rows, problems.RowsProblem) and rows.num_bytes_moved == 3 * 6 * 300 * 2
    head = problems.build(Case("linear_logprobs", "fp32", (8, 300, 16)))
    assert isinstance(head, problems.LinearProblem) and head.num_flops == 6 * 8 * 300 * 16
    frozen = problems.build(Case("linear_logprobs", "fp32", (8, 300, 16), variant="frozen"))
    assert isinstance(frozen, problems.LinearProblem) and frozen.num_flops == 4 * 8 * 300 * 16
    loss = problems.build(Case("grpo_loss", "fp32", (4, 30)))
    # Five float32, the gradient among them, a bool and a float64.
    assert isinstance(loss, problems.LossProblem) and loss.num_bytes_moved == 120 * (5 * 4 + 1 + 8)


# --- reports ---------------------------------------------------------------------------------------------------------


def small(*ops: str, **changes: Any) -> Plan:
    shapes = tuple(TINY[op].shape for op in ops)
    return replace(QUICK, ops=ops, shapes=shapes, dtypes=("fp32",), **changes)


def test_a_report_has_everything_in_json() -> None:
    told: list[str] = []
    found = report.measure(small("selective_log_softmax"), command="grpoforge bench", say=told.append)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["schema"] == 1 and found["command"] == "grpoforge bench" and found["malloc"] == "stock"
    assert found["rates"] == {"copy_gb_s": 10.0, "gemm_gflop_s": {"fp32": 100.0}}
    assert found["first_use_compile_s"] == 0.5
    assert {"cpu", "cores", "threads", "memory_gb", "gpu", "load"} <= set(found["machine"])
    assert found["versions"]["torch"] == torch.__version__
    (case,) = found["cases"]
    assert told[-1] == case["title"] == "selective_log_softmax fp32 6x300 on cpu: forward and backward"
    rows = {row["name"]: row for row in case["rows"]}
    assert rows["TRL"]["note"] == "trl is not installed" and rows["TRL"]["timings"] == {}
    ours, plain = rows[case["lead"]], rows[PLAIN_TORCH]
    assert ours["correct"] is True and ours["value_error"] <= ours["value_bound"] == 1e-6
    assert ours["gradient_error"] <= ours["gradient_bound"] == 2e-6
    assert plain["correct"] is None and plain["value_bound"] is None and plain["value_error"] < 1e-5
    timing = ours["timings"]["stock"]
    assert timing["ratio"] == 1.0 and timing["rounds"] == 2
    assert timing["gb_s"] == pytest.approx(3 * 6 * 300 * 4 / timing["median_s"] / 1e9)
    assert timing["gb_share"] == pytest.approx(timing["gb_s"] / 10) and timing["gflop_s"] is None
    assert plain["timings"]["stock"]["ratio"] == pytest.approx(
        plain["timings"]["stock"]["median_s"] / timing["median_s"]
    )
    assert report.correct(found) and report.failures(found) == []


def test_a_head_is_stated_in_operations() -> None:
    found = report.measure(small("linear_logprobs"))
    assert [case["variant"] for case in found["cases"]] == ["", "zero50", "zero70", "frozen"]
    for case in found["cases"]:
        lead = next(row for row in case["rows"] if row["name"] == case["lead"])
        timing = lead["timings"]["stock"]
        assert timing["gb_s"] is None and timing["gflop_share"] == pytest.approx(timing["gflop_s"] / 100)
        if not lead["name"].startswith("reference"):
            assert lead["formula_bytes"] > 4 * 2**20


def test_what_is_wrong_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.selective_log_softmax

    def doubled(*arguments: Any, **options: Any) -> Any:
        stats = right(*arguments, **options)
        return stats._replace(logprobs=2 * stats.logprobs)

    monkeypatch.setattr(ops, "selective_log_softmax", doubled)
    found = report.measure(small("selective_log_softmax", backends=("reference",)))
    assert not report.correct(found)
    first, *_ = report.failures(found)
    assert first.startswith("selective_log_softmax fp32 6x300 on cpu: forward and backward: reference, in place: error")
    assert "(bound 1.0e-06)" in first and "(bound 2.0e-06)" in first
    (case,) = found["cases"]
    assert case["lead"] is None
    assert all(row["timings"] == {} and row["correct"] is False for row in case["rows"] if row["ours"])
    assert all(row["timings"]["stock"]["ratio"] is None for row in case["rows"] if row["name"] == PLAIN_TORCH)


def off_by(error: float) -> Any:
    """A contender whose log-probs and gradient are off by ``error``, relative to what the error is measured by."""

    def start(problem: problems.Problem) -> Any:
        exact = problems.exact(problem)
        logprobs, gradient = exact.values["logprobs"], exact.gradients["logits"]
        values = {**exact.values, "logprobs": logprobs - error * (1 + logprobs.abs())}
        gradients = {"logits": gradient + error * gradient.abs().amax(dim=1, keepdim=True)}
        return lambda: problems.Outcome(values, gradients)

    return start


@pytest.mark.parametrize(("ours", "plain", "right"), [(9e-7, 3e-7, False), (9e-7, 8e-7, True), (4e-7, 0.0, True)])
def test_what_is_worse_than_plain_torch_is_wrong_within_its_bounds(
    ours: float, plain: float, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = [Contender("fake", off_by(ours), ours=True), Contender(PLAIN_TORCH, off_by(plain))]
    monkeypatch.setattr(lineup, "contenders", lambda case, plan: fakes)
    found = report.measure(small("selective_log_softmax"))
    row, beside = found["cases"][0]["rows"]
    assert row["value_error"] < row["value_bound"] and row["gradient_error"] < row["gradient_bound"]
    assert row["correct"] is right and row["worse_than_plain"] is not right and bool(row["timings"]) is right
    assert beside["worse_than_plain"] is None and beside["correct"] is None
    assert report.correct(found) is right
    texts = report.failures(found)
    assert len(texts) == (0 if right else 1)
    if not right:
        assert texts[0].endswith(", more than 2 times those of torch eager, 3.0e-07 and 3.0e-07")


def test_without_plain_torch_the_bounds_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineup, "contenders", lambda case, plan: [Contender("fake", off_by(9e-7), ours=True)])
    assert report.correct(report.measure(small("selective_log_softmax")))


def test_a_peer_that_fails_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: problems.Problem) -> Any:
        raise RuntimeError("no such kernel\nand much more")

    monkeypatch.setattr(peers, "_rows_peers", lambda: [Contender("broken", broken)])
    (case,) = report.measure(small("selective_log_softmax"))["cases"]
    assert case["rows"][-1]["note"] == "failed: RuntimeError: no such kernel"


def test_against_an_earlier_report_is_a_ratio_of_medians() -> None:
    earlier = report.measure(small("selective_log_softmax"))
    now = json.loads(json.dumps(earlier))
    rows = [row for row in now["cases"][0]["rows"] if row["timings"]]
    for row in rows:
        row["timings"]["stock"]["median_s"] *= 1.5
    rows[-1]["name"] = "newcomer"
    report.compare(now, earlier)
    assert [row["timings"]["stock"]["against"] for row in rows[:-1]] == [pytest.approx(1.5)] * (len(rows) - 1)
    assert rows[-1]["timings"]["stock"]["against"] is None
    # Two rows of ours and some peers; the last of them is new.
    assert now["against"] == {
        **{name: earlier[name] for name in ("date", "commit", "command")},
        "num_timings": len(rows),
        "num_matched": len(rows) - 1,
        "options": {},
    }


def test_against_says_which_options_were_others() -> None:
    earlier = report.measure(small("selective_log_softmax"))
    now = json.loads(json.dumps(earlier))
    now["plan"].update(effort="full", shapes=[], backends=["cpp"])
    now["malloc"] = "both"
    now["machine"]["threads"] += 1
    now["cases"][0]["shape"] = "512x151936"
    report.compare(now, earlier)
    assert now["against"]["num_matched"] == 0 and now["against"]["num_timings"] > 2
    threads = earlier["machine"]["threads"]
    assert now["against"]["options"] == {
        "effort": ["quick", "full"], "shapes": [[[6, 300]], []], "backends": [[], ["cpp"]],
        "malloc": ["stock", "both"], "threads": [threads, threads + 1],
    }  # fmt: skip


@pytest.mark.parametrize(("peak", "promised", "over"), [(101, 100, True), (100, 100, False), (101, None, None)])
def test_more_memory_than_promised_is_a_failure(
    peak: int, promised: int | None, over: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Contender("fake", off_by(0.0), ours=True, formula="20 N" if promised else "", formula_bytes=promised)
    monkeypatch.setattr(lineup, "contenders", lambda case, plan: [fake])
    monkeypatch.setattr(child, "measure_memory", lambda plan, case, names: {"fake": peak})
    found = report.measure(small("selective_log_softmax", effort="plain", memory=True))
    (row,) = found["cases"][0]["rows"]
    assert row["over_promise"] is over and row["correct"] is True
    assert report.correct(found) is not bool(over)
    title = "selective_log_softmax fp32 6x300 on cpu: forward and backward"
    assert report.failures(found) == ([f"{title}: fake: 0.0 MB at the peak, 20 N promises 0.0 MB"] if over else [])


def test_both_allocators_stand_side_by_side(capfd: pytest.CaptureFixture[str]) -> None:
    found = report.measure(small("grpo_loss", malloc="both"))
    assert found["malloc"] == "both"
    (case,) = found["cases"]
    timed = [row for row in case["rows"] if row["timings"]]
    assert len(timed) >= 3
    assert all(set(row["timings"]) == {"stock", "reuse"} for row in timed)
    # The other process talks on standard error, and nothing of it is on standard output.
    assert capfd.readouterr().out == ""


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(KernelError, match=r"the process that measures \(memory\) ended with exit code 1"):
        child.ask("memory", small("grpo_loss"), case={"op": "no such operation"}, names=[])


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_peak_of_a_step_is_what_it_touches() -> None:
    case = Case("selective_log_softmax", "fp32", (64, 32_768))

    def touching(megabytes: int) -> Contender:
        def start(problem: problems.Problem) -> Any:
            return lambda: torch.ones(megabytes * 2**18).sum()

        return Contender(f"{megabytes} MB", start)

    peaks = memory.peak_bytes(case, [touching(64), touching(16)])
    assert peaks["64 MB"] == pytest.approx(64 * 2**20, abs=2**21)
    assert peaks["16 MB"] == pytest.approx(16 * 2**20, abs=2**21)


def test_where_the_peak_cannot_be_reset_memory_is_sampled(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    held = torch.empty(0)

    def step() -> None:
        nonlocal held
        held = torch.ones(2**24)

    # What the tests before left behind would be given back during the step, and hide as much of it.
    memory._settle()
    peak = memory._cpu_peak(step)
    assert peak is not None and peak >= 2**26 - 2**22
    assert held.numel() == 2**24


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    plan = small("selective_log_softmax", backends=("reference",))
    case = Case("selective_log_softmax", "fp32", (64, 16_384))
    peaks = child.measure_memory(plan, case, ["reference, in place", PLAIN_TORCH])
    assert set(peaks) == {"reference, in place", PLAIN_TORCH}
    # log_softmax and its gradient are two more tensors of the size of the logits.
    plain = peaks[PLAIN_TORCH]
    assert plain is not None and plain > 1.8 * 64 * 16_384 * 4


# --- the GPU kernels -------------------------------------------------------------------------------------------------


TUNED = """
import torch
from grpoforge_kernels.bench import problems, tuning
from grpoforge_kernels.bench.plan import Case
from grpoforge_kernels.triton import configs
tried = []
def tune(candidates, run):
    tried.append((candidates.kernel, len([run(config) for config in candidates.options.values()])))
configs.tune = tune
tuning.tune(problems.build(Case("selective_log_softmax", "fp32", (2, 300))))
print(tried)
"""


def test_tuning_runs_every_candidate() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", TUNED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "[('row_stats', 3), ('row_gradient', 3)]\n", done.stderr


def test_the_compiler_is_the_one_that_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "compiler").write_text('#!/bin/sh\necho "made up 1.0 $*"\n')
    (tmp_path / "compiler").chmod(0o755)
    monkeypatch.setenv("CXX", f"{tmp_path}/compiler -m32")
    assert machine.compiler() == "made up 1.0 -m32 --version"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert machine.compiler() is None
