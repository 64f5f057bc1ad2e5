"""How short is the answer?"""

from __future__ import annotations

from collections.abc import Sequence

from grpoforge_plugins.rewards.answers import extract_answer

__all__ = ["brevity"]


def brevity(
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    finish_reasons: Sequence[str],
    max_completion_length: int,
    *,
    require_answer: bool = True,
) -> list[float]:
    """``1 - num_tokens / max_completion_length``, or 0.0 for an empty, cut off or answerless completion.

    Tokens are counted, not characters: the model pays for tokens. Cut off means the finish reason ``length``:
    such a completion did not choose to be as long as it is. `require_answer` asks for an answer that
    `answers.extract_answer` can read; turn it off for tasks whose answer is not a number.

    Alone, this reward is best served by a short wrong answer. It is registered with ``weight=0.1`` and
    ``gate="math"``: in a run that also has `math`, scoring sets it to 0 on rows where `math` is below 1, so
    that only correct completions compete.
    """
    return [
        max(0.0, 1.0 - len(token_ids) / max_completion_length)
        if reason != "length" and text.strip() and (not require_answer or extract_answer(text) is not None)
        else 0.0
        for text, token_ids, reason in zip(completions, completion_ids, finish_reasons, strict=True)
    ]
