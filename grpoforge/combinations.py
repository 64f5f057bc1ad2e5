"""Parts that cannot work together, refused before any weight is loaded; and those that work and may surprise."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from grpoforge.binding import bind
from grpoforge.config import Config
from grpoforge.declarations import declared
from grpoforge.errors import ConfigError
from grpoforge.origins import from_option

logger = logging.getLogger(__name__)


def check_together(
    config: Config, *, sampler: Any, advantage: Any, loss: Any, kl: Any, corrections: tuple[tuple[str, Any], ...]
) -> None:
    """Refuse combinations of built components that cannot mean anything.

    Raises:
        ConfigError: a correction given twice, or two that look at different temperatures; a group too small for the
            advantage, or no multiple of what sampler or advantage take together; a batch that one of them refuses; a
            KL estimator that reads the whole vocabulary is to be a reward, or to be kept for a whole minibatch; a
            sequence-level loss with a token-level correction; a target for a KL that is off; the
            sampler's log-probs as old ones where something reads more.
        PluginError: a component asks for data that it cannot be given.
    """
    bind("advantage", advantage)
    _check_group(config, advantage)
    check_blocks(config, "advantage", advantage)
    check_blocks(config, "sampler", sampler)
    check_samples(config, sampler)
    _check_kl(config, kl)
    _check_memory(config, loss, kl)
    _check_old(config)
    names = [name for name, _ in corrections]
    for name, correction in corrections:
        if names.count(name) > 1:
            raise ConfigError(
                f"the correction `{name}` is given twice{config.origins.of('corrections')}",
                "give it once, with the options you want",
            )
        bind("correction", correction)
        _check_levels(config, loss, name, correction)
    _check_targets(config, corrections)


def check_rewards(rewards: Sequence[tuple[str, Any, float]], origin: str = "") -> None:
    """Refuse a reward that learns from the others of the run where no other one counts.

    Args:
        rewards: name, component and weight of each.
        origin: where the choice of rewards came from, as the end of a sentence.

    Raises:
        ConfigError: it would have nothing to learn from, and would never score anything.
    """
    for name, reward, _ in rewards:
        others = [weight for other, _, weight in rewards if other != name]
        if declared(reward, "learns_from_others", False) and not any(others):
            raise ConfigError(
                f"reward `{name}` learns from the other rewards of the run, and none has a weight{origin}",
                "add one, such as `--reward math`",
            )


def _check_group(config: Config, advantage: Any) -> None:
    group, name = config.batch.completions_per_prompt, config.advantage.name
    needed = declared(advantage, "min_group", 2)
    origin = config.origins.of("batch", "completions_per_prompt")
    if group < needed:
        why = "a group of one has no baseline" if needed == 2 else f"advantage `{name}` needs at least {needed}"
        hint = f"use at least {needed} (8 is common)" if needed <= 8 else f"use at least {needed}"
        raise ConfigError(f"`batch.completions_per_prompt` is {group}{origin}: {why}", hint)
    if group == 2 and declared(advantage, "scales_by_std", False):
        logger.warning(
            "with 2 completions per prompt advantage `%s` keeps only the sign of their gap in reward, not its size; "
            "`paired`, `group_mean`, `batch_std` and `leave_one_out` keep it",
            name,
        )


def check_blocks(config: Config, kind: str, component: Any) -> None:
    """Refuse groups that cannot be divided into the blocks that the sampler or the advantage works with.

    Raises:
        ConfigError: completions per prompt that are no multiple of its ``block``; a batch that its ``check_batch``
            refuses.
    """
    batch, origins = config.batch, config.origins
    block: int = declared(component, "block", 1)
    if batch.completions_per_prompt % block:
        raise ConfigError(
            f"`batch.completions_per_prompt` is {batch.completions_per_prompt}"
            f"{origins.of('batch', 'completions_per_prompt')}, and {kind} `{getattr(config, kind).name}` takes them "
            f"{block} at a time",
            _multiples(batch.completions_per_prompt, block),
        )
    if hasattr(component, "check_batch"):
        with from_option(origins, (kind,)):
            component.check_batch(batch.prompts_per_step, batch.completions_per_prompt)


def check_samples(config: Config, sampler: Any) -> None:
    """Refuse sampled evaluation of a number of completions that the sampler cannot draw.

    Raises:
        ConfigError: ``eval.samples`` is no multiple of the sampler's ``block``.
    """
    block: int = declared(sampler, "block", 1)
    if config.eval.samples % block:
        raise ConfigError(
            f"`eval.samples` is {config.eval.samples}{config.origins.of('eval', 'samples')}, and sampler "
            f"`{config.sampler.name}` draws {block} completions at a time",
            _multiples(config.eval.samples, block),
        )


def _multiples(count: int, block: int) -> str:
    below, above = count // block * block, (count // block + 1) * block
    return f"use {below} or {above}" if below else f"use {above}"


def _check_targets(config: Config, corrections: tuple[tuple[str, Any], ...]) -> None:
    """One pass gives the log-probs at one temperature."""
    found = {
        name: float(declared(one, "target_temperature", 1.0))
        for name, one in corrections
        if "target_logprobs" in bind("correction", one).data
    }
    if len(set(found.values())) > 1:
        shown = " and ".join(f"`{name}` at {temperature:g}" for name, temperature in found.items())
        raise ConfigError(
            f"the corrections look at different temperatures{config.origins.of('corrections')}: {shown}",
            "give all of them one `target_temperature`",
        )


def _check_kl(config: Config, kl: Any) -> None:
    part, origins = config.kl, config.origins
    if part.target is not None and part.beta == 0:
        raise ConfigError(
            f"`kl.target` is {part.target:g}{origins.of('kl', 'target')}, and `kl.beta` is 0"
            f"{origins.of('kl', 'beta')}: there is nothing to steer",
            "give `kl.beta` the value to start from, or leave out `kl.target`",
        )
    if part.placement == "reward" and bind("kl", kl).needs_distributions:
        raise ConfigError(
            f"`kl.placement` is `reward`{origins.of('kl', 'placement')}, and KL estimator `{part.name}` reads the "
            "whole vocabulary at every token, which is not kept with the rollouts",
            "use `--set kl.placement=loss`, or an estimator of sampled tokens: `k1`",
        )
    if part.placement == "reward" and part.beta > 0 and not declared(kl, "right_in_reward", False):
        logger.warning(
            "KL estimator `%s` in the reward does not pull along the gradient of the KL (`grpoforge lab kl`); `k1` "
            "does",
            part.name,
        )


def _check_memory(config: Config, loss: Any, kl: Any) -> None:
    micro = config.batch.micro_batch_size
    whole = micro is None or micro >= config.minibatch_size
    if whole or config.kl.beta == 0 or declared(loss, "coupling") != "batch" or not bind("kl", kl).needs_distributions:
        return
    raise ConfigError(
        f"loss `{config.loss.name}` looks at all {config.minibatch_size} completions of an optimizer step at once, and "
        f"KL estimator `{config.kl.name}` would keep the whole vocabulary at each of their tokens",
        f"use an estimator of sampled tokens such as `k2`, or `--set batch.micro_batch_size={config.minibatch_size}`",
    )


def _check_old(config: Config) -> None:
    reads_more = {
        "`batch.top_entropy_quantile` reads the policy's entropy": config.batch.top_entropy_quantile < 1,
        "corrections compare them with the sampler's": bool(config.corrections),
        "`kl.placement: reward` charges for them": config.kl.beta > 0 and config.kl.placement == "reward",
    }
    reasons = [reason for reason, holds in reads_more.items() if holds]
    if config.batch.old_logprobs == "sampler" and reasons:
        raise ConfigError(
            f"`batch.old_logprobs` is `sampler`{config.origins.of('batch', 'old_logprobs')}, and {reasons[0]}",
            "use `--set batch.old_logprobs=auto`",
        )


def _check_levels(config: Config, loss: Any, name: str, correction: Any) -> None:
    if declared(loss, "level") == "sequence" and declared(correction, "level") == "token":
        raise ConfigError(
            f"loss `{config.loss.name}`{config.origins.of('loss', 'name')} has one ratio per completion, and "
            f"correction `{name}`{config.origins.of('corrections', name, 'name')} weighs single tokens",
            "use `sequence_mask`, `tis_sequence`, or `geometric_mask` with `kept: one`",
        )
