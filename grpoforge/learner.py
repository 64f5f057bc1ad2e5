"""Components that learn from the run: what they must have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from grpoforge.types import StepReport


@runtime_checkable
class Learner(Protocol):
    """A component that learns from the steps of the run, such as a reward with a model of its own.

    The other two methods are called after every step, before its checkpoint, on every rank. All ranks learn from the
    same lessons, so that all end up with the same component.
    """

    def prepare(self) -> None:
        """Called once before the first step: load what will be needed, so that what is not there is missed at once."""
        ...

    def lessons(self, report: StepReport, name: str) -> Sequence[Any]:
        """What this rank's rows of the step teach: JSON values.

        ``name`` is what the run calls the component; a reward finds its own column by it in ``report.scores.names``.
        """
        ...

    def learn(self, lessons: Sequence[Any]) -> Mapping[str, float]:
        """Learn from the lessons of all ranks, rank after rank; returns metrics for the report of the step."""
        ...
