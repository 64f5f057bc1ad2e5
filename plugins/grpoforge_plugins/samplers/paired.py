"""Paired sampling: the completions of a prompt in pairs, a cold one and a hot one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from grpoforge.collate import split
from grpoforge.errors import ConfigError
from grpoforge.types import Completion, PolicyView, Prompt, Rollouts
from grpoforge_plugins.samplers import options
from grpoforge_plugins.samplers.inverse_cdf import Cuts
from grpoforge_plugins.samplers.native import decode
from grpoforge_plugins.samplers.streams import streams


class PairedSampler:
    """Draws pairs of completions: the first of a pair at one temperature, the second at the other.

    A group of ``G = 2n`` completions is n pairs, its rows in the order cold, hot, cold, hot (in that of
    ``temperatures``). Every row carries its own temperature into current, old and reference log-probs, so the ratio
    before the first update is 1 at both. A step draws ``num_sample_pairs`` pairs over all its prompts and processes,
    ``paired_batch_size`` at a time, as the sampler ``native`` draws: how many at a time changes memory, nothing else.
    ``top_p``, ``top_k`` and ``min_p`` cut as there.
    """

    block: ClassVar[int] = 2

    def __init__(
        self,
        *,
        temperatures: Annotated[tuple[float, float], "of the first completion of a pair and of the second"] = (
            0.7,
            1.3,
        ),
        num_sample_pairs: Annotated[int, "pairs of a step: prompts_per_step x completions_per_prompt / 2"] = 64,
        paired_batch_size: Annotated[int, "pairs decoded at a time; 0 for all at once"] = 16,
        max_completion_length: Annotated[int, "tokens per completion at most"] = 512,
        top_p: Annotated[float, "draw from the smallest set of tokens with this much probability"] = 1.0,
        top_k: Annotated[int, "draw from this many most probable tokens; 0 for all"] = 0,
        min_p: Annotated[float, "leave out tokens below this share of the top token's probability"] = 0.0,
    ) -> None:
        worst = next((one for one in temperatures if not one > 0), 1.0)
        options.check(
            ("temperatures", worst, worst > 0, "choose both above 0"),
            options.at_least_one("num_sample_pairs", num_sample_pairs),
            options.or_all("paired_batch_size", paired_batch_size),
            options.at_least_one("max_completion_length", max_completion_length),
            *options.cuts(top_p, top_k, min_p),
        )
        self.temperatures = temperatures
        self.num_sample_pairs = num_sample_pairs
        self.paired_batch_size = paired_batch_size
        self.max_completion_length = max_completion_length
        self.cuts = Cuts(top_k=top_k, top_p=top_p, min_p=min_p)

    @property
    def rows_at_a_time(self) -> int | None:
        """Completions decoded at a time; None for all of a step."""
        return 2 * self.paired_batch_size or None

    def check_batch(self, num_prompts: int, group_size: int) -> None:
        """Raise ConfigError unless a step of ``num_prompts`` groups has ``num_sample_pairs`` pairs."""
        pairs = num_prompts * group_size // 2
        if pairs != self.num_sample_pairs:
            raise ConfigError(
                f"sampler option `num_sample_pairs` is {self.num_sample_pairs}, and a step of {num_prompts} prompts x "
                f"{group_size} completions has {pairs} pairs",
                f"use `--set sampler.num_sample_pairs={pairs}`, or change `batch.prompts_per_step` and "
                "`batch.completions_per_prompt`",
            )

    def sample(self, policy: PolicyView, prompts: Sequence[Prompt], group_size: int, seed: int) -> Rollouts:
        """``group_size / 2`` pairs per prompt; all randomness comes from ``seed``.

        Raises:
            ConfigError: ``group_size`` is odd.
        """
        if group_size % 2:
            raise ConfigError(
                f"sampler `paired` draws two completions at a time, and {group_size} per prompt are asked for",
                f"ask for {group_size + 1}",
            )
        rows = [prompt for prompt in prompts for _ in range(group_size)]
        return self._rollouts(prompts, self._decode(policy, rows, self.temperatures * (len(rows) // 2), seed))

    def greedy(self, policy: PolicyView, prompts: Sequence[Prompt]) -> Rollouts:
        """The most probable completion of each prompt, which no temperature changes; its log-probs are at 1."""
        return self._rollouts(prompts, self._decode(policy, prompts, [1.0] * len(prompts), None))

    def sync(self, policy: PolicyView) -> None:
        """Nothing to do: it samples from the policy's own weights."""

    def _rollouts(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Rollouts:
        groups = split(len(completions), len(completions) // len(prompts))
        return Rollouts(
            prompts=tuple(prompts),
            completions=tuple(tuple(completions[group]) for group in groups),
            max_completion_length=self.max_completion_length,
        )

    def _decode(
        self, policy: PolicyView, prompts: Sequence[Prompt], temperatures: Sequence[float], seed: int | None
    ) -> list[Completion]:
        """One completion per prompt, row ``i`` at ``temperatures[i]``; without a seed the most probable ones."""
        return decode(
            policy,
            prompts,
            temperatures,
            streams(seed or 0, [prompt.index for prompt in prompts]),
            self.max_completion_length,
            do_sample=seed is not None,
            cuts=self.cuts,
            # Evaluation hands over as few as fit in memory.
            slots=0 if seed is None else 2 * self.paired_batch_size,
        )
