from __future__ import annotations

import runpy
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpoforge_plugins.rewards.language import Script, language

HOSTILE: tuple[Any, ...] = runpy.run_path(str(Path(__file__).resolve().parents[2] / "hostile_completions.py"))[
    "HOSTILE"
]

WORDS: dict[Script, str] = {
    "latin": "Größe naïve œuvre", "cyrillic": "Привет, мир", "greek": "γειά σου", "armenian": "բարեւ",
    "georgian": "გამარჯობა", "hebrew": "שלום", "arabic": "مرحبا", "devanagari": "नमस्ते", "bengali": "নমস্কার",
    "gurmukhi": "ਸਤ ਸ੍ਰੀ", "gujarati": "નમસ્તે", "tamil": "வணக்கம்", "telugu": "నమస్తే", "kannada": "ನಮಸ್ಕಾರ",
    "malayalam": "നമസ്കാരം", "sinhala": "ආයුබෝවන්", "thai": "สวัสดี", "lao": "ສະບາຍດີ", "khmer": "ជំរាបសួរ",
    "myanmar": "မင်္ဂလာပါ", "tibetan": "བཀྲ་ཤིས", "ethiopic": "ሰላም", "han": "你好世界",
    "japanese": "こんにちは、世界。カタカナ",
    "hangul": "안녕하세요",
}  # fmt: skip


@pytest.mark.parametrize("script", get_args(Script))
def test_each_script_knows_its_own(script: Script) -> None:
    assert language([WORDS[script]], script=script) == [1.0]
    shared = {"han", "japanese"}
    others = [text for name, text in WORDS.items() if name != script and not {name, script} <= shared]
    assert set(language(others, script=script)) == {0.0}


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("abcабв", 0.5),
        ("abc дефг", 4 / 7),
        ("漢 aаа", 0.5),
        ("Сто 100 + 5% = 105!", 1.0),
        ("`print(x)` это код", 1.0),
        ("```py\nprint('hello')\n``` это код", 1.0),
        ("один ` знак", 1.0),
        (r"\frac{1}{2} \times это", 1.0),
        ("пусть $x + y = z$, тогда", 1.0),
        ("это стоит $5", 1.0),
        ("<think>думаю</think>", 1.0),
        ("смотри https://example.com/page", 1.0),
        ("ｈｅｌｌｏ", 0.0),
        ("и\u0301", 1.0),
    ],
)
def test_what_counts(text: str, share: float) -> None:
    assert language([text], script="cyrillic") == [pytest.approx(share)]


@pytest.mark.parametrize("text", ["", "#### 18", "18 + 5 = 23", "`code`", "👩‍👩‍👧", " \n", "\x00\x1b[2"])
def test_completion_without_a_letter_is_not_scored(text: str) -> None:
    assert language([text]) == [None]


def test_options() -> None:
    assert language(["ok", "okay"], min_letters=3) == [None, 1.0]
    assert language(["ｈｅｌｌｏ 𝐡𝐞𝐥𝐥𝐨"]) == [1.0]


@given(st.text(max_size=200))
def test_a_share_or_nothing(text: str) -> None:
    (found,) = language([text])
    assert found is None or 0.0 <= found <= 1.0


def test_hostile_completions_take_no_time() -> None:
    for hostile in HOSTILE:
        started = time.perf_counter()
        language([hostile.text])
        assert time.perf_counter() - started <= 1.0, hostile.name
