"""Is the final answer right?"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from grpoforge_plugins.rewards.answers import extract_answer, last_number, reference_answer

__all__ = ["math"]


def math(
    completions: Sequence[str],
    answer: Sequence[object],
    *,
    extraction: Literal["strict", "lenient"] = "strict",
) -> list[float | None]:
    """1.0 when the completion's final answer equals the reference, else 0.0.

    Values are compared exactly: ``18``, ``18.0``, ``$18`` and ``36/2`` are equal, ``18.0000001`` is another
    number. `answer` is the dataset column: a number, a written number, or a worked solution (GSM8K's
    ``… #### 18``). A row whose reference cannot be read is not scored (None), which is not the same as wrong.

    `extraction` says what counts as the completion's answer: ``strict`` wants it stated (``#### 18``,
    ``\\boxed{18}``, ``answer is 18``); ``lenient`` takes the last number of the text where no single
    answer is stated, for models that were never asked for a format.
    """
    read = {"strict": extract_answer, "lenient": _stated_or_last}[extraction]
    return [
        _score(read(text), reference_answer(reference)) for text, reference in zip(completions, answer, strict=True)
    ]


def _stated_or_last(text: str) -> Fraction | None:
    stated = extract_answer(text)
    return last_number(text) if stated is None else stated


def _score(stated: Fraction | None, reference: Fraction | None) -> float | None:
    return None if reference is None else float(stated == reference)
