"""How long should an answer be: short when right, long when wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from grpoforge.errors import ConfigError
from grpoforge_plugins.rewards.math import Math

__all__ = ["CosineLength"]


class CosineLength:
    """Correctness whose size depends on length along half a cosine: short is better when right, longer when wrong.

    The cosine reward of 2502.03373: with ``n`` tokens of at most ``L``, right completions get from `right_short` at
    ``n = 0`` to `right_long` at ``n = L``, wrong ones from `wrong_short` to `wrong_long`,

        ``long + (short - long) * (1 + cos(pi n / L)) / 2``

    and those that reach the limit (finish reason ``length``, or ``n >= L``) `exceed`, right or wrong. With the defaults
    of the paper, a wrong completion is worth thinking longer about. What is right, the reward `math` says with its
    default options; where `math` abstains this does, too. It contains correctness: use it in place of `math`, or give
    it a small weight beside it.
    """

    def __init__(
        self,
        *,
        right_short: Annotated[float, "a right completion of no length"] = 2.0,
        right_long: Annotated[float, "a right completion at the limit"] = 1.0,
        wrong_short: Annotated[float, "a wrong completion of no length"] = -10.0,
        wrong_long: Annotated[float, "a wrong completion at the limit"] = 0.0,
        exceed: Annotated[float, "a completion that was cut off"] = -10.0,
        max_length: Annotated[int | None, Field(ge=1), "L in tokens; default: the sampler's limit"] = None,
    ) -> None:
        if min(right_short, right_long) <= max(wrong_short, wrong_long):
            raise ConfigError(
                f"`right_short` and `right_long` are {right_short:g} and {right_long:g}, `wrong_short` and "
                f"`wrong_long` {wrong_short:g} and {wrong_long:g}: some wrong completion would be worth as much as a "
                "right one",
                "choose both right bounds above both wrong ones",
            )
        self._bounds = {True: (right_short, right_long), False: (wrong_short, wrong_long)}
        self._exceed, self._max_length = exceed, max_length
        self._math = Math()

    def __call__(
        self,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        finish_reasons: Sequence[str],
        max_completion_length: int,
        answer: Sequence[object],
    ) -> list[float | None]:
        limit = self._max_length or max_completion_length
        return [
            None if right is None else self._reward(right >= 1.0, len(token_ids), limit, reason == "length")
            for right, token_ids, reason in zip(
                self._math(completions, answer), completion_ids, finish_reasons, strict=True
            )
        ]

    def _reward(self, is_right: bool, num_tokens: int, limit: int, is_cut_off: bool) -> float:
        if is_cut_off or num_tokens >= limit:
            return self._exceed
        short, long = self._bounds[is_right]
        return long + (short - long) * (1.0 + math.cos(math.pi * num_tokens / limit)) / 2.0
