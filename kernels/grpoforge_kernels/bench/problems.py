"""The inputs of a case, and its exact answer.

All contenders of a case get the same problem. Its answer is computed in float64 from the rounded inputs by the plain
formulas of `formulas`, which share no line with the operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grpoforge_kernels.bench import formulas
from grpoforge_kernels.bench.plan import Case

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NO_GRADIENT = {"zero50": 0.5, "zero70": 0.7}
SEED = 20_261_123


class Outcome(NamedTuple):
    """What a contender computed: values and gradients by name. It may compute fewer than the exact answer has."""

    values: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class RowsProblem:
    """Log-probs from logits. ``work [N, V]`` is a leaf that is refilled from ``logits`` before every run."""

    logits: Tensor
    work: Tensor
    ids: Tensor
    upstream: Tensor

    @property
    def num_bytes_moved(self) -> int:
        """The least: the logits read forward, read again backward, the gradient written."""
        return 3 * self.logits.numel() * self.logits.element_size()

    def refill(self) -> None:
        """Restore the logits, which a contender may have overwritten."""
        with torch.no_grad():
            self.work.copy_(self.logits)


@dataclass(frozen=True)
class LossProblem:
    """The GRPO loss from log-probs ``[B, T]``."""

    logprobs: Tensor
    old: Tensor
    ref: Tensor
    advantages: Tensor
    mask: Tensor
    weights: Tensor

    @property
    def num_bytes_moved(self) -> int:
        """The least: every input read once, the gradient written."""
        read = (self.logprobs, self.old, self.ref, self.advantages, self.mask, self.weights)
        return sum(one.numel() * one.element_size() for one in (*read, self.logprobs))

    def refill(self) -> None:
        """Nothing is overwritten."""


@dataclass(frozen=True)
class LinearProblem:
    """The GRPO loss from hidden states ``[N, H]`` and a head ``[V, H]``; ``old``, ``ref``, ``advantages`` are [N]."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    old: Tensor
    ref: Tensor
    advantages: Tensor
    weights: Tensor

    @property
    def num_flops(self) -> int:
        """Three matrix products, or two when the head is frozen: nothing computed twice."""
        products = 3 if self.weight.requires_grad else 2
        return products * 2 * self.hidden.numel() * self.weight.shape[0]

    def refill(self) -> None:
        """Nothing is overwritten."""


Problem = RowsProblem | LossProblem | LinearProblem


def build(case: Case, *, num_rows: int | None = None) -> Problem:
    """The inputs of ``case``; with ``num_rows`` that many tokens (rows of a [B, T]) instead, to warm up on."""
    generator = torch.Generator().manual_seed(SEED)
    shape = case.shape if num_rows is None else (num_rows, *case.shape[1:])
    if case.op == "selective_log_softmax":
        problem: Problem = _rows(shape, TORCH_DTYPES[case.dtype], generator)
    elif case.op == "grpo_loss":
        problem = _loss(shape, generator)
    else:
        problem = _linear(shape, case, generator)
    return _moved(problem, case.device)


def _moved(problem: Problem, device: str) -> Problem:
    if device == "cpu":
        return problem
    moved = {name: _to(value, device) for name, value in vars(problem).items()}
    return type(problem)(**moved)


def _to(tensor: Tensor, device: str) -> Tensor:
    return tensor.detach().to(device).requires_grad_(tensor.requires_grad)


def _rows(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> RowsProblem:
    logits = torch.randn(shape, generator=generator).mul_(3).to(dtype)
    ids = _likely_ids(logits, generator)
    upstream = torch.randn(shape[0], generator=generator) / shape[0]
    return RowsProblem(logits, logits.clone().requires_grad_(), ids, upstream)


def _likely_ids(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Every other token is the most probable one: what is trained on was sampled, so it is seldom improbable."""
    ids = torch.randint(0, logits.shape[1], logits.shape[:1], generator=generator)
    ids[::2] = logits[::2].argmax(dim=1)
    return ids


def _loss(shape: tuple[int, ...], generator: torch.Generator) -> LossProblem:
    rows, tokens = shape
    logprobs = -torch.rand(shape, generator=generator) * 5
    old = logprobs - _log_ratios(shape, generator)
    ref = logprobs + 0.3 * torch.randn(shape, generator=generator)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), generator=generator)
    mask = torch.arange(tokens) < lengths
    advantages = torch.randn(rows, 1, generator=generator).expand(shape).contiguous()
    weights = mask.double() / mask.sum()
    return LossProblem(logprobs.requires_grad_(), old, ref, advantages, mask, weights)


def _linear(shape: tuple[int, ...], case: Case, generator: torch.Generator) -> LinearProblem:
    tokens, vocabulary, width = shape
    dtype = TORCH_DTYPES[case.dtype]
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * (3 / width**0.5)).to(dtype)
    ids = torch.randint(0, vocabulary, (tokens,), generator=generator)
    logprobs = _logprobs(hidden, weight, ids)
    # One advantage for all tokens of a sequence, as GRPO has it: some peers take nothing else.
    advantages = torch.ones(tokens)
    advantages[tokens // num_sequences(tokens) :] = -1
    weights = torch.full((tokens,), 1 / tokens, dtype=torch.float64)
    if case.variant in NO_GRADIENT:
        weights[torch.randperm(tokens, generator=generator)[: round(NO_GRADIENT[case.variant] * tokens)]] = 0
    return LinearProblem(
        hidden.requires_grad_(),
        weight.requires_grad_(case.variant != "frozen"),
        ids,
        logprobs - _log_ratios(logprobs.shape, generator),
        logprobs + 0.3 * torch.randn(tokens, generator=generator),
        advantages,
        weights,
    )


def _log_ratios(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Within 0.1 of 0, or for one token in five 0.4 away: rounding never decides whether the clip binds."""
    near = 0.2 * torch.rand(shape, generator=generator) - 0.1
    return near + 0.4 * near.sign() * (torch.rand(shape, generator=generator) < 0.2)


def num_sequences(tokens: int) -> int:
    """How many sequences of equal length the tokens of a `LinearProblem` are, in order."""
    return 1 if tokens % 2 else 2


def _logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, *, chunk: int = 4096) -> Tensor:
    """The log-probs in float32, in little memory: what the old and reference ones are drawn around."""
    total = torch.full(ids.shape, -torch.inf)
    chosen = (hidden.float() * weight[ids].float()).sum(dim=1)
    for part in torch.split(weight, chunk):
        total = torch.logaddexp(total, (hidden.float() @ part.float().T).logsumexp(dim=1))
    return chosen - total


def exact(problem: Problem) -> Outcome:
    """The answer in float64. ``exact`` of a large problem takes several times the memory of its inputs."""
    if isinstance(problem, RowsProblem):
        logits = problem.logits.double().requires_grad_()
        values = formulas.token_stats(logits, problem.ids)
        (gradient,) = torch.autograd.grad(values["logprobs"] @ problem.upstream.double(), logits)
        return Outcome({name: value.detach() for name, value in values.items()}, {"logits": gradient})
    if isinstance(problem, LossProblem):
        logprobs = problem.logprobs.detach().double().requires_grad_()
        loss = formulas.grpo_loss(
            logprobs, problem.old.double(), problem.ref.double(), problem.advantages.double(), problem.weights
        )
        (gradient,) = torch.autograd.grad(loss, logprobs)
        return Outcome({"loss": loss.detach()}, {"logprobs": gradient})
    return _exact_linear(problem)


def _exact_linear(problem: LinearProblem) -> Outcome:
    leaves = {"hidden": problem.hidden.detach().double().requires_grad_()}
    weight = problem.weight.detach().double()
    if problem.weight.requires_grad:
        leaves["weight"] = weight.requires_grad_()
    logprobs = formulas.token_stats(leaves["hidden"] @ weight.T, problem.ids, entropy=False)["logprobs"]
    loss = formulas.grpo_loss(
        logprobs, problem.old.double(), problem.ref.double(), problem.advantages.double(), problem.weights
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return Outcome({"loss": loss.detach()}, dict(zip(leaves, gradients, strict=True)))
