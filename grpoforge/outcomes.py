"""What a policy did on one problem, and what that counts for."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from grpoforge.statistics import majority_at_k, pass_at_k
from grpoforge.types import Completion, FinishReason, Prompt

Verdict = Literal["right", "wrong", "no answer", "truncated", "not scored"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
Reader = Callable[[str], str | None]
"""The answer that a completion states, None when none can be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One completion and its verdict, of which there is exactly one.

    ``right``: correctness reached 1. Else ``not scored``: it abstained. Else ``truncated``: the completion was cut at
    the token limit. Else ``no answer``: none could be read. Else ``wrong``.
    """

    completion: str
    """Decoded text. Hostile data, as in `grpoforge.types.Completion`."""
    answer: str | None
    """As the correctness reward reads it; None when it reads none, or cannot say."""
    verdict: Verdict
    num_tokens: int
    finish_reason: FinishReason
    temperature: float

    @property
    def is_right(self) -> bool:
        return self.verdict == "right"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one problem."""

    index: int
    """Number among the problems, from 0."""
    origin: str
    """Where it stands in its dataset: ``test.jsonl:17``."""
    problem: str
    """sha256 of question and gold: equal for equal problems, wherever they were measured."""
    question: str
    gold: str
    """What correctness compares with: the dataset's column that it reads; of several, an object of JSON."""
    greedy: Attempt
    samples: tuple[Attempt, ...]
    """``K`` of them, drawn by the sampler."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """The outcome that `dataclasses.asdict` made ``values`` of."""
        samples = tuple(Attempt(**sample) for sample in values["samples"])
        return cls(**{**values, "greedy": Attempt(**values["greedy"]), "samples": samples})


def attempt(completion: Completion, correctness: float, read: Reader | None) -> Attempt:
    """The verdict on ``completion``, to which the correctness reward gave ``correctness``; NaN where it abstained."""
    answer = read(completion.text) if read else None
    return Attempt(
        completion=completion.text,
        answer=answer,
        verdict=_verdict(completion, correctness, lacks_answer=read is not None and answer is None),
        num_tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        temperature=completion.temperature,
    )


def _verdict(completion: Completion, correctness: float, *, lacks_answer: bool) -> Verdict:
    if correctness >= 1.0:
        return "right"
    if correctness != correctness:
        return "not scored"
    if completion.finish_reason == "length":
        return "truncated"
    return "no answer" if lacks_answer else "wrong"


def describe_problem(prompt: Prompt, question: str, gold: Sequence[str]) -> dict[str, Any]:
    """The fields of an `Outcome` that belong to the problem.

    Args:
        question: column that holds the question.
        gold: columns that correctness reads.
    """
    asked = str(prompt.columns[question])
    known = _gold({name: prompt.columns[name] for name in gold if name != question and name in prompt.columns})
    digest = hashlib.sha256(json.dumps([asked, known]).encode()).hexdigest()
    return {"index": prompt.index, "origin": prompt.origin, "problem": digest, "question": asked, "gold": known}


def _gold(columns: Mapping[str, Any]) -> str:
    values = list(columns.values())
    if len(values) == 1:
        return values[0] if isinstance(values[0], str) else json.dumps(values[0], default=str)
    return json.dumps(columns, default=str) if values else ""


def default_k(num_samples: int) -> tuple[int, ...]:
    """1, 2, 4, ... below ``num_samples``, and ``num_samples`` itself."""
    powers = [2**exponent for exponent in range(num_samples.bit_length())]
    return (*(k for k in powers if k < num_samples), num_samples) if num_samples else ()


def figures(outcome: Outcome, ks: Iterable[int], *, votes: bool) -> dict[str, float]:
    """The headline metrics of one problem, each in [0, 1]; over problems they are averaged.

    ``eval_pass@1`` (greedy), ``eval_mean@K`` (share of the samples that are right), and for each ``k`` from 2 to ``K``
    ``eval_pass@k`` and, with ``votes``, ``eval_maj@k``. For ``k = 1`` both are ``eval_mean@K``.
    """
    found = {"eval_pass@1": float(outcome.greedy.is_right)}
    if not outcome.samples:
        return found
    right = [sample.is_right for sample in outcome.samples]
    answers = [sample.answer for sample in outcome.samples]
    found[f"eval_mean@{len(right)}"] = sum(right) / len(right)
    larger = [k for k in ks if 1 < k <= len(right)]
    found |= {f"eval_pass@{k}": pass_at_k(len(right), sum(right), k) for k in larger}
    return found | ({f"eval_maj@{k}": majority_at_k(answers, right, k) for k in larger} if votes else {})


def tally(attempts: Iterable[Attempt], *, reads_answers: bool) -> dict[str, int]:
    """How many attempts got each verdict; without ``no answer`` where no answer is read."""
    counts = Counter(one.verdict for one in attempts)
    return {verdict: counts[verdict] for verdict in VERDICTS if reads_answers or verdict != "no answer"}
