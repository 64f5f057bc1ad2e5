"""The peers: what people use today for the same result, each under the name it is known by.

`trl-form` is the algorithm of TRL's `selective_log_softmax` and of its chunked log-prob function, written anew, so that
it can be compared without TRL. Every peer computes the log-probs (or the loss) and the gradient, nothing more: our
entropy and logsumexp come on top.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from grpoforge_kernels.bench import formulas
from grpoforge_kernels.bench.contenders import PLAIN_TORCH, Contender, Step
from grpoforge_kernels.bench.plan import Case
from grpoforge_kernels.bench.problems import LinearProblem, LossProblem, Outcome, Problem, RowsProblem, num_sequences

LogProbs = Callable[[Tensor, Tensor], Tensor]
LinearLogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]

CCE_CHUNK_ROWS = 128
"""Rows of a chunk in `F.linear_cross_entropy`; its own choice, 2 to 8 for large vocabularies, is far slower."""

TRL_CHUNK_COLUMNS = 8192


def peers(case: Case) -> list[Contender]:
    """All peers of the operation of ``case``, able to run or not, the plain torch path first."""
    if case.op == "selective_log_softmax":
        return _rows_peers()
    if case.op == "grpo_loss":
        return _loss_peers()
    return _linear_peers(case.variant)


def _rows_peers() -> list[Contender]:
    return [
        Contender(PLAIN_TORCH, lambda problem: rows_step(problem, gathered)),
        Contender("F.cross_entropy", lambda problem: rows_step(problem, crossed)),
        Contender("torch.compile", lambda problem: rows_step(problem, compiled(normalized)), compiled=True),
        Contender("torch.compile, log_softmax", lambda problem: rows_step(problem, compiled(gathered)), compiled=True),
        Contender("TRL", lambda problem: rows_step(problem, _trl_rows()), module="trl", package="trl"),
        Contender("trl-form", lambda problem: rows_step(problem, trl_form)),
    ]


def _loss_peers() -> list[Contender]:
    return [
        Contender(PLAIN_TORCH, lambda problem: loss_step(problem, formulas.grpo_loss)),
        Contender("torch eager with metrics", lambda problem: loss_step(problem, loss_with_metrics)),
        Contender("torch.compile", lambda problem: loss_step(problem, compiled(formulas.grpo_loss)), compiled=True),
    ]


def _linear_peers(variant: str) -> list[Contender]:
    eager = Contender(PLAIN_TORCH, lambda problem: linear_step(problem, projected))
    if variant:
        return [eager]
    return [
        eager,
        Contender(
            "torch.compile", lambda problem: linear_step(problem, compiled(_projected_normalized)), compiled=True
        ),
        Contender("F.linear_cross_entropy", lambda problem: linear_step(problem, _linear_cross_entropy)),
        Contender("TRL chunked", lambda problem: linear_step(problem, _trl_linear()), module="trl", package="trl"),
        Contender("trl-form chunked", lambda problem: linear_step(problem, trl_form_linear)),
        Contender("Liger fused linear GRPO", _liger_step, module="liger_kernel", package="liger-kernel", compiled=True),
        Contender(
            "cut-cross-entropy",
            lambda problem: linear_step(problem, _cut_cross_entropy()),
            module="cut_cross_entropy",
            package="cut-cross-entropy",
            devices=("cuda",),
        ),
    ]


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.compile`` with static shapes, which is its best case; compiled at the first call."""
    torch._dynamo.reset()
    return cast(Callable[..., Tensor], torch.compile(function, dynamic=False))


# --- log-probs from logits -------------------------------------------------------------------------------------------


def rows_step(problem: Problem, logprobs_of: LogProbs) -> Step:
    """The log-probs of ``logprobs_of(logits, ids)`` and the gradient by the logits."""
    assert isinstance(problem, RowsProblem)

    def step() -> Outcome:
        logprobs = logprobs_of(problem.work, problem.ids)
        (gradient,) = torch.autograd.grad((logprobs * problem.upstream).sum(), problem.work)
        return Outcome({"logprobs": logprobs.detach()}, {"logits": gradient})

    return step


def gathered(logits: Tensor, ids: Tensor) -> Tensor:
    """``log_softmax`` and ``gather``."""
    return logits.log_softmax(dim=1).gather(1, ids[:, None]).squeeze(1)


def normalized(logits: Tensor, ids: Tensor) -> Tensor:
    """The chosen logit less the ``logsumexp``, in float32: the form that compiles best."""
    wide = logits.float()
    return wide.gather(1, ids[:, None]).squeeze(1) - wide.logsumexp(dim=1)


def crossed(logits: Tensor, ids: Tensor) -> Tensor:
    """The negative of ``cross_entropy``."""
    return -F.cross_entropy(logits, ids, reduction="none")


def trl_form(logits: Tensor, ids: Tensor) -> Tensor:
    """Row by row: chosen logit less logsumexp in float32, ``log_softmax`` and ``gather`` in half precision."""
    if logits.dtype == torch.float32:
        totals = torch.stack([row.logsumexp(dim=0) for row in logits])
        return logits.gather(1, ids[:, None]).squeeze(1) - totals
    return torch.stack([row.log_softmax(dim=0)[one] for row, one in zip(logits, ids, strict=True)])


def _trl_rows() -> LogProbs:
    return cast(LogProbs, importlib.import_module("trl.trainer.utils").selective_log_softmax)


# --- the loss from log-probs -----------------------------------------------------------------------------------------


def loss_step(problem: Problem, loss_of: Callable[..., Tensor]) -> Step:
    """The loss and its gradient by the log-probs."""
    assert isinstance(problem, LossProblem)

    def step() -> Outcome:
        loss = loss_of(problem.logprobs, problem.old, problem.ref, problem.advantages, problem.weights)
        (gradient,) = torch.autograd.grad(loss, problem.logprobs)
        return Outcome({"loss": loss.detach()}, {"logprobs": gradient})

    return step


def loss_with_metrics(logprobs: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """The loss, and beside it the sums that a trainer reports: KL, clipped shares, how far the ratio strays."""
    loss = formulas.grpo_loss(logprobs, old, ref, advantages, weights)
    with torch.no_grad():
        ratio, difference, used = (logprobs - old).exp(), ref - logprobs, weights > 0
        kl = difference.exp() - difference - 1
        low = (ratio < 1 - formulas.EPSILON_LOW) & (advantages < 0)
        high = (ratio > 1 + formulas.EPSILON_HIGH) & (advantages > 0)
        (kl * weights).sum(), (low * weights).sum(), (high * weights).sum()
        (ratio - 1).abs().where(used, 0).amax(), kl.where(used, 0).amax()
    return loss


# --- the loss from hidden states -------------------------------------------------------------------------------------


def linear_step(problem: Problem, logprobs_of: LinearLogProbs) -> Step:
    """The GRPO loss of ``logprobs_of(hidden, weight, ids)`` and its gradients by hidden states and head."""
    assert isinstance(problem, LinearProblem)

    def step() -> Outcome:
        logprobs = logprobs_of(problem.hidden, problem.weight, problem.ids)
        return linear_outcome(problem, linear_loss_of(problem, logprobs))

    return step


def linear_loss_of(problem: LinearProblem, logprobs: Tensor) -> Tensor:
    """The loss of all tokens."""
    return formulas.grpo_loss(logprobs, problem.old, problem.ref, problem.advantages, problem.weights)


def linear_outcome(problem: LinearProblem, loss: Tensor) -> Outcome:
    """``loss`` with its gradients by what is trained."""
    names = [name for name in ("hidden", "weight") if getattr(problem, name).requires_grad]
    gradients = torch.autograd.grad(loss, [getattr(problem, name) for name in names])
    return Outcome({"loss": loss.detach()}, dict(zip(names, gradients, strict=True)))


def projected(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """All logits at once, then ``log_softmax`` and ``gather``."""
    return gathered(hidden @ weight.T, ids)


def _projected_normalized(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return normalized(hidden @ weight.T, ids)


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CCE_CHUNK_ROWS, chunking_method=None)
    return -F.linear_cross_entropy(hidden, weight, ids, reduction="none", options=options)


def _cut_cross_entropy() -> LinearLogProbs:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, ids: cast(Tensor, -function(hidden, weight, ids, reduction="none"))


def _trl_linear() -> LinearLogProbs:
    function = importlib.import_module("trl.trainer.utils")._ChunkedLogProbFunction
    return lambda hidden, weight, ids: cast(Tensor, function.apply(hidden, weight, ids, 1.0, TRL_CHUNK_COLUMNS)[0])


def trl_form_linear(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Log-probs by chunks of the vocabulary, recomputed in the backward, whose products are float32."""
    return cast(Tensor, _ChunkedLogProbs.apply(hidden, weight, ids))  # type: ignore[no-untyped-call]


class _ChunkedLogProbs(torch.autograd.Function):
    """Running logsumexp and entropy forward; backward the logits again, then two float32 products for each chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        maximum = torch.full(ids.shape, -torch.inf, device=ids.device)
        total, weighted, chosen = torch.zeros(3, len(ids), device=ids.device)
        for start, logits in _logit_chunks(hidden, weight):
            highest = torch.maximum(maximum, logits.amax(dim=1))
            shrink, terms = (maximum - highest).exp(), (logits - highest[:, None]).exp()
            total = total * shrink + terms.sum(dim=1)
            weighted = weighted * shrink + (terms * logits).sum(dim=1)
            at, inside = _in_chunk(ids, start, logits.shape[1])
            chosen = chosen + logits.gather(1, at).squeeze(1) * inside
            maximum = highest
        normalizer = maximum + total.log()
        ctx.save_for_backward(hidden, weight, ids, normalizer)
        return cast(Tensor, chosen - normalizer)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, ids, normalizer = ctx.saved_tensors
        upstream = upstreams[0].float()
        by_hidden = torch.zeros(hidden.shape, device=hidden.device)
        by_weight = torch.zeros(weight.shape, device=weight.device)
        for start, logits in _logit_chunks(hidden, weight):
            by_logits = -upstream[:, None] * (logits - normalizer[:, None]).exp()
            at, inside = _in_chunk(ids, start, logits.shape[1])
            by_logits.scatter_add_(1, at, (upstream * inside)[:, None])
            columns = slice(start, start + logits.shape[1])
            by_hidden.add_(by_logits @ weight[columns].float())
            by_weight[columns].add_(by_logits.T @ hidden.float())
        return by_hidden.to(hidden.dtype), by_weight.to(weight.dtype), None


def _logit_chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """``(first id, logits [N, C] float32)`` for each chunk of the vocabulary, in buffers that are used again."""
    product = hidden.new_empty(hidden.shape[0], TRL_CHUNK_COLUMNS)
    wide = torch.empty(product.shape, device=hidden.device)
    for start in range(0, weight.shape[0], TRL_CHUNK_COLUMNS):
        part = weight[start : start + TRL_CHUNK_COLUMNS]
        torch.mm(hidden, part.T, out=product[:, : len(part)])
        yield start, wide[:, : len(part)].copy_(product[:, : len(part)])


def _in_chunk(ids: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    inside = (ids >= start) & (ids < start + width)
    return (ids - start).clamp(0, width - 1)[:, None], inside


def _liger_step(problem: Problem) -> Step:
    assert isinstance(problem, LinearProblem)
    loss_class = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    options = {"beta": formulas.BETA, "epsilon_low": formulas.EPSILON_LOW, "epsilon_high": formulas.EPSILON_HIGH}
    loss_module = loss_class(**options, loss_type="dapo", temperature=1.0)
    sequences = num_sequences(len(problem.ids))
    old, ref, ids = (one.view(sequences, -1) for one in (problem.old, problem.ref, problem.ids))
    advantages = problem.advantages.view(sequences, -1)[:, 0].contiguous()

    def step() -> Outcome:
        hidden = problem.hidden.view(sequences, -1, problem.hidden.shape[1])
        loss, _ = loss_module(
            hidden,
            problem.weight,
            ids,
            torch.ones_like(ids),
            advantages,
            ref_per_token_logps=ref,
            old_per_token_logps=old,
        )
        return linear_outcome(problem, loss)

    return step
