"""Coefficients of the loss's terms: constant, or steered by what they act on. Their value is kept in checkpoints."""

from __future__ import annotations

from typing import Any, Protocol


class Coefficient(Protocol):
    """A number, and what a finished step makes of it."""

    value: float

    def update(self, measured: float, num_rows: int) -> None:
        """Called after each step with the mean of what the coefficient acts on, and the completions of the step."""


class Constant:
    """Never changes."""

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, measured: float, num_rows: int) -> None:
        """Nothing to do."""


class Steered:
    """A coefficient that follows what it acts on; its state is kept in checkpoints."""

    value: float

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = float(state["value"])


class AdaptiveKL(Steered):
    """Steers the KL toward a target (1909.08593): ``beta *= 1 + clip(KL / target - 1, -0.2, 0.2) * rows / horizon``."""

    def __init__(self, value: float, *, target: float, horizon: int) -> None:
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, measured: float, num_rows: int) -> None:
        """``measured`` is the mean KL per token of the step."""
        error = min(max(measured / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * min(num_rows / self.horizon, 1.0)


class AdaptiveEntropy(Steered):
    """Raises the entropy bonus while the entropy is at or below a target, lowers it above (Skywork-OR1, 2505.22312).

    The bonus acts only while the entropy of the last step was at or below the target: ``value`` is 0 elsewhere.
    """

    def __init__(self, coefficient: float, *, target: float, delta: float, maximum: float) -> None:
        self.coefficient, self.target, self.delta, self.maximum = coefficient, target, delta, maximum
        self.value = 0.0

    def update(self, measured: float, num_rows: int) -> None:
        """``measured`` is the mean entropy per token of the step, in nats."""
        low = measured <= self.target
        self.coefficient = min(max(self.coefficient + (self.delta if low else -self.delta), 0.0), self.maximum)
        self.value = self.coefficient if low else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.coefficient = float(state["coefficient"])
