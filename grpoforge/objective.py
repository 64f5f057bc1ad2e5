"""What an optimizer step minimizes, composed of the chosen parts; one micro-batch at a time.

per token = corrections * loss(pi, pi_old, A) + beta * KL(pi, pi_ref) - entropy coefficient * H(pi)
objective = sum(weights * per token), weights fixed once per optimizer step     reduction
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpoforge.binding import Bound
from grpoforge.contracts import correction_of, kl_of, loss_of
from grpoforge.declarations import declared
from grpoforge.metrics import Meter
from grpoforge.reduction import reduce
from grpoforge.types import Batch, Coupling, Loss, LossInputs, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """What does not move during a step."""

    old: Tensor
    """``[B, T]``: log-probs of the policy at the start of the step."""
    reference: Tensor
    """``[B, T]``: log-probs of the reference policy; equal to ``old`` when there is none."""
    advantages: Tensor
    """``[B]`` float64; 0 for unscored rows."""
    weights: Tensor
    """``[B, T]``: factor on each token's policy loss, 1 or 0 (the high-entropy-token mask)."""
    target: Tensor | None = None
    """``[B, T]``: ``old`` at the temperature that a correction compares with; None where no correction does."""
    pending: tuple[str, ...] = ()
    """Which of ``old`` and ``reference`` are the policy of the update's own forward pass; they mean nothing before."""

    def rows(self, index: Tensor | slice) -> Frozen:
        """The rows at ``index``, in that order."""
        return Frozen(
            old=self.old[index],
            reference=self.reference[index],
            advantages=self.advantages[index],
            weights=self.weights[index],
            target=None if self.target is None else self.target[index],
            pending=self.pending,
        )

    def settled(self, current: Tensor) -> Frozen:
        """With what was pending: log-probs ``[B, T]`` of the policy, which has not moved, without gradient."""
        return dataclasses.replace(self, pending=(), **dict.fromkeys(self.pending, current))


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What holds for one optimizer step: the numbers that tie the terms together, and where measurements go."""

    beta: float
    """Coefficient of the KL term in the loss."""
    entropy_coefficient: float
    """Of the entropy bonus; 0 for none."""
    seed: int
    """Fixes whatever is random in a loss."""
    is_unmoved: bool
    """True while the policy has taken no optimizer step: ratios are 1 and the KL is 0."""
    meter: Meter


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The composed path: every part is called by itself on ``[b, T]`` tensors and autograd ties them together."""

    loss: Loss
    kl: Bound | None
    """None where the loss has no KL term."""
    corrections: Sequence[Bound]

    @property
    def coupling(self) -> Coupling:
        """How far the loss of one token reaches; a loss that declares nothing may look at its own row."""
        return coupling_of(self.loss)

    @property
    def needs_distributions(self) -> bool:
        """True when the KL estimator reads the whole vocabulary."""
        return self.kl is not None and self.kl.needs_distributions

    @property
    def target_temperature(self) -> float | None:
        """The temperature of ``target_logprobs``; None when no correction reads them."""
        asked = [one for one in self.corrections if "target_logprobs" in one.data]
        return float(declared(asked[0].function, "target_temperature", 1.0)) if asked else None

    def __call__(
        self,
        batch: Batch,
        frozen: Frozen,
        weights: Tensor,
        current: TokenLogprobs,
        update: Update,
        distributions: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The objective of the rows of ``batch``, a scalar with gradient; its metrics go to ``update.meter``.

        Args:
            weights: ``[b, T]`` float64, of `grpoforge.reduction.token_weights`.
            distributions: for a KL estimator that reads the whole vocabulary: see `KLEstimator`.
        """
        mask, meter = batch.completion_mask, update.meter
        inputs = loss_inputs(batch, frozen, current, update.seed)
        policy_loss, metrics = loss_of(self.loss, inputs)
        correction = self.correct(inputs, frozen.target, meter)
        objective = _masked(policy_loss, mask) * frozen.weights.to(policy_loss.dtype) * correction
        meter.add_tokens(mask, {**metrics, "entropy": current.entropy})
        if update.is_unmoved:
            # Anything but 0 is a fault in temperatures, masks or padding.
            meter.largest("invariant/ratio_dev_step0", float((inputs.ratio.detach() - 1).abs().max()))
        if update.entropy_coefficient:
            objective = objective - update.entropy_coefficient * current.entropy
        if self.kl is not None:
            kl = kl_term(self.kl, frozen, inputs, distributions)
            meter.add_tokens(mask, {"kl": kl})
            objective = objective + update.beta * kl
            if update.is_unmoved:
                meter.largest("invariant/kl_step0", float(kl.detach().abs().max()))
        return reduce(objective, weights)

    def correct(self, inputs: LossInputs, target: Tensor | None, meter: Meter) -> Tensor:
        """Product of the corrections' weights, ``[b, T]`` without gradient; 1 without corrections."""
        product = torch.ones_like(inputs.old_logprobs)
        if not self.corrections:
            return product
        data = {
            "logprobs": _masked(inputs.logprobs.detach(), inputs.completion_mask),
            "old_logprobs": _masked(inputs.old_logprobs, inputs.completion_mask),
            "sampling_logprobs": _masked(inputs.sampling_logprobs, inputs.completion_mask),
            "advantages": inputs.advantages,
            "completion_mask": inputs.completion_mask,
        }
        if target is not None:
            data["target_logprobs"] = _masked(target, inputs.completion_mask)
        for correction in self.corrections:
            product = product * correction_of(correction, data)
        meter.add_tokens(
            inputs.completion_mask,
            {
                "correction/mean": product,
                "correction/square": product.square(),
                "correction/zero_share": (product == 0).to(product.dtype),
            },
        )
        return product


def kl_term(kl: Bound, frozen: Frozen, inputs: LossInputs, distributions: Mapping[str, Tensor] | None) -> Tensor:
    """Per-token KL estimate to the reference, ``[b, T]``; 0 where masked."""
    mask = inputs.completion_mask
    if distributions is not None:
        estimate = kl_of(kl, distributions, (int(mask.sum()),))
        return torch.zeros_like(inputs.logprobs).masked_scatter(mask, estimate.to(inputs.logprobs.dtype))
    return sampled_kl(kl, inputs.logprobs, frozen.reference, inputs.old_logprobs, inputs.sampling_logprobs, mask)


def sampled_kl(kl: Bound, logprobs: Tensor, reference: Tensor, old: Tensor, sampling: Tensor, mask: Tensor) -> Tensor:
    """What an estimator of sampled tokens makes of log-probs ``[b, T]``; 0 where masked.

    Masked positions are made equal *before* the estimator: its exp could overflow there, and the gradient of a
    value that is replaced afterwards is still ``0 * inf = NaN``.
    """
    data = {
        "logprobs": _masked(logprobs, mask),
        "ref_logprobs": _masked(reference, mask),
        "old_logprobs": _masked(old, mask),
        "sampling_logprobs": _masked(sampling, mask),
        "completion_mask": mask,
    }
    return _masked(kl_of(kl, data, mask.shape), mask)


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` where ``mask``, else 0: replaced, never multiplied."""
    return torch.where(mask, values, torch.zeros_like(values))


def loss_inputs(batch: Batch, frozen: Frozen, current: TokenLogprobs, seed: int) -> LossInputs:
    """What the loss sees of a micro-batch, in the dtype of the current log-probs."""
    logprobs = current.logprobs
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=frozen.old,
        sampling_logprobs=batch.sampling_logprobs.to(logprobs.dtype),
        advantages=frozen.advantages.to(logprobs.dtype)[:, None].expand_as(logprobs),
        completion_mask=batch.completion_mask,
        entropy=current.entropy.detach(),
        seed=seed,
    )


def coupling_of(loss: Loss) -> Coupling:
    """What ``loss`` declares as its ``coupling``; ``sequence`` by default."""
    coupling: Coupling = declared(loss, "coupling", "sequence")
    return coupling
