"""One training step. It reads like the paper and knows no algorithm by name.

rollouts    ~ pi_old( . | prompts), G per prompt                                        sampler
rewards     R [P, G, K]                                                                 scoring
advantages  A [P, G]                                                                    advantage
per token   loss(pi, pi_old, A) + beta * KL(pi, pi_ref)                                 loss, kl
objective   sum(weights * per_token), weights fixed once per optimizer step             reduction
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpoforge.collate import collate, split
from grpoforge.contracts import advantages_of, kl_of, loss_of
from grpoforge.distributed import Workers
from grpoforge.errors import RunFailed
from grpoforge.metrics import Meter, Totals, averages, rollout_extremes, rollout_totals, sampling_difference
from grpoforge.policy import Policy, Reference, micro_batched
from grpoforge.reduction import ReductionName, count, reduce, token_weights
from grpoforge.scoring import BoundReward, ErrorPolicy, ledger, score
from grpoforge.types import Advantage, Batch, KLEstimator, Loss, LossInputs, Prompt, Sampler, StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """The parts of a step, resolved: plain callables and the numbers that tie them together."""

    sampler: Sampler
    rewards: Sequence[BoundReward]
    advantage: Advantage
    loss: Loss
    kl: KLEstimator
    beta: float
    """Coefficient of the KL term; 0 turns the reference off."""
    reduction: ReductionName
    group_size: int
    """Completions per prompt, ``G``."""
    minibatch_size: int
    """Completions per optimizer step, over all ranks."""
    micro_batch_size: int
    """Completions per forward pass and rank."""
    epochs: int
    """Passes over each batch."""
    max_grad_norm: float
    on_reward_error: ErrorPolicy
    reward_time_limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """Log-probs that do not move during a step, ``[B, T]`` each."""

    old: Tensor
    reference: Tensor
    """Equal to ``old`` when there is no reference (beta is 0)."""

    def rows(self, index: Tensor | slice) -> Frozen:
        return Frozen(old=self.old[index], reference=self.reference[index])


class Stopwatch:
    """Seconds per phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Charge the time since the previous lap to ``phase``."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def totals(self) -> Totals:
        """``time/{phase}`` as metric totals."""
        return {f"time/{phase}": (seconds, 1.0) for phase, seconds in self.seconds.items()}


class Engine:
    """Takes steps: prompts in, a better policy and a report out."""

    def __init__(
        self,
        *,
        policy: Policy,
        reference: Reference | None,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        algorithm: Algorithm,
        workers: Workers,
    ) -> None:
        self.policy = policy
        self.reference = reference
        self.optimizer = optimizer
        self.schedule = schedule
        self.algorithm = algorithm
        self.workers = workers

    def step(self, prompts: Sequence[Prompt], *, step: int, seed: int) -> StepReport:
        """One step on this rank's ``prompts``; ``seed`` fixes everything random in it.

        Raises:
            RewardError: a reward broke its contract.
            PluginError: the advantage, the loss or the KL estimator returned another shape than it should.
            RunFailed: the gradient is not finite.
        """
        part, watch, meter = self.algorithm, Stopwatch(), Meter()
        rollouts = part.sampler.sample(self.policy, prompts, part.group_size, seed)
        watch.lap("rollout")
        scores = score(rollouts, part.rewards, on_error=part.on_reward_error, time_limit=part.reward_time_limit)
        advantages = advantages_of(part.advantage, scores)
        watch.lap("reward")
        batch = collate(rollouts, advantages, pad_token_id=self.policy.tokenizer.pad_token_id).to(self.policy.device)
        frozen = self.freeze(batch, meter)
        watch.lap("logprobs")
        for rows in self.minibatches(batch.num_rows, seed):
            self.update(batch.rows(rows), frozen.rows(rows), rollouts.max_completion_length, meter)
        part.sampler.sync(self.policy)
        watch.lap("update")
        totals = meter.totals | rollout_totals(rollouts, scores) | watch.totals()
        return StepReport(
            step=step,
            metrics=averages(self.workers.sum_totals(totals)) | rollout_extremes(rollouts),
            rollouts=rollouts,
            scores=scores,
            advantages=advantages,
            shares=ledger(scores, advantages),
        )

    @torch.no_grad()
    def freeze(self, batch: Batch, meter: Meter) -> Frozen:
        """Old and reference log-probs of the whole batch."""
        micro = self.algorithm.micro_batch_size
        old = self.policy.frozen_logprobs(batch, micro)
        reference = old if self.reference is None else micro_batched(self.reference.logprobs, batch, micro)
        total, count, largest = sampling_difference(batch, old)
        meter.add("sampling/sampling_logp_difference/mean", total, count)
        meter.add("sampling/sampling_logp_difference/max", largest)
        return Frozen(old=old, reference=reference)

    def minibatches(self, num_rows: int, seed: int) -> Iterator[Tensor]:
        """Rows of each optimizer step: ``epochs`` passes, each in an order of its own drawn from ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        size = self.algorithm.minibatch_size // self.workers.size
        for _ in range(self.algorithm.epochs):
            order = torch.randperm(num_rows, generator=generator)
            yield from (order[rows].sort().values for rows in split(num_rows, size))

    def update(self, batch: Batch, frozen: Frozen, max_completion_length: int, meter: Meter) -> None:
        """One optimizer step on the rows of ``batch``, this rank's share of a minibatch."""
        self.accumulate(batch, frozen, max_completion_length, meter)
        parameters = self.policy.trainable()
        self.workers.sum_gradients(parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.algorithm.max_grad_norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            largest = float(batch.advantages.abs().max())
            raise RunFailed(
                f"the gradient norm is {norm} at optimizer step {self.policy.version + 1}, the largest |advantage| of "
                f"its rows {largest:.3g}; the weights are unchanged",
                "lower `optim.learning_rate`; if that advantage is extreme, so is a reward of its group or its weight",
            )
        meter.add("grad_norm", norm)
        meter.add("learning_rate", float(self.schedule.get_last_lr()[0]))
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.version += 1

    def accumulate(self, batch: Batch, frozen: Frozen, max_completion_length: int, meter: Meter) -> None:
        """Add the gradient of one optimizer step, one micro-batch at a time."""
        counts = self.workers.sum_counts(count(batch.completion_mask, max_completion_length))
        weights = token_weights(self.algorithm.reduction, batch.completion_mask, counts)
        loss = 0.0
        for rows in split(batch.num_rows, self.algorithm.micro_batch_size):
            loss += self.backward(batch.rows(rows), frozen.rows(rows), weights[rows], meter)
        # Every rank holds a part of the sum; the average over ranks of part times size is the whole.
        meter.add("loss", loss * self.workers.size)

    def backward(self, batch: Batch, frozen: Frozen, weights: Tensor, meter: Meter) -> float:
        """Add the gradient of one micro-batch; returns its part of the loss."""
        current = self.policy.logprobs(batch)
        inputs = loss_inputs(batch, current.logprobs, frozen.old)
        policy_loss, metrics = loss_of(self.algorithm.loss, inputs)
        kl = self.kl(current.logprobs, frozen.reference, batch.completion_mask)
        loss = reduce(policy_loss + self.algorithm.beta * kl, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        meter.add_tokens(batch.completion_mask, {**metrics, "entropy": current.entropy})
        if self.reference is not None:
            meter.add_tokens(batch.completion_mask, {"kl": kl})
        if self.policy.version == 0:
            # An unmoved policy has ratio 1 and KL 0; anything else is a fault in temperatures, masks or padding.
            meter.largest("invariant/ratio_dev_step0", float((inputs.ratio.detach() - 1).abs().max()))
            if self.reference is not None:
                meter.largest("invariant/kl_step0", float(kl.detach().abs().max()))
        return float(loss.detach())

    def kl(self, logprobs: Tensor, ref_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
        """Per-token KL estimate to the reference, ``[b, T]``; 0 where masked, and without a reference (beta is 0).

        Masked positions are made equal *before* the estimator: its exp could overflow there, and the gradient of a
        value that is replaced afterwards is still ``0 * inf = NaN``.
        """
        if self.reference is None:
            return torch.zeros_like(logprobs)
        nothing = torch.zeros_like(logprobs)
        estimate = kl_of(
            self.algorithm.kl,
            torch.where(completion_mask, logprobs, nothing),
            torch.where(completion_mask, ref_logprobs, nothing),
        )
        return torch.where(completion_mask, estimate, nothing)


def loss_inputs(batch: Batch, logprobs: Tensor, old_logprobs: Tensor) -> LossInputs:
    """What the loss sees of a micro-batch, in the dtype of ``logprobs``."""
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        sampling_logprobs=batch.sampling_logprobs.to(logprobs.dtype),
        advantages=batch.advantages.to(logprobs.dtype)[:, None].expand_as(logprobs),
        completion_mask=batch.completion_mask,
    )
