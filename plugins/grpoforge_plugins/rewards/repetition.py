"""Does the completion repeat itself?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

__all__ = ["repetition"]

_WORD = re.compile(r"\S+")


def repetition(
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    ngram_size: Annotated[int, Field(ge=1), "units that make a phrase"] = 3,
    max_penalty: Annotated[float, Field(ge=0), "what saying one phrase for ever costs"] = 1.0,
    unit: Annotated[Literal["word", "token"], "what a phrase is made of"] = "word",
) -> list[float]:
    """``-(1 - distinct / total) * max_penalty`` over the phrases of ``ngram_size`` units; 0 where there is none.

    The n-gram penalty of 2502.03373 in the form that open-r1 gave it: a completion that never says three words in the
    same order twice gets 0, one that says nothing else nearly ``-max_penalty``. Words are separated by white space and
    compared in lower case. A text without spaces (Chinese, or a loop inside one word) is one word: use ``unit: token``
    there.

    It never pays; the cheapest completion is a short one. Keep it beside a reward that asks for an answer.
    """
    rows = completion_ids if unit == "token" else [_WORD.findall(text.lower()) for text in completions]
    return [-max_penalty * _share_repeated(row, ngram_size) for row in rows]


def _share_repeated(units: Sequence[object], size: int) -> float:
    phrases = list(zip(*(units[start:] for start in range(size)), strict=False))
    return 1.0 - len(set(phrases)) / len(phrases) if phrases else 0.0
