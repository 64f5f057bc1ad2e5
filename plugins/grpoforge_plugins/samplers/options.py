"""What the options of samplers may be."""

from __future__ import annotations

from grpoforge.errors import ConfigError

Rule = tuple[str, float, bool, str]
"""``(name, value, is legal, hint)``"""


def check(*rules: Rule) -> None:
    """Raise ConfigError for the first option that is not legal."""
    for name, value, is_legal, hint in rules:
        if not is_legal:
            raise ConfigError(f"sampler option `{name}` is {value:g}", hint)


def positive(name: str, value: float) -> Rule:
    """Above 0."""
    return name, value, value > 0, "choose it above 0"


def at_least_one(name: str, value: int) -> Rule:
    """A number of things of which there must be one."""
    return name, value, value >= 1, "choose it at least 1"


def or_all(name: str, value: int, what: str = "all at once") -> Rule:
    """A number of things, where 0 stands for all of them."""
    return name, value, value >= 0, f"choose it at least 0; 0 for {what}"


def cuts(top_p: float, top_k: int, min_p: float) -> tuple[Rule, ...]:
    """What is left out of a distribution before a token is drawn."""
    return (
        ("top_p", top_p, 0 < top_p <= 1, "choose it in (0, 1]"),
        or_all("top_k", top_k, "all tokens"),
        ("min_p", min_p, 0 <= min_p <= 1, "choose it in [0, 1]"),
    )
