"""Does the completion end as it was asked to?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from grpoforge_plugins.rewards.answers import boxes, extract_answer, parse_number

__all__ = ["format_reward"]


def format_reward(completions: Sequence[str], *, style: Literal["gsm8k", "boxed", "think"] = "gsm8k") -> list[float]:
    """1.0 when the completion has the form of `style`, else 0.0; whether the answer is right plays no part.

    * ``gsm8k``: work, then one last line ``#### N``, and no other ``####``.
    * ``boxed``: work, then a last line that holds the only ``\\boxed{N}``.
    * ``think``: ``<think>`` work ``</think>``, each tag once, then an answer that `answers.extract_answer`
      reads. The opening tag may be missing, since many chat templates end the prompt with it.

    Work is text in front of the answer with at least one digit and one letter or operator: a bare answer
    earns nothing. Whether the work makes sense this reward cannot tell; keep its weight below that of being
    right. An answer that `answers.extract_answer` would not read, as inside ``<think>``, has no form.
    """
    has_form = {"gsm8k": _is_gsm8k, "boxed": _is_boxed, "think": _is_think}[style]
    return [float(has_form(text.strip())) for text in completions]


def _is_gsm8k(text: str) -> bool:
    work, _, last_line = text.rpartition("\n")
    if text.count("####") != 1 or not last_line.startswith("#### "):
        return False
    return _is_work(work) and parse_number(last_line[5:]) is not None and extract_answer(text) is not None


def _is_boxed(text: str) -> bool:
    work, _, last_line = text.rpartition("\n")
    payloads = list(boxes(last_line))
    if text.count("\\boxed{") != 1 or len(payloads) != 1:
        return False
    before, _, _ = last_line.partition("\\boxed{")
    return _is_work(work + before) and parse_number(payloads[0]) is not None and extract_answer(text) is not None


def _is_think(text: str) -> bool:
    if text.count("<think>") > 1 or text.count("</think>") != 1 or text.find("<think>") > 0:
        return False
    work, _, spoken = text.removeprefix("<think>").partition("</think>")
    return _is_work(work) and extract_answer(spoken) is not None


def _is_work(text: str) -> bool:
    characters = set(text)
    return any(map(str.isdigit, characters)) and any(c.isalpha() or c in "+-*/=" for c in characters)
