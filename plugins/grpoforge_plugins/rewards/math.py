"""Is the final answer right?"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from grpoforge_plugins.rewards.answers import extract_answer, last_number, reference_answer, stated_formula
from grpoforge_plugins.rewards.symbolic import Questions, Verdict, compares, require_library

__all__ = ["Math"]

logger = logging.getLogger(__name__)

_WORDS = re.compile(r"[A-Za-z]{2,40} {1,4}[A-Za-z]{2,40}")
REWARDS: dict[Verdict, float | None] = {"equal": 1.0, "different": 0.0, "unreadable": None, "stopped": None}


class Math:
    """1.0 when the completion's final answer equals the reference, else 0.0.

    `answer` is the dataset column: a number, a written number, or a worked solution (GSM8K's ``… #### 18``). A row
    whose reference cannot be read is not scored (None), which is not the same as wrong.

    `verifier` says when two answers are equal:

    * ``exact``: both are numbers of the same value. ``18``, ``18.0``, ``$18`` and ``36/2`` are equal, ``18.0000001``
      is another number, and what is no number is no answer.
    * ``symbolic``: the library math-verify says so of two formulas, in a process that is killed after `time_limit`
      seconds. The row is then not scored and counted in `stopped`; so are the rows left when a call has taken
      `total_time_limit` seconds. Numbers are written plainly first, so that ``400\\%`` is 400 here too.
    * ``auto``: ``exact`` where both are numbers, else ``symbolic``.

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
        verifier: Annotated[
            Literal["exact", "symbolic", "auto"],
            AfterValidator(require_library),
            "exact: numbers; symbolic: formulas, by math-verify; auto: symbolic where one is no number",
        ] = "exact",
        time_limit: Annotated[float, Field(gt=0, lt=2), "seconds that math-verify may take for one answer"] = 1.0,
        total_time_limit: Annotated[float, Field(gt=0), "seconds that it may take for all answers of a call"] = 30.0,
    ) -> None:
        self._read = {"strict": extract_answer, "lenient": _stated_or_last}[extraction]
        self._verify = {"exact": self._exact, "symbolic": self._symbolic, "auto": self._auto}[verifier]
        self._written = {"exact": _no_formula, "symbolic": stated_formula, "auto": stated_formula}[verifier]
        self._time_limit, self._total_time_limit = time_limit, total_time_limit
        self.stopped = 0
        """Rows left unscored because a limit stopped their check, since this reward was built."""

    def __call__(self, completions: Sequence[str], answer: Sequence[object]) -> list[float | None]:
        questions = Questions(self._time_limit, self._total_time_limit)
        rewards = [
            self._verify(text, reference, questions) for text, reference in zip(completions, answer, strict=True)
        ]
        self._count(questions.stopped)
        return rewards

    def answer_of(self, text: str) -> str | None:
        """The final answer of a completion in one written form (``18``, ``-3/4``); None when none can be read.

        With a symbolic verifier, an answer that is no number is given as it is written. Two completions answer the
        same when this is equal. See ``answer_of`` in `grpoforge.declarations`.
        """
        value = self._read(text)
        return self._written(text) if value is None else str(value)

    def _exact(self, text: str, reference: object, questions: Questions) -> float | None:
        expected = reference_answer(reference)
        return None if expected is None else float(self._read(text) == expected)

    def _auto(self, text: str, reference: object, questions: Questions) -> float | None:
        both_numbers = self._read(text) is not None and reference_answer(reference) is not None
        verify = self._exact if both_numbers else self._symbolic
        return verify(text, reference, questions)

    def _symbolic(self, text: str, reference: object, questions: Questions) -> float | None:
        expected, found = _reference_formula(reference), self.answer_of(text)
        if expected is None:
            return None
        if found is None or not compares(expected, found):
            return 0.0
        return REWARDS[questions.ask(expected, found)]

    def _count(self, stopped: Sequence[str]) -> None:
        if stopped and not self.stopped:
            logger.warning(
                "the check of the answer %r was stopped: more than %g s (`time_limit`), than %g s with those before it "
                "(`total_time_limit`), or too much memory. Such rows are not scored; `rewards/*/unscored` counts them",
                stopped[0][:60],
                self._time_limit,
                self._total_time_limit,
            )
        self.stopped += len(stopped)


def _stated_or_last(text: str) -> Fraction | None:
    stated = extract_answer(text)
    return last_number(text) if stated is None else stated


def _no_formula(text: str) -> str | None:
    return None


def _reference_formula(reference: object) -> str | None:
    """The answer in a dataset's column as a formula; None when there is nothing to compare with."""
    number = reference_answer(reference)
    if number is not None:
        return str(number)
    if not isinstance(reference, str):
        return None
    stated = stated_formula(reference)
    is_sentence = "\\" not in reference and _WORDS.search(reference)
    return stated if stated or is_sentence else stated_formula(f"\\boxed{{{reference}}}")
