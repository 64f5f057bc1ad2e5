"""Does the work lead to the answer?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Annotated

from pydantic import Field

from grpoforge_plugins.rewards.answers import extract_answer
from grpoforge_plugins.rewards.equations import Equation, find_equations, plain_number

__all__ = ["given_numbers", "reasoning"]

MAX_CHARS = 16_384
MAX_PROMPT_CHARS = 8_192

_NUMBER = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
_PARTS = re.compile(r"([0-9]{1,4})/([1-9][0-9]{0,3})")
_WORD = re.compile(r"[a-z]+")
_POWERS = Fraction(100), Fraction(1, 100)
"""Dollars to cents and percent to shares, and back."""

_NUMERALS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15,
    "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40,
    "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90, "hundred": 100, "thousand": 1_000,
    "million": 1_000_000,
}  # fmt: skip
_IMPLIED: dict[str, tuple[str, ...]] = {
    "half halves halved twice double doubled doubles both couple pair pairs": ("2", "1/2", "50"),
    "third thirds triple tripled triples thrice": ("3", "1/3"),
    "quarter quarters fourth fourths quadruple": ("4", "1/4", "25"),
    "fifth fifths": ("5", "1/5"),
    "tenth tenths": ("10", "1/10"),
    "dozen dozens": ("12",),
    "nickel nickels": ("5", "1/20"),
    "dime dimes": ("10", "1/10"),
    "penny pennies": ("1/100",),
    "weekday weekdays monday friday": ("5",),
    "weekend weekends": ("2",),
    "april june july september october march": ("6",),
    "square squares rectangle rectangular": ("4",),
    "cube cubes": ("6",),
    "day days daily": ("7", "24", "30"),
    "week weeks weekly": ("7", "4", "52"),
    "month months monthly": ("12", "30", "31"),
    "year years yearly annual annually": ("12", "52", "365"),
    "hour hours hourly minute minutes": ("60", "24"),
    "foot feet inch inches": ("12",),
    "decade decades": ("10",),
    "percent dollar dollars cent cents": ("100",),
}
"""What a word brings beside its numeral."""

_MEANT = {word: tuple(map(Fraction, values)) for words, values in _IMPLIED.items() for word in words.split()}

_COMMON = frozenset(
    {Fraction(n) for n in (2, 3, 4, 5, 7, 8, 10, 12, 16, 24, 30, 31, 52, 60, 90, 100, 360, 365, 1000)}
    | {Fraction(1, n) for n in (2, 4, 10, 100)}
)
"""What one may multiply or divide by without being told: halves, weeks, dozens, hours, percent."""


def reasoning(
    prompts: Sequence[str],
    completions: Sequence[str],
    question: Sequence[object] | None = None,
    *,
    max_equations: Annotated[int, Field(ge=1), "different equations that may be stated without cost"] = 32,
) -> list[float | None]:
    """How well the stated arithmetic leads from the numbers of the prompt to the final answer, from 0 to 1.

    The *derivation* of a completion is what its answer (`answers.extract_answer`) rests on: the last equation with
    the answer as its result, the equations that its numbers are results of, and so on back to the prompt. Only
    equations that hold, compute something and say something new are in it. The reward is the product of

    * *grounds*: the share of the derivation's numbers that come from the prompt or from a derived result, squared.
      One may also multiply and divide by common factors (12, 60, 100); a derivation without any number of the prompt
      is worth nothing;
    * *truth*: of the derivation and the equations that do not hold, the share of the derivation;
    * *work*: 1/2 for a single operation where the prompt has more than two numbers;
    * *use*: 0.85, and 1 from where half of the prompt's numbers are used;
    * *end*: 1/2 if an equation with another result follows, 1/2 if the last equation only reverses an earlier one;
    * *length*: ``max_equations`` divided by the number of different equations, at most 1.

    What is called the prompt here is the dataset's column ``question`` where there is one: worked examples and dates
    that a chat template writes are no numbers of the problem.

    0 without an answer or a derivation of it. None where the prompt states no number: there is nothing to judge by.
    Of a completion the last `MAX_CHARS` characters are read.
    """
    problems = list(prompts) if question is None else [str(one) for one in question]
    known = {problem: given_numbers(problem) for problem in dict.fromkeys(problems)}
    return [_reward(text, *known[one], max_equations) for one, text in zip(problems, completions, strict=True)]


def given_numbers(prompt: str) -> tuple[frozenset[Fraction], frozenset[Fraction]]:
    """The numbers that ``prompt`` states, and all that may be used because of it.

    The latter are those, their hundredths and hundredfolds (cents), what words imply (2 and 1/2 for `half`), and of
    shares, in percent or as ``a/b``, what they leave and make (1/5, 4/5 and 6/5 for 20%).
    """
    text = prompt[-MAX_PROMPT_CHARS:].lower()
    stated = {value for match in _NUMBER.finditer(text) if (value := plain_number(match[0])) is not None}
    words = _WORD.findall(text)
    stated |= _numerals(words)
    shares = {Fraction(int(match[1]), int(match[2])) for match in _PARTS.finditer(text)}
    if "%" in text or "percent" in text:
        shares |= {value / 100 for value in stated}
    usable = stated | {value * power for value in stated for power in _POWERS}
    for share in shares:
        usable |= {share, abs(1 - share), 1 + share, abs(100 - 100 * share), 100 + 100 * share}
    for word in set(words):
        usable.update(_MEANT.get(word, ()))
    return frozenset(stated), frozenset(usable)


def _numerals(words: Sequence[str]) -> set[Fraction]:
    """The numbers that ``words`` spell: ``twenty-five``, ``three hundred``."""
    found = {Fraction(_NUMERALS[word]) for word in words if word in _NUMERALS}
    for first, second in pairwise(words):
        left, right = _NUMERALS.get(first, 0), _NUMERALS.get(second, 0)
        if 20 <= left < 100 and 0 < right < 10:
            found.add(Fraction(left + right))
        if 0 < left < right and right >= 100:
            found.add(Fraction(left * right))
    return found


def _reward(text: str, stated: frozenset[Fraction], usable: frozenset[Fraction], max_equations: int) -> float | None:
    if not usable:
        return None
    answer = extract_answer(text)
    equations = _different(find_equations(text[-MAX_CHARS:]))
    if answer is None:
        return 0.0
    valid = [equation for equation in equations if equation.holds and not equation.is_trivial]
    derivation, grounds = _derive(answer, valid, stated or usable, usable)
    if not derivation:
        return 0.0
    false = sum(not equation.holds for equation in equations)
    used = {operand for equation in derivation for operand in equation.operands}
    operations = sum(equation.num_operations for equation in derivation)
    last, *before = derivation
    return (
        grounds**2
        * len(derivation)
        / (len(derivation) + false)
        * min(1.0, operations / (2 if len(stated) > 2 else 1))
        * min(1.0, 0.85 + 0.3 * len(stated & used) / max(1, len(stated)))
        * (1.0 if valid[-1] is last else 0.5)
        * (0.5 if any(last.relation == one.relation for one in before) else 1.0)
        * min(1.0, max_equations / len(equations))
    )


def _different(equations: Iterable[Equation]) -> list[Equation]:
    """Equations without those that repeat or reverse an earlier one."""
    first: dict[tuple[Fraction, ...], Equation] = {}
    for equation in equations:
        first.setdefault(equation.key, equation)
    return list(first.values())


def _derive(
    answer: Fraction, equations: Sequence[Equation], stated: frozenset[Fraction], usable: frozenset[Fraction]
) -> tuple[list[Equation], float]:
    """What ``answer`` rests on, last equation first, and the share of its numbers that have a ground, from 0 to 1."""
    last = next((n for n in reversed(range(len(equations))) if _is(answer, equations[n].result)), None)
    if last is None:
        return [], 0.0
    anchored = _anchored(equations, stated)
    if not anchored[last]:
        return [], 0.0
    origin = _origins(equations, anchored)
    pending, seen = [last], {last}
    credit = total = 0.0
    while pending:
        number = pending.pop()
        for operand in equations[number].operands:
            total += 1
            source = origin[number].get(operand)
            credit += _credit(operand, equations[number], usable, source is not None)
            if source is not None and source not in seen:
                seen.add(source)
                pending.append(source)
    return [equations[number] for number in sorted(seen, reverse=True)], credit / total


def _credit(operand: Fraction, equation: Equation, usable: frozenset[Fraction], is_derived: bool) -> float:
    if is_derived or operand in usable or (operand in _COMMON and operand in equation.factors):
        return 1.0
    return 0.5 if operand == 1 else 0.0


def _anchored(equations: Sequence[Equation], stated: frozenset[Fraction]) -> list[bool]:
    """Whether each equation rests, also through earlier ones, on a number of the prompt, and not on its own result."""
    known = {*stated} | {value * power for value in stated for power in _POWERS}
    anchored = []
    for equation in equations:
        is_circular = equation.result in equation.operands and equation.result not in known
        anchored.append(not is_circular and not known.isdisjoint(equation.operands))
        if anchored[-1]:
            known |= _readings(equation.result)
    return anchored


def _origins(equations: Sequence[Equation], anchored: Sequence[bool]) -> list[dict[Fraction, int]]:
    """For each equation, which earlier one each of its operands is the result of."""
    latest: dict[Fraction, int] = {}
    origins = []
    for number, equation in enumerate(equations):
        origins.append({operand: latest[operand] for operand in equation.operands if operand in latest})
        if anchored[number]:
            latest |= dict.fromkeys(_readings(equation.result), number)
    return origins


def _readings(result: Fraction) -> set[Fraction]:
    """What a result may be called later: without its sign, and as a percentage or a share."""
    return {abs(result), abs(result) * 100, abs(result) / 100}


def _is(answer: Fraction, result: Fraction) -> bool:
    return answer in (result, result * 100)
