"""A soft bound on length: the closer to the token limit, the lower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from grpoforge.errors import ConfigError

__all__ = ["soft_overlong"]

DEFAULT_SHARE = 5
"""DAPO punishes the last 4,096 of 20,480 tokens: one in five."""


def soft_overlong(
    completion_ids: Sequence[Sequence[int]],
    max_completion_length: int,
    *,
    cache_length: Annotated[int | None, Field(ge=1), "tokens before the limit; default: a fifth of it"] = None,
) -> list[float]:
    """0 up to ``max_completion_length - cache_length`` tokens, from there falling linearly to -1 at the limit.

    DAPO's soft overlong punishment (2503.14476, equation 13): ``((L_max - L_cache) - n) / L_cache``, -1 beyond the
    limit. It is added to the reward of correctness, so it also pays on wrong completions; weight 1 as in DAPO. TRL's
    ``get_soft_overlong_punishment`` and verl's overlong buffer are the same with lengths in absolute tokens.

    Raises ConfigError when ``cache_length`` is more than the limit.
    """
    cache = max(1, max_completion_length // DEFAULT_SHARE) if cache_length is None else cache_length
    if cache > max_completion_length:
        raise ConfigError(
            f"reward option `cache_length` is {cache}, and completions have at most {max_completion_length} tokens",
            f"choose `cache_length` <= {max_completion_length}",
        )
    free = max_completion_length - cache
    return [max(-1.0, min(0.0, (free - len(token_ids)) / cache)) for token_ids in completion_ids]
