"""Is the final answer right?"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal

from grpoforge_plugins.rewards.answers import extract_answer, last_number, reference_answer

__all__ = ["Math"]


class Math:
    """1.0 when the completion's final answer equals the reference, else 0.0.

    Values are compared exactly: ``18``, ``18.0``, ``$18`` and ``36/2`` are equal, ``18.0000001`` is another
    number. `answer` is the dataset column: a number, a written number, or a worked solution (GSM8K's
    ``… #### 18``). A row whose reference cannot be read is not scored (None), which is not the same as wrong.

    `extraction` says what counts as the completion's answer: ``strict`` wants it stated (``#### 18``,
    ``\\boxed{18}``, ``answer is 18``); ``lenient`` takes the last number of the text where no single
    answer is stated, for models that were never asked for a format.

    Declares ``answer_of``.
    """

    def __init__(
        self,
        *,
        extraction: Annotated[
            Literal["strict", "lenient"], "strict: the answer must be stated; lenient: else the last number"
        ] = "strict",
    ) -> None:
        self._read = {"strict": extract_answer, "lenient": _stated_or_last}[extraction]

    def __call__(self, completions: Sequence[str], answer: Sequence[object]) -> list[float | None]:
        return [
            _score(self._read(text), reference_answer(reference))
            for text, reference in zip(completions, answer, strict=True)
        ]

    def answer_of(self, text: str) -> str | None:
        """The final answer of a completion in one written form (``18``, ``-3/4``); None when none can be read.

        Two completions answer the same when this is equal. See ``answer_of`` in `grpoforge.declarations`.
        """
        value = self._read(text)
        return None if value is None else str(value)


def _stated_or_last(text: str) -> Fraction | None:
    stated = extract_answer(text)
    return last_number(text) if stated is None else stated


def _score(stated: Fraction | None, reference: Fraction | None) -> float | None:
    return None if reference is None else float(stated == reference)
