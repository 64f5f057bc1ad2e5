"""The final answer of a completion, as an exact number.

`extract_answer` knows where an answer is written, `parse_number` what a written number is worth. Both refuse
rather than guess: a completion that states two numbers has not answered.

Where (the first kind that occurs decides):

1. ``#### 18`` (GSM8K), anywhere in a line, to the end of the line. Several must state the same value.
   ``#### Step 1`` and ``#### 2. Add them up`` are headings and state nothing.
2. ``\\boxed{18}``. Several must state the same value.
3. ``answer is 18``, ``Answer: 18``, or ``A: 18`` at the start of a line, to the end of the sentence. The last
   counts: a later phrase corrects an earlier one.

What is not read: calculator annotations ``<<9*2=18>>``, everything up to the last ``</think>`` and after a
``<think>`` that is never closed, and all but the last `MAX_CHARS` characters.

What a number is worth: ``1,000`` and ``1 000`` are 1000 (complete groups of three only), ``3.0`` is 3,
``3/4`` and ``1 1/2`` are exact, ``4.2e1`` is 42. Currency, percent signs and trailing words are units and are
dropped: GSM8K writes a gold answer of twenty percent as 20, so ``400%`` is 400 and not 4. Full-width digits
and U+2212 are digits and a minus; digits of other scripts, numbers in words and hexadecimal are not read.
What would change the value (``3 million``, ``3 or more``, ``2x``, ``5!``) makes it unreadable.

Cost: linear. Every regular expression runs on text of bounded length and repeats nothing that itself repeats;
a number has at most `MAX_DIGITS` digits and an exponent of at most `MAX_EXPONENT`. Nothing is ever evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction

__all__ = ["boxes", "extract_answer", "last_number", "parse_number", "reference_answer", "stated_formula"]

MAX_CHARS = 4096
MAX_VALUE_CHARS = 200
MAX_FORMULA_CHARS = 1000
MAX_DIGITS = 100
MAX_EXPONENT = 100

_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_BOLD = re.compile(r"(?<![0-9)])\*\*|\*\*(?![0-9(])")  # bold markers, but not the power in 2**10
# Full-width digits and punctuation, the minus sign and the spaces that group digits.
_TO_ASCII = {0xFEE0 + ord(character): character for character in "0123456789.,/%$:-"} | {
    0x2212: "-",
    0x00A0: " ",
    0x2009: " ",
    0x202F: " ",
}

_MARKER = re.compile(r"(?<!#)####(?!#)")
_MARKER_END = re.compile(r"\n|####")
_PHRASE = re.compile(r"\b(?i:answer)(?: is\b|[ \t]{0,4}:)[ \t]{0,4}:?\s{0,4}|^[ \t]{0,4}A:\s{0,4}", re.MULTILINE)
_PHRASE_END = re.compile(r"\n|[.;?](?=\s|$)")
_HEADING = re.compile(r"(?!US\$|USD|EUR|GBP)[A-Za-z]|[0-9]{1,2}[.):] {1,4}[A-Za-z]")
_DIGIT = re.compile(r"[0-9]")
_PROSE = re.compile(r"[A-Za-z]{4,40}(?![A-Za-z(])|[0-9]{1,2}[.):] {1,4}[A-Za-z]")
_BOX = "\\boxed{"

_FRACTION = re.compile(r"\\[dt]?frac\{([0-9]{1,100})\}\{([0-9]{1,100})\}")
_WRAPPED = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")
_LATEX = {"{,}": ",", "\\!": "", "\\$": "$", "\\%": "%"} | dict.fromkeys(
    ("\\,", "\\;", "\\ ", "~", "\\(", "\\)", "\\[", "\\]"), " "
)
_VALUE = re.compile(
    r"""(?P<sign>[-+]?)[ ]?(?:(?:US\$|USD|EUR|GBP|[$€£¥])[ ]?)?(?P<inner_sign>-?)
    (?!0[xX])(?=\.?[0-9])
    (?:
        (?:(?P<whole>[0-9]{1,100})[ ]{1,2})?(?P<numerator>[0-9]{1,100})[ ]?/[ ]?(?P<denominator>[0-9]{1,100})
      |
        (?P<decimal>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?:[ ][0-9]{3})+|[0-9]*)(?:\.[0-9]+)?)
        (?:[eE](?P<exponent>[-+]?[0-9]{1,4}))?
    )
    (?P<unit>[^0-9]*)""",
    re.VERBOSE,
)
# In front, a stop would begin a sentence, ² would be a power, a lone letter a variable or a multiplier.
_UNIT = re.compile(r"(?![.,²³])(?![A-Za-z](?![A-Za-z]))[A-Za-z .,'\u2019/%$€£¥¢°²³-]*")
_WORD = re.compile(r"[a-z]+")
_CHANGES_VALUE = frozenset(
    {"or", "and", "to", "not", "plus", "minus", "squared", "cubed", "pi", "x", "half", "dozen"}
    | {"k", "bn", "hundred", "thousand", "million", "billion", "trillion"}
)
_PLAIN_NUMBER = re.compile(r"\.?[0-9][0-9,./]*")


def extract_answer(text: str) -> Fraction | None:
    """The answer that `text` states by one of the conventions above; None when it states none, or two.

    `text` is a completion, at any length: only its last `MAX_CHARS` characters are read.
    """
    tail = _readable_tail(text)
    stated = set(_payloads(tail, _MARKER, _MARKER_END, _is_number)) or set(boxes(tail))
    if stated:
        values = {parse_number(payload) for payload in stated}
        return values.pop() if len(values) == 1 else None
    phrases = list(_payloads(tail, _PHRASE, _PHRASE_END, _is_number))
    return parse_number(phrases[-1]) if phrases else None


def stated_formula(text: str) -> str | None:
    """The answer that `text` states in the same places, as it is written there: a formula, not only a number.

    None when it states none, or several that are written differently. At most `MAX_FORMULA_CHARS` characters.
    """
    tail = _readable_tail(text)
    stated = list(_payloads(tail, _MARKER, _MARKER_END, _is_formula, MAX_FORMULA_CHARS))
    stated = stated or [_BOX if box is None else box for box in _boxed(tail, MAX_FORMULA_CHARS) if box is None or box]
    stated = stated or list(_payloads(tail, _PHRASE, _PHRASE_END, _is_formula, MAX_FORMULA_CHARS))[-1:]
    written = {_tidy(payload) for payload in stated}
    return (written.pop() or None) if len(written) == 1 else None


def _tidy(formula: str) -> str:
    """A formula without what surrounds it, its white space evened out; empty for one that is cut off."""
    if formula == _BOX or len(formula) > MAX_FORMULA_CHARS:
        return ""
    return " ".join(formula.strip("$ ").rstrip(" .,;:$").split())


def last_number(text: str) -> Fraction | None:
    """The last plain number of `text` (digits, grouping, decimals, ``a/b``), stated as its answer or not.

    None when there is none or the last one is malformed. `extract_answer` and this read the same parts.
    """
    tail = _readable_tail(text)
    numbers = list(_PLAIN_NUMBER.finditer(tail))
    if not numbers:
        return None
    number = numbers[-1]
    value = parse_number(number[0].rstrip(",./"))
    before = tail[max(0, number.start() - 3) : number.start()].rstrip("$€£¥")
    operand = before[:-1].rstrip("$€£¥")[-1:]
    # In "16-3" the minus belongs to the subtraction.
    is_negative = before.endswith("-") and not (operand.isalnum() or operand == ")")
    return -value if value is not None and is_negative else value


def reference_answer(value: object) -> Fraction | None:
    """The number in a dataset's answer column; None when there is none to be read.

    `value` is a number, a written number (``"1,080"``), or a worked solution that ends in one (GSM8K's
    ``"…\\n#### 18"``, or any convention that `extract_answer` reads).
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return Fraction(value)
    if not isinstance(value, str):
        return parse_number(str(value))
    number = parse_number(value)
    return extract_answer(value) if number is None else number


def parse_number(text: str) -> Fraction | None:
    """The exact value of `text` when all of it is one written number with an optional unit, else None.

    Reads at most `MAX_VALUE_CHARS` characters; a longer text is not a number.
    """
    if len(text) > MAX_VALUE_CHARS:
        return None
    match = _VALUE.fullmatch(_plain(text))
    if match is None or not _is_unit(match["unit"]) or (match["sign"] and match["inner_sign"]):
        return None
    value = _decimal_value(match) if match["denominator"] is None else _fraction_value(match)
    return -value if value is not None and "-" in (match["sign"], match["inner_sign"]) else value


def boxes(text: str) -> Iterator[str]:
    """What each ``\\boxed{}`` with a digit holds; one that is never closed is given as ``\\\\boxed{``, unreadable."""
    for payload in _boxed(text, MAX_VALUE_CHARS):
        if payload is None:
            yield _BOX
        elif _DIGIT.search(payload):
            yield payload


def _boxed(text: str, max_chars: int) -> Iterator[str | None]:
    """What each ``\\boxed{}`` holds; None, and no more, for one that is not closed within `max_chars`."""
    start = text.find(_BOX)
    while start >= 0:
        inside = start + len(_BOX)
        payload = _braced(text[inside : inside + max_chars + 1])
        yield payload
        if payload is None:
            return
        start = text.find(_BOX, inside)


def _readable_tail(text: str) -> str:
    """The part of a completion that may state its answer, in plain characters."""
    _, _, text = text.rpartition("</think>")
    text, _, _ = text.partition("<think>")
    tail = text[-MAX_CHARS:].translate(_TO_ASCII)
    return _BOLD.sub("", _ANNOTATION.sub("", tail))


def _payloads(
    tail: str,
    opening: re.Pattern[str],
    end: re.Pattern[str],
    is_meant: Callable[[str], bool],
    max_chars: int = MAX_VALUE_CHARS,
) -> Iterator[str]:
    """What is written between each `opening` and its `end`, where that `is_meant` as an answer."""
    for match in opening.finditer(tail):
        # One character too many makes an endless value unreadable instead of cutting it to a readable one.
        payload = tail[match.end() : match.end() + max_chars + 1]
        payload = end.split(payload, maxsplit=1)[0]
        payload = payload.strip() if len(payload) <= max_chars else payload
        if is_meant(payload):
            yield payload


def _is_number(payload: str) -> bool:
    """Whether a number is meant, readable or not."""
    return bool(_DIGIT.search(payload)) and not _HEADING.match(payload)


def _is_formula(payload: str) -> bool:
    """Whether something else than a heading or a sentence stands there."""
    return bool(payload) and not _PROSE.match(payload)


def _braced(text: str) -> str | None:
    """`text` up to the brace that closes one opened just before it."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position]
    return None


def _plain(text: str) -> str:
    """A written value without bold markers, LaTeX, quotes and closing punctuation."""
    text = _BOLD.sub("", text.translate(_TO_ASCII))
    for written, plain in _LATEX.items():
        text = text.replace(written, plain)
    # The spaces keep neighbors apart: \boxed{1}\boxed{2} is not 12, and 1\frac{1}{2} is a mixed number.
    text = _FRACTION.sub(r" \1/\2 ", text)
    text = _WRAPPED.sub(r" \1 ", _WRAPPED.sub(r" \1 ", text))
    text = text.strip().rstrip(" .,;:")
    while len(text) > 1 and text[0] == text[-1] and text[0] in "$`\"'":
        text = text[1:-1].strip().rstrip(" .,;:")
    return text


def _is_unit(text: str) -> bool:
    """Whether what follows a number leaves its value alone."""
    return bool(_UNIT.fullmatch(text)) and _CHANGES_VALUE.isdisjoint(_WORD.findall(text.lower()))


def _fraction_value(match: re.Match[str]) -> Fraction | None:
    denominator = int(match["denominator"])
    if denominator == 0:
        return None
    return int(match["whole"] or 0) + Fraction(int(match["numerator"]), denominator)


def _decimal_value(match: re.Match[str]) -> Fraction | None:
    digits = match["decimal"].replace(",", "").replace(" ", "")
    exponent = int(match["exponent"] or 0)
    if len(digits) > MAX_DIGITS or abs(exponent) > MAX_EXPONENT:
        return None
    return Fraction(digits) * Fraction(10) ** exponent
