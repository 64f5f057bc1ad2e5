"""Is the completion written in the script that it should be?"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import Field

__all__ = ["Script", "language"]

Script = Literal[
    "latin", "cyrillic", "greek", "armenian", "georgian", "hebrew", "arabic", "devanagari", "bengali", "gurmukhi",
    "gujarati", "tamil", "telugu", "kannada", "malayalam", "sinhala", "thai", "lao", "khmer", "myanmar", "tibetan",
    "ethiopic", "han", "japanese", "hangul",
]  # fmt: skip

_UNICODE = {"han": ("CJK",), "japanese": ("HIRAGANA", "KATAKANA", "CJK")}
"""What the Unicode names of the letters of a script begin with, where that is not its name."""

MAX_CHARS = 32_768

_CODE_MARK = re.compile(r"`{1,3}")
_NOT_PROSE = re.compile(r"\$[^$\n]{1,200}\$|\\[A-Za-z]+|<[/a-z_]{1,20}>|https?:/\S+")


def language(
    completions: Sequence[str],
    *,
    script: Annotated[Script, "the script to write in"] = "latin",
    min_letters: Annotated[int, Field(ge=1), "fewer letters than this are not judged"] = 1,
) -> list[float | None]:
    """The share of a completion's letters that belong to ``script``, from 0 to 1; None where it has no letter.

    The language consistency reward of DeepSeek-R1 (2501.12948), by script instead of by word: exact, and the same for
    every language that shares it. English and French are both ``latin``: it does not tell them apart.

    Code (between backquotes), LaTeX (commands, and what is between dollars in a line), tags, links, digits,
    punctuation and accents are in no language and do not count. A completion without a letter, like ``#### 18``,
    breaks no rule and keeps none, so it is not scored: 0 would punish a bare number, 1 would reward it. Han characters
    count for ``japanese`` and ``han``; full-width Latin letters are ``latin``. Of a completion the last `MAX_CHARS`
    characters are read.
    """
    return [_share(text[-MAX_CHARS:], script, min_letters) for text in completions]


def _share(text: str, script: str, min_letters: int) -> float | None:
    written = [_script_of(character) for character in _prose(text) if character.isalpha()]
    if len(written) < min_letters:
        return None
    starts = _UNICODE.get(script, (script.upper(),))
    return sum(name in starts for name in written) / len(written)


def _prose(text: str) -> Iterator[str]:
    """The characters outside code and formulas; an opening mark that is never closed opens nothing."""
    parts = _CODE_MARK.split(text)
    if len(parts) % 2 == 0:
        parts[-2:] = [" ".join(parts[-2:])]
    for outside in parts[::2]:
        yield from _NOT_PROSE.sub(" ", outside)


@lru_cache(maxsize=65_536)
def _script_of(letter: str) -> str:
    """The first word of a letter's Unicode name, that of its compatible form for full-width and styled ones."""
    plain = unicodedata.normalize("NFKC", letter)[0]
    return unicodedata.name(plain, "").partition(" ")[0]
