from __future__ import annotations

import ast
import re
import runpy
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpoforge.sanitize import one_line, sanitize

REPOSITORY = Path(__file__).resolve().parents[1]
HOSTILE: tuple[Any, ...] = runpy.run_path(str(REPOSITORY / "tests/hostile_completions.py"))["HOSTILE"]

UNSAFE = "\x00\x07\x08\r\x1b\x7f\x9b\xad\u061c\u200b\u200e\u202e\u2028\u2066\ufeff\U000e0041\ud800\udfff"
BIDI_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
any_text = st.text(st.one_of(st.characters(), st.sampled_from(UNSAFE + "\\\n\t")))

PAYLOADS = [
    ("plain text, nothing to do", "plain text, nothing to do"),
    ("two\nlines\tand a tab", "two\nlines\tand a tab"),
    ("naïve 四十二 🙂", "naïve 四十二 🙂"),
    ("👩\u200d🔬 نمی\u200cد\u0627نم ❤\ufe0f", "👩\u200d🔬 نمی\u200cد\u0627نم ❤\ufe0f"),
    ("\x1b[2Jcleared", "\\x1b[2Jcleared"),
    ("\x1b[1A\x1b[2Koverwritten", "\\x1b[1A\\x1b[2Koverwritten"),
    ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
    (
        "\x1b]8;;https://evil.example\x1b\\here\x1b]8;;\x1b\\",
        "\\x1b]8;;https://evil.example\\x1b\\here\\x1b]8;;\\x1b\\",
    ),
    ("\x1b]52;c;Y2xpcA==\x07", "\\x1b]52;c;Y2xpcA==\\x07"),
    ("\x9b31mred", "\\x9b31mred"),
    ("\x9d0;title\x9c", "\\x9d0;title\\x9c"),
    ("\x1bP1;1|17/ab\x1b\\", "\\x1bP1;1|17/ab\\x1b\\"),
    ("reward 1.0\rreward 9.0", "reward 1.0\\x0dreward 9.0"),
    ("secret\b\b\b\b\b\bpublic", "secret\\x08\\x08\\x08\\x08\\x08\\x08public"),
    ("nul\x00del\x7f", "nul\\x00del\\x7f"),
    ("\u202e24\u202c", "\\u202e24\\u202c"),
    ("\u2066a\u2069\u200f\u061c", "\\u2066a\\u2069\\u200f\\u061c"),
    ("4\u200b2\ufeff\u2060\xad", "4\\u200b2\\ufeff\\u2060\\xad"),
    ("log\u2028entry\u2029end\x85", "log\\u2028entry\\u2029end\\x85"),
    ("\ud83d broken \udc80", "\\ud83d broken \\udc80"),
    ("hi\U000e0068\U000e0069\U000e0101", "hi\\U000e0068\\U000e0069\\U000e0101"),
]


@pytest.mark.parametrize(("text", "shown"), PAYLOADS)
def test_unsafe_characters_become_visible_and_nothing_else_changes(text: str, shown: str) -> None:
    assert sanitize(text) == shown


@given(any_text)
def test_result_encodes_is_inert_and_is_left_alone_the_second_time(text: str) -> None:
    safe = sanitize(text)
    safe.encode("utf-8")
    assert {c for c in safe if unicodedata.category(c) in {"Cc", "Zl", "Zp", "Cs"}} <= {"\n", "\t"}
    assert not {c for c in safe if unicodedata.bidirectional(c) in BIDI_CONTROLS}
    assert sanitize(safe) == safe


@given(any_text)
def test_nothing_is_lost(text: str) -> None:
    unescape = re.compile(r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\U[0-9a-f]{8}")
    text = text.replace("\\", "/")  # a backslash of the text's own is not escaped, by design
    assert unescape.sub(lambda match: chr(int(match[0][2:], 16)), sanitize(text)) == text


@given(any_text, st.integers(1, 30))
def test_limit_counts_the_ellipsis_and_only_cuts_what_is_longer(text: str, max_chars: int) -> None:
    whole, cut = sanitize(text), sanitize(text, max_chars=max_chars)
    assert cut == (whole if len(whole) <= max_chars else whole[: max_chars - 1] + "…")
    assert sanitize(cut, max_chars=max_chars) == cut


def test_limit_of_less_than_one_character_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="max_chars counts the `…` too"):
        sanitize("text", max_chars=0)


def test_one_line_shows_newlines_and_tabs() -> None:
    assert one_line("a\nb\tc\x1b", 80) == "a ⏎ b\\tc\\x1b"
    assert one_line("a\nbcdefgh", 6) == "a ⏎ b…"


@given(any_text, st.integers(1, 30))
def test_one_line_is_one_short_line(text: str, max_chars: int) -> None:
    line = one_line(text, max_chars)
    assert len(line) <= max_chars
    assert len(line.splitlines()) <= 1


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_hostile_completions_can_be_printed(hostile: Any) -> None:
    assert "\x1b" not in sanitize(hostile.text)
    one_line(hostile.text, 100).encode("utf-8")


@pytest.mark.parametrize("unit", ["a", "\x1b[2J", "\ud800", "\u202e", "\n"])
def test_time_is_linear(unit: str) -> None:
    small, large = (unit * (size // len(unit)) for size in (8_192, 65_536))
    assert _seconds(large) <= 40 * _seconds(small) + 0.005


def _seconds(text: str) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        sanitize(text)
        times.append(time.perf_counter() - start)
    return min(times)


EVALUATORS = {
    "__import__",
    "compile",
    "eval",
    "exec",
    "lambdify",
    "literal_eval",
    "parse_expr",
    "parse_latex",
    "sympify",
}


def evaluations(source: str) -> list[str]:
    """Calls and imports in `source` that turn text into code; ``model.eval()`` and ``re.compile`` do not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] if node.func.id in EVALUATORS else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            takes_text = node.func.attr != "compile" and (node.func.attr != "eval" or bool(node.args))
            found += [node.func.attr] if node.func.attr in EVALUATORS and takes_text else []
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found += [alias.name for alias in node.names if alias.name in EVALUATORS | {"sympy"}]
    return found


def test_the_search_for_evaluators_finds_them() -> None:
    assert evaluations("eval(x); ast.literal_eval(x); frame.eval('a + b'); builtins.exec(x)") == [
        "eval",
        "literal_eval",
        "eval",
        "exec",
    ]
    assert evaluations("import sympy\nfrom sympy import sympify") == ["sympy", "sympify"]
    assert evaluations("model.eval(); re.compile(x); torch.compile(model)") == []


def test_no_text_becomes_code() -> None:
    sources = [path for folder in ("grpoforge", "plugins") for path in (REPOSITORY / folder).rglob("*.py")]
    assert len(sources) > 5
    found = {str(path): evaluations(path.read_text(encoding="utf-8")) for path in sources}
    assert {path: calls for path, calls in found.items() if calls} == {}
