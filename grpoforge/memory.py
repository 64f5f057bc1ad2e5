"""What a run will hold in the memory of its device, estimated before a weight is loaded.

Weights, gradients and optimizer states are exact. Activations are counted on one layer of the real model, per token.
The update and the rollouts follow each other, so the larger of the two counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpoforge.config import Config
from grpoforge.logprobs import LOGITS_BYTES
from grpoforge.policy import PolicySize

ASSUMED_PROMPT = 512
"""Tokens of the longest prompt, where no limit says and the context allows."""
RESERVE = 0.1
"""Share that the allocator leaves unused between blocks."""


@dataclass(frozen=True, slots=True)
class Usage:
    """One part of the estimate."""

    name: str
    num_bytes: int
    how: str
    """For people: what it is for."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is held all the time, and what comes and goes."""

    held: tuple[Usage, ...]
    phases: tuple[Usage, ...]

    @property
    def total(self) -> int:
        """Bytes at the highest point, the reserve included."""
        highest = max(usage.num_bytes for usage in self.phases)
        return int((sum(usage.num_bytes for usage in self.held) + highest) * (1 + RESERVE))

    def lines(self) -> list[str]:
        """The estimate for people: the total, then its parts."""
        usages = (*self.held, *self.phases)
        width = max(len(usage.name) for usage in usages)
        parts = [f"{usage.name:<{width}} {shown(usage.num_bytes):>7}  {usage.how}" for usage in usages]
        reserve = f"of {' and '.join(usage.name for usage in self.phases)} the larger, and {RESERVE:.0%} reserve"
        return [f"about {shown(self.total)} ({reserve}); models of rewards come on top", *parts]


def shown(num_bytes: int) -> str:
    """Bytes for people: ``6.29 GB``, ``14 MB``."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.0f} MB"


def describe(config: Config, size: PolicySize | None, sampler: Any) -> list[str]:
    """The estimate in lines for people, or why there is none.

    A sampler says how long its completions may be by an attribute ``max_completion_length``, and how many it decodes at
    a time by one called ``rows_at_a_time``; without that, all of a step.
    """
    longest: int | None = getattr(sampler, "max_completion_length", None)
    if size is None:
        return [f"not estimated: the configuration of {config.model.name} is not on this machine"]
    if longest is None:
        return [f"not estimated: sampler `{config.sampler.name}` does not say how long its completions may be"]
    return estimate(config, size, longest, getattr(sampler, "rows_at_a_time", None)).lines()


def estimate(config: Config, size: PolicySize, max_completion_length: int, rows_at_a_time: int | None) -> Estimate:
    """The memory of a run of ``config`` on one device.

    Args:
        size: of the policy, see `PolicySize`.
        max_completion_length: the sampler's token limit.
        rows_at_a_time: completions that the sampler decodes at a time; None for all of a step.
    """
    width = (config.data.max_prompt_length or ASSUMED_PROMPT) + max_completion_length
    width = min(width, size.context_length or width)
    batch = config.batch.prompts_per_step * config.batch.completions_per_prompt
    decoded = max(min(rows_at_a_time or batch, batch), min(config.eval.batch_size, config.data.num_eval))
    return Estimate(
        held=_held(config, size),
        phases=(_update(config, size, width, max_completion_length), _rollouts(size, decoded, width)),
    )


def _held(config: Config, size: PolicySize) -> tuple[Usage, ...]:
    has_copy = config.kl.beta > 0 and not size.has_adapter
    usages = (
        Usage("weights", size.weight_bytes, f"{size.num_parameters:,} parameters"),
        Usage("reference", size.weight_bytes if has_copy else 0, _reference(config, size)),
        Usage("gradients", size.trainable_bytes, f"{size.num_trainable:,} trainable parameters"),
        Usage("optimizer", 2 * size.trainable_bytes, "two moments of AdamW"),
        Usage("autocast", size.autocast_bytes, "the weights once more, in the dtype of the forward pass"),
    )
    return tuple(usage for usage in usages if usage.num_bytes or usage.name == "reference")


def _reference(config: Config, size: PolicySize) -> str:
    if not config.kl.beta:
        return "none: beta is 0"
    return "none: the policy without its adapter" if size.has_adapter else "a frozen copy"


def _update(config: Config, size: PolicySize, width: int, completion: int) -> Usage:
    rows = config.batch.micro_batch_size or config.minibatch_size
    tokens = rows * width
    saved = size.saved_bytes_per_token * tokens
    how = f"activations of {rows} x {width} tokens"
    if config.model.gradient_checkpointing:
        # Every layer keeps its input; one layer at a time makes the rest again.
        saved = size.hidden_bytes_per_token * size.num_layers * tokens + saved // size.num_layers
        how += ", checkpointed"
    # Logits of a chunk of tokens, and their gradient.
    logits = 2 * min(LOGITS_BYTES, rows * completion * size.vocab_size * 4)
    return Usage("update", saved + logits, f"{how}, and {shown(logits)} of logits")


def _rollouts(size: PolicySize, rows: int, width: int) -> Usage:
    cache = size.cache_bytes_per_token * rows * width
    # The logits of one token of each row, scaled, and their log-softmax.
    logits = 3 * rows * size.vocab_size * 4
    return Usage("rollouts", cache + logits, f"keys and values of {rows} x {width} tokens")
