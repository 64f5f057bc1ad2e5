"""Our operations as contenders: each backend and each mode that a user can choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpoforge_kernels import dispatch, ops
from grpoforge_kernels.bench import formulas
from grpoforge_kernels.bench.contenders import Contender, Step
from grpoforge_kernels.bench.forcing import forced
from grpoforge_kernels.bench.peers import linear_loss_of, linear_outcome
from grpoforge_kernels.bench.plan import Case
from grpoforge_kernels.bench.problems import (
    NO_GRADIENT,
    TORCH_DTYPES,
    LinearProblem,
    LossProblem,
    Outcome,
    Problem,
    RowsProblem,
)
from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.linear_logprobs import default_chunk_bytes, peak_extra_bytes

ALLOWANCE = 4 * 2**20
"""What a formula leaves for thread stacks, code pages and allocator rounding."""

CHUNK_ROWS = 256


def contenders(case: Case, backends: Sequence[str]) -> list[Contender]:
    """Each mode on each of ``backends``; on every backend that can run here when there is none.

    Raises:
        KernelError: a backend that was asked for cannot run.
    """
    wanted = backends or [name for name in ("triton", "cpp", "reference") if not _obstacle(name, case)]
    for name in wanted:
        reason = _obstacle(name, case) if name in dispatch.BACKENDS else "there is none of that name"
        if reason:
            raise KernelError(
                f"`--backend {name}` cannot run {case.op} {case.dtype} on {case.device}: {reason}",
                f"the backends are {', '.join(dispatch.BACKENDS)}",
            )
    # The modes are told apart on the best backend; the others are there to be told from it.
    modes = _modes(case, wanted[0])
    return [_on(name, mode) for name in wanted for mode in (modes if name == wanted[0] else modes[:1])]


def _obstacle(name: str, case: Case) -> str | None:
    # The head's products are torch's; its kernels are those of the logits.
    op = "selective_log_softmax" if case.op == "linear_logprobs" else case.op
    return dispatch.obstacle(name, op, case.device, TORCH_DTYPES[case.dtype])


def _on(backend: str, mode: Contender) -> Contender:
    def start(problem: Problem) -> Step:
        step = mode.start(problem)

        def run() -> Outcome:
            with forced(backend):
                return step()

        return run

    named = replace(
        mode, name=f"{backend}, {mode.name}" if mode.name else backend, start=start, ours=True, backend=backend
    )
    # The reference promises to be right, not to be small.
    return replace(named, formula="", formula_bytes=None) if backend == "reference" else named


def _modes(case: Case, backend: str) -> list[Contender]:
    if case.op == "selective_log_softmax":
        return _rows_modes(case)
    if case.op == "grpo_loss":
        return [Contender("", _loss)]
    return _linear_modes(case, backend)


def _rows_modes(case: Case) -> list[Contender]:
    tokens, vocabulary = case.shape
    statistics = 20 * tokens + ALLOWANCE
    gradient = tokens * vocabulary * TORCH_DTYPES[case.dtype].itemsize
    return [
        Contender("in place", lambda problem: _rows(problem, True), formula="20 N + 4 MB", formula_bytes=statistics),
        Contender(
            "out of place",
            lambda problem: _rows(problem, False),
            formula="gradient + 20 N + 4 MB",
            formula_bytes=gradient + statistics,
        ),
    ]


def _rows(problem: Problem, in_place: bool) -> Step:
    assert isinstance(problem, RowsProblem)
    temperature = torch.ones_like(problem.upstream)

    def step() -> Outcome:
        # Logits of a model are no leaf, and a leaf is never overwritten.
        logits = problem.work.view_as(problem.work)
        stats = ops.selective_log_softmax(logits, problem.ids, temperature, overwrite_logits=in_place)
        (gradient,) = torch.autograd.grad((stats.logprobs * problem.upstream).sum(), problem.work)
        return Outcome({name: value.detach() for name, value in stats._asdict().items()}, {"logits": gradient})

    return step


def _loss(problem: Problem) -> Step:
    assert isinstance(problem, LossProblem)

    def step() -> Outcome:
        result = ops.grpo_loss(
            problem.logprobs,
            problem.old,
            problem.ref,
            problem.advantages,
            problem.mask,
            problem.weights,
            epsilon_low=formulas.EPSILON_LOW,
            epsilon_high=formulas.EPSILON_HIGH,
            kl="k3",
            beta=formulas.BETA,
        )
        (gradient,) = torch.autograd.grad(result.loss, problem.logprobs)
        return Outcome({"loss": result.loss.detach()}, {"logprobs": gradient})

    return step


def _linear_modes(case: Case, backend: str) -> list[Contender]:
    by_columns = Contender(
        "vocabulary chunks",
        lambda problem: _by_columns(_linear(problem)),
        formula="gradients + chunk + 12 N H + 4 MB",
        formula_bytes=_linear_bytes(case, 0),
    )
    if case.variant in NO_GRADIENT:
        computing = replace(by_columns, start=lambda problem: _by_columns(_linear(problem), skip_zero_rows=False))
        return [replace(by_columns, name="skipping them"), replace(computing, name="computing them")]
    if case.variant == "frozen":
        recompute = replace(by_columns, start=lambda problem: _recomputing(_linear(problem)))
        return [replace(by_columns, name="frozen head"), replace(recompute, name="recompute")]
    by_rows = Contender(
        "row chunks",
        lambda problem: _by_rows(_linear(problem)),
        formula="gradients + 4 V x chunk rows + chunk + 12 N H (+ 4 V H in half precision) + 4 MB",
        formula_bytes=_linear_bytes(case, min(CHUNK_ROWS, case.shape[0])),
    )
    one_kernel = replace(by_columns, name="one kernel forward", start=lambda problem: one_kernel_step(_linear(problem)))
    # Its forward is a Triton kernel, whatever backend is forced.
    return [by_rows, by_columns, *([one_kernel] if backend == "triton" else [])]


def _linear_bytes(case: Case, chunk_rows: int) -> int:
    tokens, vocabulary, width = case.shape
    # Never written to, so they take no memory.
    hidden = torch.empty(tokens, width, dtype=TORCH_DTYPES[case.dtype], device=case.device)
    weight = torch.empty(vocabulary, width, dtype=TORCH_DTYPES[case.dtype], device=case.device)
    gradients = hidden.nbytes + (0 if case.variant == "frozen" else weight.nbytes)
    return gradients + peak_extra_bytes(hidden, weight, chunk_rows=chunk_rows) + ALLOWANCE


def _linear(problem: Problem) -> LinearProblem:
    assert isinstance(problem, LinearProblem)
    return problem


def _by_columns(problem: LinearProblem, *, skip_zero_rows: bool = True) -> Step:
    temperature = torch.ones(len(problem.ids), device=problem.ids.device)

    def step() -> Outcome:
        stats = ops.linear_logprobs(
            problem.hidden, problem.weight, problem.ids, temperature, skip_zero_rows=skip_zero_rows
        )
        return linear_outcome(problem, linear_loss_of(problem, stats.logprobs))

    return step


def one_kernel_step(problem: LinearProblem) -> Step:
    """The forward as the one Triton kernel ``linear_stats``, and the backward of the vocabulary chunks.

    Training does not do this: nobody has measured it on a GPU. Whoever has one sees here whether it should.
    """
    temperature = torch.ones(len(problem.ids), device=problem.ids.device)

    def step() -> Outcome:
        logprobs = _OneKernel.apply(problem.hidden, problem.weight, problem.ids, temperature)  # type: ignore[no-untyped-call]
        return linear_outcome(problem, linear_loss_of(problem, logprobs))

    return step


class _OneKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, inv_temperature: Tensor) -> Tensor:
        from grpoforge_kernels.triton.linear_logprobs import finish, linear_stats

        stats = linear_stats(hidden, weight, ids, inv_temperature)
        logprobs = finish(stats, inv_temperature).logprobs
        ctx.save_for_backward(hidden, weight, ids, inv_temperature, logprobs, torch.stack(stats))
        return logprobs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, ids, inv_temperature, logprobs, stats = ctx.saved_tensors
        options = (None, None, 1.0, default_chunk_bytes(hidden.device), True)
        by_hidden, by_weight, _ = torch.ops.grpoforge.linear_logprobs_backward(
            hidden, weight, None, ids, inv_temperature, *options, logprobs, stats, stats.new_empty((0, 1)),
            upstream[0], None, None, [True, True, False],
        )  # fmt: skip
        return by_hidden, by_weight, None, None


def _recomputing(problem: LinearProblem) -> Step:
    """The way of a head that is trained, for one that is not: the operator, told that it is not frozen."""
    temperature = torch.ones(len(problem.ids), device=problem.ids.device)
    chunk_bytes = default_chunk_bytes(problem.hidden.device)

    def step() -> Outcome:
        logprobs = torch.ops.grpoforge.linear_logprobs(
            problem.hidden, problem.weight, None, problem.ids, temperature, None, None, 1.0, chunk_bytes, True, False
        )[0]
        return linear_outcome(problem, linear_loss_of(problem, logprobs))

    return step


def _by_rows(problem: LinearProblem) -> Step:
    temperature = torch.ones(len(problem.ids), device=problem.ids.device)
    chunks = row_chunks(len(problem.ids))

    def loss_of(rows: slice, stats: ops.TokenStats) -> Tensor:
        per_token = (problem.old, problem.ref, problem.advantages, problem.weights)
        return formulas.grpo_loss(stats.logprobs, *(one[rows] for one in per_token))

    def step() -> Outcome:
        loss = ops.linear_loss(problem.hidden, problem.weight, problem.ids, temperature, loss_of, chunks=chunks)
        return linear_outcome(problem, loss)

    return step


def row_chunks(tokens: int) -> list[slice]:
    """Chunks of at most 256 rows: fewer rows cost time, more cost memory."""
    return [slice(start, min(start + CHUNK_ROWS, tokens)) for start in range(0, tokens, CHUNK_ROWS)]
