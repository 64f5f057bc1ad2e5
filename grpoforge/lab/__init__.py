"""The laboratory: what KL estimators, advantages and losses are worth, measured where the truth is known.

Policies are so small that every completion can be enumerated, so expected values, their gradients and variances are
sums without sampling error; the few that are sampled say so and state their standard error. Any installed component is
measured, anybody's:

    from grpoforge.lab import measure
    from grpoforge.plugins import load_plugins

    report = measure(load_plugins().registry.list("kl"))

On the command line: ``grpoforge lab``.
"""

from __future__ import annotations

from grpoforge.lab.report import KINDS, Failure, LabReport, measure

__all__ = ["KINDS", "Failure", "LabReport", "measure"]
