"""A component by name: found, its options checked, and every error saying where the value came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpoforge.config import Origins, Part
from grpoforge.origins import from_option, from_origin
from grpoforge.plugins import PluginHost
from grpoforge.registry import Component, Kind

NOWHERE = Origins()


@dataclass(frozen=True, slots=True)
class Chosen:
    """A component and the options it was given."""

    component: Component
    options: Mapping[str, Any]

    def build(self, *data: Any) -> Any:
        """The component with its options bound."""
        return self.component.build(self.options, *data)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenReward:
    """A reward as chosen, under the name it has in metrics."""

    name: str
    chosen: Chosen
    weight: float
    gate: str | None

    def describe(self) -> str:
        """One line for people: ``brevity x0.1 (only where math is right)``."""
        usual = self.chosen.component.gate
        if self.gate:
            gate = f" (only where {self.gate} is right)"
        else:
            gate = f" (not gated on {usual}: it pays for wrong answers too)" if usual else ""
        return f"{self.name} x{self.weight:g}{gate}"


def choose(kind: Kind, part: Part, host: PluginHost, origins: Origins = NOWHERE, path: Sequence[str] = ()) -> Chosen:
    """The component that ``part`` names, its options validated.

    Raises:
        PluginError: a name that nobody, or more than one plugin, registers.
        ConfigError: an option unknown, missing or of the wrong type. Both say where the value at the key ``path``
            came from.
    """
    with from_origin(origins.of(*path, "name")):
        component = host.registry.get(kind, part.name)
    return with_options(component, part.options, origins, path)


def with_options(component: Component, options: Mapping[str, Any], origins: Origins, path: Sequence[str]) -> Chosen:
    """``component`` with ``options``, validated.

    Raises:
        ConfigError: see `choose`.
    """
    with from_option(origins, path):
        component.validate(options)
    return Chosen(component, options)
