from __future__ import annotations

import pytest

from grpoforge.errors import ConfigError
from grpoforge_plugins.rewards.overlong import soft_overlong


def rewards(lengths: list[int], limit: int, cache_length: int | None = None) -> list[float]:
    return soft_overlong([tuple(range(length)) for length in lengths], limit, cache_length=cache_length)


def test_falls_from_0_to_minus_1_over_the_cache() -> None:
    # Equation 13 with L_max 100 and L_cache 20: (80 - n) / 20 between 80 and 100.
    assert rewards([0, 80, 81, 90, 99, 100, 101, 500], 100, 20) == [0.0, 0.0, -0.05, -0.5, -0.95, -1.0, -1.0, -1.0]


def test_the_cache_is_a_fifth_of_the_limit_by_default() -> None:
    assert rewards([80, 90], 100) == rewards([80, 90], 100, 20)
    assert rewards([16384, 18432, 20480], 20480) == [0.0, -0.5, -1.0], "the lengths of DAPO"
    assert rewards([0, 1, 2], 2) == [0.0, 0.0, -1.0], "at least one token"


def test_the_whole_limit_may_be_the_cache() -> None:
    assert rewards([0, 1, 2, 4], 4, 4) == [0.0, -0.25, -0.5, -1.0]


def test_a_cache_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        rewards([1], 64, 65)
    assert caught.value.message == "reward option `cache_length` is 65, and completions have at most 64 tokens"
    assert caught.value.hint == "choose `cache_length` <= 64"
