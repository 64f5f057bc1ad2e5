"""Pairs of a right and a spoiled solution, from worked problems in GSM8K's format."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from grpoforge.data import usable
from grpoforge.errors import DataError
from grpoforge.sources import Row, read_path
from grpoforge_plugins.preference.pairs import Pair, write_pairs

__all__ = ["KINDS", "Solved", "corrupted_pairs", "make_pairs", "read_solution"]

_ANNOTATION = re.compile(r"<<[^<>\n]*?=(?P<result>[^<>\n=]*)>>")
_LAST_LINE = re.compile(r"\n####[ ]*[^\n]+\s*\Z")
_NUMBER = re.compile(r"(?<![\d.,])\d+(?:\.\d+)?(?![\d.,]*\d)")


@dataclass(frozen=True, slots=True)
class Solved:
    """A problem and its worked solution."""

    question: str
    steps: tuple[str, ...]
    """Lines of working, without annotations."""
    results: tuple[str, ...]
    """What each line comes to, as written in it; empty where it calculates nothing."""
    answer: str
    """The last line: ``#### 72``."""

    @property
    def solution(self) -> str:
        """The whole solution."""
        return "\n".join((*self.steps, self.answer))


def read_solution(question: str, answer: str) -> Solved:
    """A GSM8K row: lines with calculations as ``48/2 = <<48/2=24>>24``, then ``#### 72``."""
    *lines, last = answer.strip().split("\n")
    found = [list(_ANNOTATION.finditer(line)) for line in lines]
    results = [matches[-1]["result"] if matches else "" for matches in found]
    steps = [_ANNOTATION.sub("", line).strip() for line in lines]
    return Solved(question=question, steps=tuple(steps), results=tuple(results), answer=last)


def wrong_number(problem: Solved, other: Solved, dice: random.Random) -> str | None:
    """One result is another number where it is worked out; whatever follows goes on with the right one."""
    places = [number for number, result in enumerate(problem.results) if _NUMBER.fullmatch(result)]
    if not places:
        return None
    place = dice.choice(places)
    result, steps = problem.results[place], list(problem.steps)
    found = [match for match in _NUMBER.finditer(steps[place]) if match[0] == result]
    if not found:
        return None
    start, end = found[-1].span()
    steps[place] = steps[place][:start] + _another(result, dice) + steps[place][end:]
    return "\n".join((*steps, problem.answer))


def _another(number: str, dice: random.Random) -> str:
    """A number near ``number``, written with as many decimals: never ``number`` itself, never below 0."""
    _, point, decimals = number.partition(".")
    unit = 10 ** len(decimals)
    value = round(float(number) * unit)
    reach = max(3, value // 2)
    other = value
    while other == value:
        other = max(0, value + dice.randint(-reach, reach))
    return f"{other / unit:.{len(decimals)}f}" if point else str(other)


def dropped_step(problem: Solved, other: Solved, dice: random.Random) -> str | None:
    """One step before the last is missing."""
    if len(problem.steps) < 2:
        return None
    place = dice.randrange(len(problem.steps) - 1)
    return "\n".join((*problem.steps[:place], *problem.steps[place + 1 :], problem.answer))


def foreign_step(problem: Solved, other: Solved, dice: random.Random) -> str | None:
    """A step of another problem stands between its own."""
    if not other.steps or not problem.steps:
        return None
    place = dice.randrange(len(problem.steps))
    return "\n".join((*problem.steps[:place], dice.choice(other.steps), *problem.steps[place:], problem.answer))


def other_solution(problem: Solved, other: Solved, dice: random.Random) -> str | None:
    """The solution of another problem."""
    return other.solution


Kind = Literal["wrong_number", "dropped_step", "foreign_step", "other_solution"]
Corruption = Callable[[Solved, Solved, random.Random], str | None]

KINDS: dict[Kind, Corruption] = {
    "wrong_number": wrong_number,
    "dropped_step": dropped_step,
    "foreign_step": foreign_step,
    "other_solution": other_solution,
}
"""How a solution is spoiled, by the name that figures are told apart by. Two make it shorter or longer, two do not: the
length of a solution says little about which one is right."""


def corrupted_pairs(
    problems: Sequence[Solved], *, seed: int, kinds: Sequence[Kind] = tuple(KINDS), per_problem: int = 1
) -> list[Pair]:
    """``per_problem`` pairs of each problem: its solution, and the same spoiled in one of ``kinds``, in turn.

    A problem that cannot be spoiled in that way has a pair less. Equal arguments give equal pairs.
    """
    dice, pairs = random.Random(seed), []
    for number, problem in enumerate(problems):
        for turn in range(per_problem):
            kind = kinds[(number + turn) % len(kinds)]
            spoiled = KINDS[kind](problem, _another_of(problems, number, dice), dice)
            if spoiled is not None and spoiled != problem.solution:
                pairs.append(Pair(problem.question, problem.solution, spoiled, kind=kind))
    return pairs


def _another_of(problems: Sequence[Solved], number: int, dice: random.Random) -> Solved:
    """Any problem but the one at ``number``."""
    place = dice.randrange(len(problems) - 1)
    return problems[place + (place >= number)]


def make_pairs(
    problems: Path,
    output: Path,
    *,
    kinds: Annotated[list[Kind], Field(min_length=1), "how solutions are spoiled, in turn"] = list(KINDS),  # noqa: B006
    per_problem: Annotated[int, Field(ge=1), "pairs of each problem"] = 1,
    num_problems: Annotated[int | None, Field(ge=2), "take the first ones only"] = None,
    seed: Annotated[int, Field(ge=0), "fixes what is spoiled and how"] = 0,
) -> dict[str, Any]:
    """Write the pairs of a file of worked problems (columns question and answer); returns their number by kind.

    Raises:
        DataError: the file cannot be used.
    """
    rows = usable(read_path(str(problems)), ("question", "answer"), str(problems), skip=False)[:num_problems]
    solved = [_read_row(row) for row in rows]
    if len(solved) < 2:
        raise DataError(f"{problems} has one problem", "give two at least: a mistake may be a step of another one")
    pairs = corrupted_pairs(solved, seed=seed, kinds=kinds, per_problem=per_problem)
    try:
        write_pairs(output, pairs)
    except OSError as error:
        raise DataError(f"{output} cannot be written: {error.strerror}", "give a file in a folder of yours") from None
    counts = Counter(pair.kind for pair in pairs)
    return {"problems": len(solved), "pairs": len(pairs), "kinds": dict(sorted(counts.items())), "output": str(output)}


def _read_row(row: Row) -> Solved:
    answer = row.columns["answer"]
    if not isinstance(answer, str) or not _LAST_LINE.search(answer):
        raise DataError(
            f"{row.origin}: column `answer` does not end with a line `#### NUMBER`",
            "give solutions as GSM8K has",
        )
    return read_solution(row.columns["question"], answer)
