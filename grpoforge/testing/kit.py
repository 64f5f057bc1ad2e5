"""How a rule is written, how it is run, and how two answers are compared.

A rule is a function of a subject. Its docstring is the promise; it returns what it saw, raises `Broken` with the values
that show the fault, or `NotApplicable` with the reason.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from grpoforge.declarations import declared
from grpoforge.errors import GrpoforgeError, PluginError, first_line
from grpoforge.registry import Component
from grpoforge.testing.report import Finding, Report, Status


class Broken(Exception):
    """The rule is broken: the text shows it."""


class Refused(Broken):
    """The component refused its data with a `GrpoforgeError`, which some rules allow."""


class NotApplicable(Exception):
    """The rule cannot be asked of this component: the text says why."""


@dataclass(frozen=True, kw_only=True)
class Subject(ABC):
    """A component under test, and the question that every answer is compared on."""

    component: Component
    options: Mapping[str, Any] = field(default_factory=dict)

    seconds: ClassVar[float] = 5.0
    """How long one answer may take."""
    wording: ClassVar[str] = "the data"
    """What the question is, in a sentence."""

    def build(self) -> Any:
        """A fresh instance with the options bound."""
        with foreign():
            return self.component.build(self.options)

    @abstractmethod
    def question(self) -> Any:
        """The data of a call, fresh and always the same."""

    @abstractmethod
    def answer(self, built: Any, question: Any) -> Any:
        """What ``built`` makes of ``question``, as tensors, numbers and text in lists and dicts.

        Raises:
            Broken: it raised, or returned what its kind cannot return.
        """

    def ask(self) -> Any:
        """The answer of a fresh instance."""
        return self.answer(self.build(), self.question())

    def declared(self, name: str, default: Any = None) -> Any:
        """What the function or class states as ``name``. See `grpoforge.declarations`."""
        return declared(self.component.factory, name, default)


S = TypeVar("S", bound=Subject, contravariant=True)
Check = Callable[[S], str]


@dataclass(frozen=True, kw_only=True)
class Rule(Generic[S]):
    """One promise of a contract."""

    name: str
    promise: str
    hint: str
    check: Check[S]
    decisive: bool
    """When it is broken or cannot be asked, no later rule can be."""

    def examine(self, subject: S) -> Finding:
        """What comes of the rule for ``subject``."""
        try:
            return self.finding("passed", self.check(subject))
        except Broken as fault:
            return self.finding("failed", str(fault))
        except NotApplicable as reason:
            return self.finding("not applicable", str(reason))

    def finding(self, status: Status, detail: str) -> Finding:
        """A finding of this rule."""
        return Finding(rule=self.name, promise=self.promise, hint=self.hint, status=status, detail=detail)


def rule(hint: str, *, decisive: bool = False) -> Callable[[Check[S]], Rule[S]]:
    """Make a rule of a function: its name is the rule's, its docstring the promise."""

    def make(check: Check[S]) -> Rule[S]:
        promise = inspect.cleandoc(check.__doc__ or "")
        return Rule(name=check.__name__, promise=promise, hint=hint, check=check, decisive=decisive)

    return make


def examine(rules: Sequence[Rule[S]], subject: S) -> Report:
    """The findings of ``rules``, in their order, for ``subject``. Global random states are as before afterwards."""
    findings: list[Finding] = []
    reason = ""
    with torch.random.fork_rng(devices=[]):
        for one in rules:
            if reason:
                findings.append(one.finding("not applicable", reason))
                continue
            found = one.examine(subject)
            findings.append(found)
            if one.decisive and found.status != "passed":
                reason = f"cannot be asked while `{one.name}` is broken" if found.status == "failed" else found.detail
    component = subject.component
    return Report(kind=component.kind, component=component.id, source=component.source, findings=tuple(findings))


@contextlib.contextmanager
def foreign() -> Iterator[None]:
    """Foreign code runs inside: what it raises is its fault."""
    try:
        yield
    except PluginError as error:
        raise Broken(error.message) from error
    except GrpoforgeError as error:
        raise Refused(f"refused it: {error.message}") from error
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
        raise Broken(f"raised {type(error).__name__}: {first_line(error)} ({place})") from error


def expect_same(found: Any, expected: Any, what: str, *, tolerance: float = 0.0) -> None:
    """Raise `Broken` unless the answers are equal, numbers up to ``tolerance * (1 + |expected|)``."""
    if place := difference(found, expected, tolerance):
        raise Broken(f"{what}: {place}")


def difference(found: Any, expected: Any, tolerance: float = 0.0, place: str = "") -> str:
    """Where two answers differ and by what, empty when they do not; NaN equals NaN."""
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        return _tensor_difference(found, expected, tolerance, place)
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        if found.keys() != expected.keys():
            return f"{place or 'keys'} {sorted(map(str, found))} against {sorted(map(str, expected))}"
        pairs: list[tuple[Any, Any, str]] = [(found[name], expected[name], f"{place} `{name}`") for name in found]
    elif isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return f"{place} {len(found)} values against {len(expected)}".strip()
        pairs = [
            (one, other, f"{place}[{index}]") for index, (one, other) in enumerate(zip(found, expected, strict=True))
        ]
    else:
        return "" if _equal(found, expected, tolerance) else f"{place} {show(found)} against {show(expected)}".strip()
    return next((text for one, other, at in pairs if (text := difference(one, other, tolerance, at.strip()))), "")


def _equal(found: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(found, float) and isinstance(expected, float):
        both_nan = math.isnan(found) and math.isnan(expected)
        return both_nan or found == expected or abs(found - expected) <= tolerance * (1 + abs(expected))
    return bool(found == expected)


def _tensor_difference(found: Tensor, expected: Tensor, tolerance: float, place: str) -> str:
    if found.shape != expected.shape:
        return f"{place} shape {list(found.shape)} against {list(expected.shape)}".strip()
    one, other = found.detach().double(), expected.detach().double()
    gap = (one - other).abs() / (1 + other.abs())
    gap = torch.where(
        (one == other) | (one.isnan() & other.isnan()), 0.0, gap.nan_to_num(nan=math.inf, posinf=math.inf)
    )
    if not gap.numel() or float(gap.max()) <= tolerance:
        return ""
    index = tuple(int(i) for i in (gap == gap.max()).nonzero()[0])
    at = f"{place}[{', '.join(map(str, index))}]"
    return f"{at} is {float(one[index]):.6g}, not {float(other[index]):.6g}"


def show(value: Any) -> str:
    """``value`` in a sentence, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
