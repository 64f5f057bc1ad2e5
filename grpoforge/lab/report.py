"""Every component measured, those that failed with their reason, and the whole as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from grpoforge.errors import GrpoforgeError
from grpoforge.lab import advantages, kl, losses
from grpoforge.lab.advantages import AdvantageRow, measure_advantage
from grpoforge.lab.kl import KLRow, measure_kl
from grpoforge.lab.losses import LossRow, measure_loss
from grpoforge.lab.moments import Estimate
from grpoforge.registry import Component, Kind
from grpoforge.testing.kit import Broken

KINDS: tuple[Kind, ...] = ("kl", "advantage", "loss")
"""What is measured."""
SCHEMA = 1
SAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A component that could not be measured."""

    kind: Kind
    id: str
    source: str
    """``file:line``."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LabReport:
    """What was found; equal components, samples and seed give equal reports."""

    samples: int
    seed: int
    kl: tuple[KLRow, ...] = ()
    advantage: tuple[AdvantageRow, ...] = ()
    loss: tuple[LossRow, ...] = ()
    failed: tuple[Failure, ...] = ()
    exact_ratio: tuple[Estimate, ...] = ()
    """At each gap of the losses: the estimate without bias, for comparison; empty without losses."""

    def as_json(self) -> dict[str, Any]:
        """The report, and the settings that its figures belong to, as JSON values."""
        return {
            "schema": SCHEMA,
            "samples": self.samples,
            "seed": self.seed,
            "kl": {"exact": _exact_kl(), "rows": [asdict(row) for row in self.kl]},
            "advantage": {
                "difficulties": [*advantages.DIFFICULTIES],
                "exact_groups": [*advantages.EXACT_GROUPS],
                "sampled_groups": [*advantages.SAMPLED_GROUPS],
                "rows": [_advantage_json(row) for row in self.advantage],
            },
            "loss": {
                "gaps": [*losses.GAPS],
                "divergences": [losses.at_gap(size).divergence for size in losses.GAPS],
                "exact_ratio": [asdict(one) for one in self.exact_ratio],
                "rows": [asdict(row) | {"gaps": [asdict(one) for one in row.gaps]} for row in self.loss],
            },
            "failed": [asdict(one) for one in self.failed],
        }


def _exact_kl() -> dict[str, float]:
    return {
        "one_token": kl.setting(1, on_policy=True).reverse,
        "two_tokens": kl.setting(2, on_policy=True).reverse,
    }


def _advantage_json(row: AdvantageRow) -> dict[str, Any]:
    groups = {str(size): None if one is None else asdict(one) for size, one in row.groups.items()}
    return {
        "id": row.id,
        "name": row.name,
        "groups": groups,
        "weight_by_difficulty": [*row.weight_by_difficulty],
    }


def measure(
    components: Sequence[Component],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> LabReport:
    """What ``components`` are worth, in their order; one that fails is listed, and the others are measured.

    Args:
        components: KL estimators, advantages and losses.
        options: by component id; those of the signature where none are given.
        samples: batches that are drawn where not all can be enumerated.
        seed: what they are drawn from.
    """
    found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    failed: list[Failure] = []
    # A component that draws from torch's global generator must neither disturb the caller nor differ between runs.
    with torch.random.fork_rng(devices=[]):
        for component in components:
            torch.manual_seed(seed)
            try:
                row = _measure(component, (options or {}).get(component.id, {}), samples, seed)
                _check_finite(asdict(row))
            except (Broken, GrpoforgeError) as fault:
                failed.append(_failure(component, str(fault)))
            else:
                found[component.kind].append(row)
    return LabReport(
        samples=samples,
        seed=seed,
        kl=tuple(found["kl"]),
        advantage=tuple(found["advantage"]),
        loss=tuple(found["loss"]),
        failed=tuple(failed),
        exact_ratio=tuple(losses.with_exact_ratio(losses.at_gap(gap)) for gap in losses.GAPS) if found["loss"] else (),
    )


def _measure(
    component: Component, options: Mapping[str, Any], samples: int, seed: int
) -> KLRow | AdvantageRow | LossRow:
    assert component.kind in KINDS, f"a {component.kind} is not measured"
    if component.kind == "kl":
        return measure_kl(component, options)
    if component.kind == "advantage":
        return measure_advantage(component, options, samples=samples, seed=seed)
    return measure_loss(component, options, samples=samples, seed=seed)


def _check_finite(figures: Any) -> None:
    """Refuse figures that overflowed: of finite values a variance may still be infinite."""
    if isinstance(figures, Mapping):
        figures = [*figures.values()]
    if isinstance(figures, list | tuple):
        for one in figures:
            _check_finite(one)
    elif isinstance(figures, float) and not math.isfinite(figures):
        raise Broken("its values are too large: a mean or a variance is not finite")


def _failure(component: Component, reason: str) -> Failure:
    return Failure(kind=component.kind, id=component.id, source=component.source, reason=reason)
