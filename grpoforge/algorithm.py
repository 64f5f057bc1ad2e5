"""The chosen parts as what the engine runs: plain callables, tied together by numbers."""

from __future__ import annotations

from collections.abc import Sequence

from grpoforge.binding import bind
from grpoforge.coefficients import AdaptiveEntropy, AdaptiveKL, Coefficient, Constant
from grpoforge.config import Config, EntropyConfig, KLPart
from grpoforge.drawing import Drawing
from grpoforge.engine import Algorithm
from grpoforge.fused import fuse
from grpoforge.objective import Objective
from grpoforge.old_logprobs import OldLogprobs
from grpoforge.parts import Parts, bind_reward
from grpoforge.types import Sampler


def make_objective(config: Config, parts: Parts) -> tuple[Objective, str]:
    """What is minimized, as one kernel where there is one for exactly these parts; and a word on that.

    Raises:
        PluginError: a component asks for data that it cannot be given.
    """
    composed = Objective(
        loss=parts.loss.build(),
        kl=bind("kl", parts.kl.build()) if config.kl.beta > 0 and config.kl.placement == "loss" else None,
        corrections=[bind("correction", chosen.build()) for chosen in parts.corrections],
    )
    return fuse(
        composed,
        entropy_bonus=config.entropy.coef > 0 or config.entropy.target is not None,
        chooses_tokens=config.batch.top_entropy_quantile < 1.0,
    )


def make_algorithm(config: Config, parts: Parts, sampler: Sampler, columns: Sequence[str]) -> Algorithm:
    """The parts as plain callables.

    Raises:
        PluginError: a component asks for data that it cannot be given.
    """
    batch = config.batch
    is_reward = config.kl.beta > 0 and config.kl.placement == "reward"
    return Algorithm(
        drawing=Drawing(
            sampler=sampler,
            rewards=[bind_reward(reward, columns) for reward in parts.rewards],
            group_size=batch.completions_per_prompt,
            max_extra_draws=batch.dynamic_sampling,
            on_reward_error=config.scoring.on_error,
            reward_time_limit=config.scoring.time_limit,
        ),
        advantage=bind("advantage", parts.advantage.build()),
        objective=make_objective(config, parts)[0],
        kl_penalty=bind("kl", parts.kl.build()) if is_reward else None,
        beta=make_beta(config.kl),
        entropy=make_entropy(config.entropy),
        reduction=config.reduction,
        minibatch_size=config.minibatch_size,
        micro_batch_size=batch.micro_batch_size or config.minibatch_size,
        epochs=batch.epochs,
        max_grad_norm=config.optim.max_grad_norm,
        mask_truncated=batch.mask_truncated_completions,
        top_entropy_quantile=batch.top_entropy_quantile,
        old_logprobs=OldLogprobs(batch.old_logprobs, batch.sampler_tolerance),
    )


def make_beta(kl: KLPart) -> Coefficient:
    """The coefficient of the KL: constant, or steered to ``kl.target``."""
    if kl.target is None or kl.beta == 0:
        return Constant(kl.beta)
    return AdaptiveKL(kl.beta, target=kl.target, horizon=kl.horizon)


def make_entropy(entropy: EntropyConfig) -> Coefficient:
    """The coefficient of the entropy bonus: constant, or steered to ``entropy.target``."""
    if entropy.target is None:
        return Constant(entropy.coef)
    return AdaptiveEntropy(entropy.coef, target=entropy.target, delta=entropy.delta, maximum=entropy.max_coef)
