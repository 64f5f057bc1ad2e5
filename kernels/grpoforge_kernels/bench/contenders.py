"""Who is compared on a case: our backends and modes, and the peers, with the reason for each that cannot run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from grpoforge_kernels.bench.plan import Case
from grpoforge_kernels.bench.problems import Outcome, Problem

Step = Callable[[], Outcome]
"""Forward and backward, once."""

PLAIN_TORCH = "torch eager"
"""The plain torch path: its error stands beside ours."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    ``start`` binds it to a problem and returns its step; it imports what it needs and may compile. ``backend`` is the
    one that a step of ours forces, ``module`` what must be installed for it, ``devices`` where it runs. ``formula``
    states the extra memory that an own mode promises, in words and in bytes.
    """

    name: str
    start: Callable[[Problem], Step]
    ours: bool = False
    backend: str = ""
    module: str = "torch"
    package: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: bool = False
    formula: str = ""
    formula_bytes: int | None = None

    def unable(self, case: Case) -> str:
        """Why this cannot be measured on ``case`` here; empty when it can."""
        if case.device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if importlib.util.find_spec(self.module) is None:
            return f"{self.package} is not installed"
        return ""
