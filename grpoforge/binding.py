"""Components whose data is bound by name: which names there are, and the call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpoforge.errors import PluginError, suggest

ADVANTAGE_DATA = ("rewards", "weights", "lengths", "temperatures")
KL_DATA = ("logprobs", "ref_logprobs", "old_logprobs", "sampling_logprobs", "completion_mask")
DISTRIBUTION_DATA = ("distribution", "ref_distribution")
CORRECTION_DATA = (
    *("logprobs", "old_logprobs", "sampling_logprobs", "target_logprobs", "advantages", "completion_mask"),
)

KNOWN_DATA: Mapping[str, tuple[str, ...]] = {
    "advantage": ADVANTAGE_DATA,
    "kl": KL_DATA + DISTRIBUTION_DATA,
    "correction": CORRECTION_DATA,
}
"""What a component of each kind may ask for, by the names of its positional parameters."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A component with its options bound and its data named."""

    function: Callable[..., Any]
    data: tuple[str, ...]

    def __call__(self, available: Mapping[str, Any]) -> Any:
        """The component on what it asks for of ``available``."""
        return self.function(**{name: available[name] for name in self.data})

    @property
    def needs_distributions(self) -> bool:
        """True for a KL estimator that reads the whole vocabulary."""
        return any(name in DISTRIBUTION_DATA for name in self.data)


def bind(kind: str, function: Callable[..., Any]) -> Bound:
    """``function`` with the data its positional parameters name.

    Raises:
        PluginError: a parameter names data that components of its ``kind`` are not given.
    """
    known = KNOWN_DATA[kind]
    names = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            continue
        if parameter.name in known:
            names.append(parameter.name)
        elif parameter.default is parameter.empty:
            name = getattr(function, "__name__", type(function).__name__)
            raise PluginError(
                f"{kind} `{name}` asks for `{parameter.name}`, which it cannot be given; it may ask for: "
                f"{', '.join(known)}",
                _hint(parameter.name, known),
            )
    return Bound(function, tuple(names))


def _hint(name: str, known: Sequence[str]) -> str:
    return suggest(name, known) + "; an option is a keyword-only parameter"
