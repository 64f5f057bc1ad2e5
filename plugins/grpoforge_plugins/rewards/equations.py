"""The arithmetic that a text states: every ``a op b = c``, checked exactly.

Read are numbers (grouped, decimal, with currency, percent sign and unit), ``+ - * / x × ÷``, their LaTeX forms,
parentheses, ``20% of 50``, and chains: ``2 * 3 + 4 = 6 + 4 = 10`` is one equation of the operands 2, 3 and 4 with the
result 10, which holds when all its sides agree. Words in front of an expression and units behind a number are passed
over, so ``She sells 16 eggs - 3 eggs = 13 eggs`` is ``16 - 3 = 13``. GSM8K's calculator annotations are equations too.

A percent sign may mean a hundredth or be a unit: an equation holds when it does in one of the two readings. A result
with decimals holds when it is right as far as it is written (``100 / 3 = 33.33``). Numbers of more than `MAX_DIGITS`
digits and expressions of more than `MAX_TOKENS` tokens are not read.

Cost: linear in the text. Nothing is evaluated but the four operations on `Fraction`, on two stacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["Equation", "find_equations", "plain_number"]

MAX_DIGITS = 15
MAX_TOKENS = 40
MAX_UNIT_WORDS = 3

_ANNOTATION = re.compile(r"<<([^<>\n]{0,200})>>")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]{1,40})\}\{([^{}]{1,40})\}")
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox|boxed)\{([^{}]{0,80})\}")
_PLAIN = {
    **dict.fromkeys(("\\times", "\\cdot", "×", "·", "∗"), "*"),
    **dict.fromkeys(("\\div", "÷"), "/"),
    **dict.fromkeys(("\\left", "\\right", "\\,", "\\;", "\\!", "\\ ", "**", "`", "\u00a0", "\u202f"), ""),
    **dict.fromkeys(("\\(", "\\)", "\\[", "\\]", "$$"), "\n"),
    **{"\\$": "$", "\\%": "%", "{,}": ",", "\u2212": "-", "–": "-", "\\approx": "=", "≈": "=", "&": " "},
}
_TOKEN = re.compile(
    r"""(?P<number>[$€£¥]?
            (?: [0-9]{1,4}[ ][0-9]{1,3}/[0-9]{1,3}(?![0-9/])
              | [0-9]{1,3}(?:[, ][0-9]{3})+(?![0-9])(?:\.[0-9]+)?
              | [0-9]+(?:\.[0-9]+)?
              | \.[0-9]+)
            (?P<percent>[ ]?%|[ ]percent\b)?)
      | (?P<operator>[-+*/]|(?<![A-Za-z])[xX](?=[ ]?[-$€£(]?[.0-9]))
      | (?P<equals>=)
      | (?P<parenthesis>[()])
      | (?P<word>/?[A-Za-z]{2}[A-Za-z'\u2019/-]*)
      | (?P<space>[ \t$€£¥]+)
      | (?P<stop>.|\n)  # a single letter, too: a variable""",
    re.VERBOSE,
)
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2}


@dataclass(frozen=True, slots=True)
class Equation:
    """One stated equation."""

    operands: tuple[Fraction, ...]
    """The numbers of its first side that computes something, without signs, zeros, and ones that multiply."""
    factors: frozenset[Fraction]
    """Those that multiply, divide or are divided."""
    result: Fraction
    """What its last side is worth, as it is written."""
    holds: bool

    @property
    def num_operations(self) -> int:
        """How often it computes something: ``5 + 0`` and ``2 * 1`` do not."""
        return max(0, len(self.operands) - 1)

    @property
    def is_trivial(self) -> bool:
        """Whether it leads nowhere: it computes nothing, or cancels what it adds (``5 + 3 - 3 = 5``)."""
        rest = list(self.operands)
        if self.result in rest:
            rest.remove(self.result)
        return self.num_operations == 0 or (len(set(rest)) < len(rest) < len(self.operands))

    @property
    def key(self) -> tuple[Fraction, ...]:
        """Equal for equations that say the same: ``9 * 2 = 18`` and ``2 * 9 = 18``."""
        return (*sorted(self.operands), self.result)

    @property
    def relation(self) -> tuple[Fraction, ...]:
        """Equal for equations that also reverse one another: ``9 * 2 = 18`` and ``18 / 2 = 9``."""
        return tuple(sorted([*self.operands, abs(self.result)]))


@dataclass(frozen=True, slots=True)
class _Token:
    """A number, or one of ``+ - * / ( ) =``."""

    text: str
    value: Fraction = Fraction(0)
    is_percent: bool = False
    decimals: int = 0


def find_equations(text: str) -> list[Equation]:
    """The equations that ``text`` states, in the order in which they end. Equal ones are all there."""
    found: list[Equation] = []
    annotations: list[str] = []

    def remember(match: re.Match[str]) -> str:
        annotations.append(match[1])
        return ""

    for line in text.splitlines():
        annotations.clear()
        rest = _ANNOTATION.sub(remember, line)
        for stated in (*annotations, rest):
            found += filter(None, map(_equation, _runs(_plain(stated))))
    return found


def plain_number(text: str) -> Fraction | None:
    """The value of a number as the scanner matches it (``$1,000.5``, ``1 1/2``); None for one with too many digits."""
    whole, slash, denominator = text.strip("$€£¥ ").replace(",", "").partition("/")
    if slash:
        whole, _, numerator = whole.partition(" ")
        return int(whole) + Fraction(int(numerator), int(denominator)) if int(denominator) else None
    digits = whole.replace(" ", "")
    return Fraction(digits) if len(digits) <= MAX_DIGITS + 1 else None


def _plain(line: str) -> str:
    line = _TEXT.sub(r" \1 ", _FRACTION.sub(r"(\1)/(\2)", line)) if "\\" in line else line
    for written, plain in _PLAIN.items():
        line = line.replace(written, plain)
    return line


def _runs(line: str) -> Iterator[list[_Token]]:
    """The longest stretches of ``line`` that could be equations, without words and units."""
    run: list[_Token] = []
    words = end = 0
    for match in _TOKEN.finditer(line):
        kind, text = match.lastgroup, match[0]
        if kind == "space":
            continue
        if kind == "word" and _is_of(text, run):
            run.append(_Token("*"))
            continue
        if text == "(" and end == match.start() and _has_unit(run):  # 2(3 + 4)
            run.append(_Token("*"))
        end = match.end()
        words += kind == "word"
        token = _token(match) if kind not in ("word", "stop") else None
        follows = _may_follow(run, token, words) if token else kind == "word" and _has_unit(run)
        if not follows:
            yield run
            run = []
        if token and (follows or _may_follow([], token, 0)):
            run.append(token)
            words = 0
    yield run


def _token(match: re.Match[str]) -> _Token | None:
    if match["number"] is None:
        return _Token("*" if match[0] in "xX" else match[0])
    percent = match["percent"]
    written = match["number"].removesuffix(percent or "")
    value = plain_number(written)
    if value is None:
        return None
    return _Token("0", value, bool(percent), len(written.partition(".")[2]))


def _is_of(word: str, run: Sequence[_Token]) -> bool:
    """Whether ``word`` multiplies: in ``20% of`` and ``1/2 of``."""
    is_part = bool(run) and run[-1].text == "0" and (run[-1].is_percent or (len(run) > 1 and run[-2].text == "/"))
    return word == "of" and is_part


def _has_unit(run: Sequence[_Token]) -> bool:
    """Whether a word may stand behind ``run``: a number may have a unit, and so may a sum in parentheses."""
    return bool(run) and run[-1].text in ("0", ")")


def _may_follow(run: Sequence[_Token], token: _Token, words: int) -> bool:
    """Whether ``token`` continues ``run`` after so many words."""
    if len(run) > MAX_TOKENS or words > MAX_UNIT_WORDS:
        return False
    ended = bool(run) and run[-1].text in ("0", ")")
    if token.text in ("0", "("):
        return not ended
    if token.text in ("-", "+"):
        return ended or not run or run[-1].text in ("=", "(")
    return ended or (token.text == "=" and not run)


def _equation(run: Sequence[_Token]) -> Equation | None:
    """The equation that a run of tokens is; None when it is none."""
    sides: list[list[_Token]] = [[]]
    for token in run:
        if token.text == "=":
            sides.append([])
        else:
            sides[-1].append(token)
    sides = [_balanced(side, first=number == 0) for number, side in enumerate(sides) if side]
    computed = next((side for side in sides if _num_numbers(side) > 1), None)
    if computed is None or len(sides) < 2:
        return None
    result = _value(sides[-1], hundredths=False)
    if result is None:
        return None
    holds = any(_agree(sides, computed, hundredths) for hundredths in (True, False))
    factors = _factors(computed)
    operands = tuple(
        token.value
        for token in computed
        if token.text == "0" and token.value and not (token.value == 1 and token.value in factors)
    )
    return Equation(operands, factors, result, holds)


def _balanced(side: list[_Token], *, first: bool) -> list[_Token]:
    """A side without the parentheses that open or close around the whole equation: ``(2 + 3 = 5)``."""
    depth = sum((token.text == "(") - (token.text == ")") for token in side)
    if first and depth > 0 and all(token.text == "(" for token in side[:depth]):
        return side[depth:]
    if not first and depth < 0 and all(token.text == ")" for token in side[depth:]):
        return side[:depth]
    return side


def _num_numbers(side: Sequence[_Token]) -> int:
    return sum(token.text == "0" for token in side)


def _factors(side: Sequence[_Token]) -> frozenset[Fraction]:
    """The numbers next to ``*`` or ``/``."""
    found = set()
    for number, token in enumerate(side):
        around = {side[place].text for place in (number - 1, number + 1) if 0 <= place < len(side)}
        if token.text == "0" and around & {"*", "/"}:
            found.add(token.value)
    return frozenset(found)


def _agree(sides: Sequence[list[_Token]], computed: list[_Token], hundredths: bool) -> bool:
    """Whether every side is worth what ``computed`` is, as far as it is written."""
    expected = _value(computed, hundredths)
    return expected is not None and all(_is_worth(side, expected, hundredths) for side in sides)


def _is_worth(side: list[_Token], expected: Fraction, hundredths: bool) -> bool:
    value = _value(side, hundredths)
    if value is None or value == expected:
        return value is not None
    number = side[-1]
    if _num_numbers(side) > 1 or not number.decimals:
        return False
    unit = Fraction(1, 10**number.decimals) / (100 if hundredths and number.is_percent else 1)
    return abs(value - expected) <= unit / 2


def _value(side: Sequence[_Token], hundredths: bool) -> Fraction | None:
    """What an expression is worth, a percent sign read as a hundredth or as a unit; None when it is not well formed."""
    values: list[Fraction] = []
    operators: list[str] = []
    before = "("
    for token in side:
        if token.text == "0":
            values.append(token.value / 100 if hundredths and token.is_percent else token.value)
        elif token.text == "(":
            operators.append("(")
        elif token.text == ")":
            if not _reduce(values, operators, 1) or not operators:
                return None
            operators.pop()
        else:
            if before in ("(", "="):  # a sign
                values.append(Fraction(0))
            if not _reduce(values, operators, _PRECEDENCE[token.text]):
                return None
            operators.append(token.text)
        before = token.text
    return values[0] if _reduce(values, operators, 0) and len(values) == 1 and not operators else None


def _reduce(values: list[Fraction], operators: list[str], precedence: int) -> bool:
    """Apply the operators on top that bind at least as closely; False where there is nothing to apply them to."""
    while operators and operators[-1] != "(" and _PRECEDENCE[operators[-1]] >= precedence:
        operator = operators.pop()
        if len(values) < 2 or (operator == "/" and values[-1] == 0):
            return False
        right, left = values.pop(), values.pop()
        if operator in "+-":
            values.append(left + right if operator == "+" else left - right)
        else:
            values.append(left * right if operator == "*" else left / right)
    return True
