"""What a check found: one finding per rule, and the report that a person, pytest and a script read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from grpoforge.sanitize import one_line

Status = Literal["passed", "failed", "not applicable"]

MAX_CHARS = 400
"""Of a detail: it may quote what a component said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What came of one rule."""

    rule: str
    """The name of the function that checks it."""
    promise: str
    """What the rule asks of the component, in one sentence."""
    hint: str
    """What to do when it is broken."""
    status: Status
    detail: str
    """The values that show the fault, the reason why the rule does not apply, or what was seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the rules found in one component. ``assert report.kept, report`` is a whole test."""

    kind: str
    component: str
    """Its id, ``plugin:name``."""
    source: str
    """``file:line``."""
    findings: tuple[Finding, ...]

    @property
    def kept(self) -> bool:
        """True when no rule is broken."""
        return not self.broken

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The broken rules, in the order in which they were checked."""
        return tuple(one for one in self.findings if one.status == "failed")

    def __str__(self) -> str:
        """A line per rule; a broken one with its promise and a hint. Plain text, safe to show."""
        width = max((len(one.rule) for one in self.findings), default=0)
        lines = [f"{self.kind} {self.component}  {self.source}"]
        for one in self.findings:
            mark = {"passed": "passed", "failed": "BROKEN", "not applicable": "n/a"}[one.status]
            lines.append(f"  {mark:<7} {one.rule:<{width}}  {one_line(one.detail, MAX_CHARS)}".rstrip())
            if one.status == "failed":
                lines += [f"{'':<10}{'':<{width}}  {text}" for text in (one.promise, f"hint: {one.hint}")]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "kind": self.kind,
            "id": self.component,
            "source": self.source,
            "kept": self.kept,
            "findings": [asdict(one) for one in self.findings],
        }
