"""Seeded grade-school word problems in GSM8K's format, with splits that cannot overlap.

A row has two columns. `question` is the story; `answer` is the worked solution, one step a line with
GSM8K's calculator annotations, closed by the final line `#### N`:

    Tom has 14 + 3 = <<14+3=17>>17 apples.
    #### 17

Which split a question belongs to is a function of the question alone (`split_of`): a hash of its normal
form, in which names and things are masked. The generator throws away what falls in the other split, so a
held-out question differs from every training question in its story or its numbers, never only in who
owns what.
"""

import hashlib
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

SPLITS: Final = ("train", "test")
HELD_OUT_ONE_IN: Final = 5
# Fresh draws tried before a repeated question is accepted: far above what a non-exhausted space needs.
MAX_REDRAWS: Final = 2000

NAMES: Final = (
    "Tom", "Ann", "Ben", "Mia", "Sam", "Eva", "Leo", "Zoe", "Max", "Lily", "Jack", "Nina",
    "Omar", "Ruth", "Carl", "Ivy",
)  # fmt: skip
ITEMS: Final = (
    "apples", "pens", "books", "cards", "coins", "shells", "stamps", "marbles", "eggs", "balls",
    "cookies", "stickers",
)  # fmt: skip

_NAME_WORD = re.compile(r"\b(?:" + "|".join(NAMES) + r")\b")
_ITEM_WORD = re.compile(r"\b(?:" + "|".join(ITEMS) + r")\b")
_ANNOTATION = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class StepPlan:
    """One step of a kind: a sentence with `@` where the calculation goes, and the calculation.

    `left` and `right` name the operands: `a`, `b`, `c` are the numbers of the story, `r1` is the result
    of the first step. Drawn numbers whose result falls outside `low..high` are thrown away.
    """

    sentence: str
    left: str
    op: str
    right: str
    low: int = 2
    high: int = 99


@dataclass(frozen=True)
class Kind:
    """A family of problems: the story, its steps and the inclusive range of each number."""

    name: str
    story: str
    plans: tuple[StepPlan, ...]
    ranges: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Step:
    """A calculated step: `sentence` has `@` where `left op right = result` is written."""

    sentence: str
    left: int
    op: str
    right: int
    result: int

    def text(self, annotated: bool) -> str:
        """The step as a line of text, with GSM8K's `<<l+r=n>>` before the result if `annotated`."""
        note = f"<<{self.left}{self.op}{self.right}={self.result}>>" if annotated else ""
        calculation = f"{self.left} {self.op} {self.right} = {note}{self.result}"
        return self.sentence.replace("@", calculation)


@dataclass(frozen=True)
class Problem:
    """A problem with everything needed to write its solution, right or otherwise."""

    kind: Kind
    question: str
    words: Mapping[str, str]
    numbers: Mapping[str, int]
    steps: tuple[Step, ...]

    @property
    def result(self) -> int:
        """The right final number."""
        return self.steps[-1].result

    def solution(self, annotated: bool = False) -> str:
        """The worked solution ending in `#### N`; a model is taught the plain one (shorter to sample)."""
        return solution_text(self.steps, annotated)

    def row(self) -> dict[str, str]:
        """The problem as a GSM8K row."""
        return {"question": self.question, "answer": self.solution(annotated=True)}


def _one_step(name: str, story: str, plan: StepPlan, a: tuple[int, int], b: tuple[int, int]) -> Kind:
    return Kind(name, story, (plan,), {"a": a, "b": b})


def _two_steps(name: str, story: str, plans: tuple[StepPlan, StepPlan], *ranges: tuple[int, int]) -> Kind:
    return Kind(name, story, plans, dict(zip("abc", ranges, strict=False)))


_ONE_STEP_KINDS: Final = (
    _one_step(
        "finds_more",
        "{name} has {a} {item}. {name} finds {b} more. How many {item} does {name} have now?",
        StepPlan("{name} has @ {item}.", "a", "+", "b"),
        (5, 50),
        (2, 20),
    ),
    _one_step(
        "together",
        "{name} has {a} {item} and {friend} has {b} {item}. How many {item} do they have together?",
        StepPlan("They have @ {item}.", "a", "+", "b"),
        (2, 40),
        (2, 20),
    ),
    _one_step(
        "gives_away",
        "{name} has {a} {item}. {name} gives {b} to {friend}. How many {item} does {name} have left?",
        StepPlan("{name} has @ {item} left.", "a", "-", "b"),
        (8, 60),
        (2, 20),
    ),
    _one_step(
        "compares",
        "{name} has {a} {item}. {friend} has {b}. How many more {item} does {name} have?",
        StepPlan("{name} has @ more {item}.", "a", "-", "b", low=10),
        (20, 60),
        (2, 20),
    ),
    _one_step(
        "boxes",
        "There are {a} boxes with {b} {item} in each box. How many {item} are there?",
        StepPlan("There are @ {item}.", "a", "*", "b"),
        (2, 9),
        (2, 12),
    ),
    _one_step(
        "price",
        "{name} buys {b} {item} for {a} dollars each. How many dollars does {name} pay?",
        StepPlan("{name} pays @ dollars.", "a", "*", "b"),
        (2, 9),
        (3, 12),
    ),
    _one_step(
        "pages",
        "{name} reads {a} pages a day. How many pages does {name} read in {b} days?",
        StepPlan("{name} reads @ pages.", "a", "*", "b"),
        (3, 12),
        (2, 9),
    ),
)

_TWO_STEP_KINDS: Final = (
    _two_steps(
        "finds_then_gives",
        "{name} has {a} {item}, finds {b} more and gives {c} away. How many {item} are left?",
        (StepPlan("First @ {item}.", "a", "+", "b"), StepPlan("Then @ {item}.", "r1", "-", "c")),
        (5, 40), (2, 20), (2, 12),
    ),
    _two_steps(
        "bags_and_more",
        "{name} has {a} bags of {b} {item} and {c} more {item}. How many {item} does {name} have?",
        (StepPlan("The bags hold @ {item}.", "a", "*", "b"), StepPlan("In all @ {item}.", "r1", "+", "c")),
        (2, 9), (2, 9), (2, 12),
    ),
    _two_steps(
        "bags_and_fewer",
        "{name} has {a} bags of {b} {item} and loses {c}. How many {item} does {name} still have?",
        (
            StepPlan("The bags hold @ {item}.", "a", "*", "b"),
            StepPlan("{name} still has @ {item}.", "r1", "-", "c", low=10),
        ),
        (3, 9), (3, 9), (2, 12),
    ),
    _two_steps(
        "change",
        "{name} has {c} dollars and buys {a} {item} for {b} dollars each. How many dollars remain?",
        (
            StepPlan("The {item} cost @ dollars.", "a", "*", "b"),
            StepPlan("There remain @ dollars.", "c", "-", "r1", low=10),
        ),
        (2, 9), (2, 9), (20, 54),
    ),
    _two_steps(
        "has_more_total",
        "{name} has {a} {item}. {friend} has {b} more than {name}. How many {item} do both have?",
        (StepPlan("{friend} has @ {item}.", "a", "+", "b"), StepPlan("Both have @ {item}.", "a", "+", "r1")),
        (2, 40), (2, 15),
    ),
    _two_steps(
        "has_fewer_total",
        "{name} has {a} {item}. {friend} has {b} fewer than {name}. How many {item} do both have?",
        (
            StepPlan("{friend} has @ {item}.", "a", "-", "b", low=10),
            StepPlan("Both have @ {item}.", "a", "+", "r1"),
        ),
        (15, 40), (2, 15),
    ),
    _two_steps(
        "loses_twice",
        "{name} has {a} {item}, loses {b} and sells {c}. How many {item} does {name} keep?",
        (
            StepPlan("First @ {item}.", "a", "-", "b", low=10),
            StepPlan("{name} keeps @ {item}.", "r1", "-", "c", low=10),
        ),
        (20, 80), (2, 12), (2, 12),
    ),
    _two_steps(
        "two_colours",
        "Each of {c} boxes holds {a} red and {b} blue {item}. How many {item} are in the boxes?",
        (
            StepPlan("A box holds @ {item}.", "a", "+", "b"),
            StepPlan("The boxes hold @ {item}.", "r1", "*", "c"),
        ),
        (2, 6), (2, 6), (2, 8),
    ),
    _two_steps(
        "three_days",
        "{name} collects {a} {item} on Monday, {b} on Tuesday and {c} on Friday. How many {item} is that?",
        (StepPlan("First @ {item}.", "a", "+", "b"), StepPlan("In all @ {item}.", "r1", "+", "c")),
        (2, 30), (2, 20), (2, 12),
    ),
)  # fmt: skip

KINDS: Final[tuple[Kind, ...]] = _ONE_STEP_KINDS + _TWO_STEP_KINDS

_OPERATIONS: Final = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
}


def solution_text(steps: tuple[Step, ...], annotated: bool = False) -> str:
    """The steps one a line and the final line `#### N`, N being the last result."""
    lines = [step.text(annotated) for step in steps]
    return "\n".join([*lines, f"#### {steps[-1].result}"])


def strip_annotations(answer: str) -> str:
    """`answer` without GSM8K's `<<...>>` calculator annotations."""
    return _ANNOTATION.sub("", answer)


def normal_form(question: str) -> str:
    """`question` with names and things masked, in lower case, white space collapsed; numbers stay."""
    masked = _ITEM_WORD.sub("thing", _NAME_WORD.sub("someone", question))
    return " ".join(masked.lower().split())


def split_of(question: str) -> str:
    """The split, "train" or "test", that `question` belongs to; a fifth of all questions are "test"."""
    digest = hashlib.sha256(normal_form(question).encode("utf-8")).digest()
    return "test" if int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0 else "train"


def work_out(
    kind: Kind, numbers: Mapping[str, int], words: Mapping[str, str], ops: tuple[str, ...] | None = None
) -> tuple[Step, ...]:
    """The steps of `kind` on `numbers`, with `ops` in place of the kind's own operations if given."""
    values = dict(numbers)
    steps = []
    for index, plan in enumerate(kind.plans):
        op = plan.op if ops is None else ops[index]
        left, right = values[plan.left], values[plan.right]
        result = _OPERATIONS[op](left, right)
        values[f"r{index + 1}"] = result
        steps.append(Step(plan.sentence.format(**words), left, op, right, result))
    return tuple(steps)


def draw_problem(rng: random.Random) -> Problem:
    """One problem of a kind drawn evenly, of either split; every result lies in its plan's bounds."""
    kind = rng.choice(KINDS)
    name, friend = rng.sample(NAMES, 2)
    words = {"name": name, "friend": friend, "item": rng.choice(ITEMS)}
    while True:
        numbers = {key: rng.randint(low, high) for key, (low, high) in kind.ranges.items()}
        steps = work_out(kind, numbers, words)
        if all(plan.low <= step.result <= plan.high for plan, step in zip(kind.plans, steps, strict=True)):
            return Problem(kind, kind.story.format(**words, **numbers), words, numbers, steps)


def _draw_from(split: str, rng: random.Random) -> Problem:
    while True:
        problem = draw_problem(rng)
        if split_of(problem.question) == split:
            return problem


def sample_problems(split: str, count: int, seed: int) -> list[Problem]:
    """`count` problems of `split`, the same ones for the same arguments on every machine.

    No question comes twice unless `MAX_REDRAWS` draws in a row bring nothing new.

    Raises ValueError for an unknown split or a negative count.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    if count < 0:
        raise ValueError(f"count must be zero or more, got {count}")
    # A string seed is hashed by SHA-512, so it does not depend on PYTHONHASHSEED.
    rng = random.Random(f"tiny-math:{split}:{seed}")
    seen: set[str] = set()
    problems: list[Problem] = []
    while len(problems) < count:
        problem = _draw_from(split, rng)
        redraws = 0
        while problem.question in seen and redraws < MAX_REDRAWS:
            problem = _draw_from(split, rng)
            redraws += 1
        seen.add(problem.question)
        problems.append(problem)
    return problems


def generate(split: str, count: int, seed: int) -> list[dict[str, str]]:
    """`count` GSM8K rows (`question`, `answer`) of `split`, "train" or "test"; see `sample_problems`."""
    return [problem.row() for problem in sample_problems(split, count, seed)]
