"""One training step. It reads like the paper and knows no algorithm by name.

rollouts    ~ pi_old( . | prompts), G per prompt                                        drawing
rewards     R [P, G, K]                                                                 drawing
log-probs   pi_old, pi_ref [B, T]                                                       policy
advantages  A [P, G]                                                                    advantage
objective   sum(weights * (loss(pi, pi_old, A) + beta * KL(pi, pi_ref)))                objective, reduction
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpoforge.binding import Bound
from grpoforge.coefficients import Coefficient, Steered
from grpoforge.collate import collate, split
from grpoforge.contracts import advantages_of
from grpoforge.declarations import declared
from grpoforge.distributed import Workers
from grpoforge.drawing import Drawing, MorePrompts, no_more, with_penalty
from grpoforge.errors import RunFailed
from grpoforge.metrics import (
    Meter,
    Totals,
    averages,
    effective_sample_size,
    rollout_extremes,
    rollout_totals,
    sampling_difference,
    temperature_totals,
)
from grpoforge.objective import Frozen, Objective, Update, sampled_kl
from grpoforge.old_logprobs import OldLogprobs
from grpoforge.policy import FrozenCopy, Policy, Reference, micro_batched
from grpoforge.reduction import ReductionName, count, token_weights
from grpoforge.scoring import ledger
from grpoforge.seeds import mix
from grpoforge.types import Batch, Prompt, Rollouts, Scores, StepReport, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """The parts of a step, resolved: plain callables and the numbers that tie them together."""

    drawing: Drawing
    advantage: Bound
    objective: Objective
    kl_penalty: Bound | None
    """KL estimator whose sum over a row is subtracted from its reward; None where the KL is in the loss or nowhere."""
    beta: Coefficient
    """Of the KL, wherever it stands."""
    entropy: Coefficient
    """Of the entropy bonus."""
    reduction: ReductionName
    minibatch_size: int
    """Completions per optimizer step, over all ranks."""
    micro_batch_size: int
    """Completions per forward pass and rank."""
    epochs: int
    """Passes over each batch."""
    max_grad_norm: float
    mask_truncated: bool
    """Leave completions that were cut at the length limit out of the loss."""
    top_entropy_quantile: float
    """Share of the tokens, those with the highest entropy, that the policy loss is taken on; 1 for all."""
    old_logprobs: OldLogprobs = field(default_factory=OldLogprobs)
    """Where the old log-probs come from."""

    @property
    def reads_old_early(self) -> bool:
        """True when something needs the old log-probs or their entropy before the update."""
        return self.kl_penalty is not None or self.top_entropy_quantile < 1.0 or bool(self.objective.corrections)


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

    def step(self, prompts: Sequence[Prompt], *, step: int, seed: int, more: MorePrompts = no_more) -> StepReport:
        """One step on this rank's ``prompts``; ``seed`` fixes everything random in it.

        Args:
            more: the prompts of extra draws, for dynamic sampling.

        Raises:
            RewardError: a reward broke its contract.
            PluginError: a component returned another shape than it should.
            RunFailed: the gradient is not finite.
        """
        part, watch, meter = self.algorithm, Stopwatch(), Meter()
        rollouts, scores, drawn = part.drawing(self.policy, prompts, more, seed, watch.lap)
        pad = self.policy.tokenizer.pad_token_id
        batch = collate(rollouts, pad_token_id=pad, mask_truncated=part.mask_truncated).to(self.policy.device)
        old, reference, pending = self.before_update(batch, rollouts, meter)
        target = self.at_target(batch)
        watch.lap("logprobs")
        scores = self.penalize(scores, batch, old.logprobs, reference, meter)
        advantages = self.advantages(rollouts, scores, meter)
        frozen = Frozen(
            old=old.logprobs,
            reference=reference,
            advantages=advantages.reshape(-1).to(batch.temperatures),
            weights=self.high_entropy(old.entropy, batch.completion_mask),
            target=target,
            pending=pending,
        )
        watch.lap("reward")
        for rows in self.minibatches(batch.num_rows, seed):
            self.update(batch.rows(rows), frozen.rows(rows), rollouts.max_completion_length, meter)
        part.drawing.sampler.sync(self.policy)
        watch.lap("update")
        totals = meter.totals | drawn | rollout_totals(rollouts, scores) | watch.totals()
        metrics = effective_sample_size(averages(self.workers.sum_totals(totals))) | rollout_extremes(rollouts)
        self.steer(metrics, batch.num_rows)
        return StepReport(
            step=step,
            metrics=metrics,
            rollouts=rollouts,
            scores=scores,
            advantages=advantages,
            shares=ledger(scores, advantages, block=declared(part.advantage.function, "block")),
        )

    @torch.no_grad()
    def before_update(
        self, batch: Batch, rollouts: Rollouts, meter: Meter
    ) -> tuple[TokenLogprobs, Tensor, tuple[str, ...]]:
        """`freeze`, without the passes whose answer is known, and which of the two only the update will tell."""
        part, num_updates = self.algorithm, len(list(self.minibatches(batch.num_rows, seed=0)))
        sampled = batch.sampling_logprobs.to(torch.promote_types(self.policy.precision.computed, torch.float32))
        old = TokenLogprobs(logprobs=sampled, entropy=torch.zeros_like(sampled))
        if part.old_logprobs.may_come_from_update(num_updates=num_updates, is_read_before=part.reads_old_early):
            if self.reference_is_policy:
                return old, old.logprobs, ("old", "reference")
            return old, self.reference_logprobs(batch, old.logprobs), ("old",)
        found = None
        if not part.reads_old_early:
            found = part.old_logprobs.from_sampler(self.policy, batch, rollouts, part.micro_batch_size)
        if found is None:
            return *self.freeze(batch, meter), ()
        self.report_sampling(found, meter)
        return old, self.reference_logprobs(batch, old.logprobs), ()

    @torch.no_grad()
    def freeze(self, batch: Batch, meter: Meter) -> tuple[TokenLogprobs, Tensor]:
        """What the policy and the reference say of the whole batch before the policy moves."""
        old = self.policy.frozen_logprobs(batch, self.algorithm.micro_batch_size)
        self.report_sampling(sampling_difference(batch, old.logprobs), meter)
        return old, self.reference_logprobs(batch, old.logprobs)

    @property
    def reference_is_policy(self) -> bool:
        """True without a reference, and while the policy has not moved away from the copy that is its reference."""
        reference = self.reference
        return reference is None or (isinstance(reference, FrozenCopy) and reference.equals(self.policy))

    def reference_logprobs(self, batch: Batch, old: Tensor) -> Tensor:
        """What the reference says of the whole batch, given what the policy says."""
        if self.reference is None or self.reference_is_policy:
            return old
        return micro_batched(self.reference.logprobs, batch, self.algorithm.micro_batch_size).logprobs

    def report_sampling(self, difference: tuple[float, float, float], meter: Meter) -> None:
        """Report how far the sampler's log-probs are from the policy's: (sum, count, maximum)."""
        meter.add("sampling/sampling_logp_difference/mean", *difference[:2])
        meter.largest("sampling/sampling_logp_difference/max", difference[2])

    def settle(self, batch: Batch, frozen: Frozen, current: TokenLogprobs, meter: Meter) -> Frozen:
        """``frozen`` with what only this forward pass could tell: before it moves, the policy is its own old policy."""
        if not frozen.pending:
            return frozen
        self.report_sampling(sampling_difference(batch, current.logprobs.detach()), meter)
        return frozen.settled(current.logprobs.detach())

    def at_target(self, batch: Batch) -> Tensor | None:
        """The policy's log-probs with all rows at the temperature that a correction asks for; None where none does."""
        temperature = self.algorithm.objective.target_temperature
        if temperature is None:
            return None
        same = dataclasses.replace(batch, temperatures=torch.full_like(batch.temperatures, temperature))
        return self.policy.frozen_logprobs(same, self.algorithm.micro_batch_size).logprobs

    def penalize(self, scores: Scores, batch: Batch, old: Tensor, reference: Tensor, meter: Meter) -> Scores:
        """``scores`` with the KL to the reference as one more reward, where the KL belongs in the reward.

        ``R_i - beta * sum_t KL_t``: credited to the whole completion, so that a token answers for the KL of what
        follows it, which no KL in the loss does (1909.08593).
        """
        if self.algorithm.kl_penalty is None:
            return scores
        mask = batch.completion_mask
        sampling = batch.sampling_logprobs.to(old.dtype)
        estimate = sampled_kl(self.algorithm.kl_penalty, old, reference, old, sampling, mask)
        meter.add_tokens(mask, {"kl": estimate})
        penalty = estimate.double().sum(dim=1).reshape(scores.rewards.shape[:2]).cpu()
        return with_penalty(scores, "kl", penalty, self.algorithm.beta.value)

    def advantages(self, rollouts: Rollouts, scores: Scores, meter: Meter) -> Tensor:
        """Advantages of this rank's rows, ``[P, G]``, computed on the rewards of all ranks; so are their metrics."""
        shape = scores.rewards.shape[:2]
        completions = rollouts.flat()
        lengths = torch.tensor([len(c.token_ids) for c in completions], dtype=torch.float64).reshape(shape)
        temperatures = torch.tensor([c.temperature for c in completions], dtype=torch.float64).reshape(shape)
        data = {
            "rewards": self.workers.gather(scores.rewards),
            "lengths": self.workers.gather(lengths),
            "temperatures": self.workers.gather(temperatures),
            "weights": scores.weights,
        }
        everyone, totals = advantages_of(self.algorithm.advantage, data)
        # Every rank has the totals of all rows, and the same names: sums over ranks leave their averages as they are.
        totals = totals | temperature_totals(data["rewards"], data["weights"], data["temperatures"])
        for name, (total, count_of) in totals.items():
            meter.add(name, total, count_of)
        return everyone[self.workers.share(len(everyone))]

    def high_entropy(self, entropy: Tensor, mask: Tensor) -> Tensor:
        """1 for the tokens whose entropy is in the top quantile of all ranks' tokens, else 0, ``[B, T]``.

        Entropy is that of the policy at the start of the step, so micro-batches do not change the choice (2506.01939
        takes the current policy's). The other tokens stay in the denominator.
        """
        quantile = self.algorithm.top_entropy_quantile
        if quantile >= 1.0:
            return torch.ones_like(entropy)
        values = self.workers.gather(entropy[mask]).sort(descending=True).values
        threshold = values[min(max(math.ceil(quantile * len(values)), 1), len(values)) - 1] if len(values) else 0.0
        # The first tokens of a group have one distribution, in rows that round differently: ties go in together.
        return (entropy >= threshold * (1 - 1e-5)).to(entropy.dtype)

    def minibatches(self, num_rows: int, seed: int) -> Iterator[Tensor]:
        """Rows of each optimizer step: ``epochs`` passes over the groups, each in an order of its own from ``seed``.

        Rows of a group stand together, because they share work.
        """
        generator = torch.Generator().manual_seed(seed)
        size = self.algorithm.minibatch_size // self.workers.size
        groups = torch.arange(num_rows).view(-1, self.algorithm.drawing.group_size)
        for _ in range(self.algorithm.epochs):
            order = groups[torch.randperm(len(groups), generator=generator)].flatten()
            yield from (order[rows].sort().values for rows in split(num_rows, size))

    def update(self, batch: Batch, frozen: Frozen, max_completion_length: int, meter: Meter) -> None:
        """One optimizer step on the rows of ``batch``, this rank's share of a minibatch."""
        self.accumulate(batch, frozen, max_completion_length, meter)
        parameters = self.policy.trainable()
        self.workers.sum_gradients(parameters)
        norm = float(clip_gradients(parameters, self.algorithm.max_grad_norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            largest = float(frozen.advantages.abs().max())
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
        part = self.algorithm
        counts = self.workers.sum_counts(count(batch.completion_mask, max_completion_length))
        weights = token_weights(part.reduction, batch.completion_mask, counts)
        update = Update(
            beta=part.beta.value,
            entropy_coefficient=part.entropy.value,
            seed=mix(self.policy.version, self.workers.rank),
            is_unmoved=self.policy.version == 0,
            meter=meter,
        )
        if part.objective.coupling == "batch" and batch.num_rows > part.micro_batch_size:
            loss = self.backward_coupled(batch, frozen, weights, update)
        else:
            micro = split(batch.num_rows, part.micro_batch_size)
            loss = sum(self.backward(batch.rows(r), frozen.rows(r), weights[r], update) for r in micro)
        # Every rank holds a part of the sum; the average over ranks of part times size is the whole.
        meter.add("loss", loss * self.workers.size)

    def backward(self, batch: Batch, frozen: Frozen, weights: Tensor, update: Update) -> float:
        """Add the gradient of one micro-batch; returns its part of the loss."""
        objective = self.algorithm.objective
        if objective.needs_distributions:

            def on_distributions(current: TokenLogprobs, distribution: Tensor) -> Tensor:
                assert self.reference is not None
                with torch.no_grad():
                    _, ref_distribution = self.reference.distributions(batch)
                distributions = {"distribution": distribution, "ref_distribution": ref_distribution}
                settled = self.settle(batch, frozen, current, update.meter)
                return objective(batch, settled, weights, current, update, distributions)

            return self.policy.backward_distributions(batch, on_distributions)

        def on_rows(rows: slice, current: TokenLogprobs) -> Tensor:
            part = batch.rows(rows)
            settled = self.settle(part, frozen.rows(rows), current, update.meter)
            return objective(part, settled, weights[rows], current, update)

        return self.policy.backward(batch, on_rows)

    def backward_coupled(self, batch: Batch, frozen: Frozen, weights: Tensor, update: Update) -> float:
        """As `backward`, for a loss that looks at every row of the optimizer step at once.

        The objective is taken on the log-probs of all rows; its gradient with respect to them is then driven through
        the model in micro-batches, so that their size changes nothing. Costs one forward pass more.
        """
        micro = self.algorithm.micro_batch_size
        whole = self.policy.frozen_logprobs(batch, micro)
        logprobs, entropy = whole.logprobs.requires_grad_(), whole.entropy.requires_grad_()
        current = TokenLogprobs(logprobs=logprobs, entropy=entropy)
        settled = self.settle(batch, frozen, current, update.meter)
        loss = self.algorithm.objective(batch, settled, weights, current, update)
        gradients = torch.autograd.grad(loss, [logprobs, entropy], allow_unused=True, materialize_grads=True)
        for rows in split(batch.num_rows, micro):
            upstream = [gradient[rows] for gradient in gradients]

            def drive(part: slice, current: TokenLogprobs, upstream: list[Tensor] = upstream) -> Tensor:
                return (upstream[0][part] * current.logprobs + upstream[1][part] * current.entropy).sum()

            self.policy.backward(batch.rows(rows), drive)
        return float(loss.detach())

    def steer(self, metrics: dict[str, float], num_rows: int) -> None:
        """Let the coefficients follow what the step measured, and report those it used."""
        part, num_rows = self.algorithm, num_rows * self.workers.size
        for name, coefficient, measured in (("beta", part.beta, "kl"), ("entropy_coef", part.entropy, "entropy")):
            if not isinstance(coefficient, Steered) or measured not in metrics:
                continue
            metrics[f"coefficient/{name}"] = coefficient.value
            # A step without a token measures nothing, and a coefficient that is no number would stay so.
            if not math.isnan(metrics[measured]):
                coefficient.update(metrics[measured], num_rows)


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> Tensor:
    """The norm of all gradients, which are scaled down to ``max_norm`` where it is larger, and left alone elsewhere."""
    norm = torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    if norm > max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
