"""What is asked of vLLM and what it answers, as data: token ids in, token ids and log-probs out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from grpoforge.types import FinishReason, PolicyView


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The completions of one prompt: ``num`` of them, or the most probable one at temperature 0."""

    prompt_ids: tuple[int, ...]
    num: int
    temperature: float
    """Logits are divided by it; 0 takes the most probable token."""
    seed: int
    """Of the first completion; completion ``i`` is drawn with ``seed + i``."""
    max_tokens: int
    stop_ids: tuple[int, ...]
    """Tokens that end a completion and belong to it."""
    top_p: float = 1.0
    top_k: int = 0
    """0 for all tokens."""
    min_p: float = 0.0

    def sampling(self) -> dict[str, Any]:
        """The arguments of vLLM's ``SamplingParams``: all of them, so that no default of a model is filled in.

        The end is ours: vLLM's own EOS tokens, those of the folder it was started with, are ignored.
        """
        return {
            "n": self.num,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(self.stop_ids),
            "ignore_eos": True,
            "logprobs": 0,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One completion as vLLM drew it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


class Engine(Protocol):
    """vLLM, wherever it runs."""

    def load(self, policy: PolicyView, version: str, is_main: bool) -> None:
        """Take the policy's weights and call them ``version``; in a run of several processes all of them call it."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[list[Drawn]]:
        """The completions of every request, in order, all of them by the weights loaded last."""
        ...


class Malformed(Exception):
    """An answer that is not what vLLM answers."""


def seed_of(seed: int, position: int) -> int:
    """The seed of the prompt at ``position`` in a draw with ``seed``, 62 bits; neighbors get unrelated ones."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def read_choices(answer: Any, request: Request, vocabulary: int) -> list[Drawn]:
    """The completions in an answer of ``/v1/completions``.

    Raises:
        Malformed: something is missing or cannot be.
    """
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or not all(isinstance(one, Mapping) for one in choices):
        raise Malformed("without `choices`")
    if len(choices) != request.num:
        raise Malformed(f"with {len(choices)} choices instead of {request.num}")
    indices = [one.get("index") for one in choices]
    if sorted(indices, key=str) != sorted(range(request.num), key=str):
        raise Malformed(f"with choices numbered {indices}")
    return [_choice(one, request, vocabulary) for one in sorted(choices, key=lambda one: one["index"])]


def _choice(choice: Mapping[str, Any], request: Request, vocabulary: int) -> Drawn:
    found = choice.get("logprobs")
    logprobs = found.get("token_logprobs") if isinstance(found, Mapping) else None
    return drawn(choice.get("token_ids"), logprobs, choice.get("finish_reason"), request, vocabulary)


def drawn(token_ids: Any, logprobs: Any, finish_reason: Any, request: Request, vocabulary: int) -> Drawn:
    """One completion, checked.

    Raises:
        Malformed: no token, a token outside the vocabulary, a log-prob that is missing or no number, an end that is
            neither a stop token nor the limit (a request that was aborted).
    """
    if not isinstance(token_ids, list) or not token_ids:
        raise Malformed("without `token_ids`")
    if strange := [token for token in token_ids if type(token) is not int or not 0 <= token < vocabulary]:
        raise Malformed(f"with the token {strange[0]!r}, and the vocabulary has {vocabulary}")
    if not isinstance(logprobs, list):
        raise Malformed("without `logprobs`")
    if len(logprobs) != len(token_ids):
        raise Malformed(f"with {len(logprobs)} log-probs for {len(token_ids)} tokens")
    for place, value in enumerate(logprobs):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise Malformed(f"with the log-prob {value} of token {place}: the model's logits are not finite")
    ended = token_ids[-1] in request.stop_ids
    if not ended and len(token_ids) != request.max_tokens:
        raise Malformed(f"with an end after {len(token_ids)} of {request.max_tokens} tokens ({finish_reason})")
    return Drawn(
        token_ids=tuple(token_ids),
        # Rounding may leave a certain token a hair above 0.
        logprobs=tuple(min(float(value), 0.0) for value in logprobs),
        finish_reason="stop" if ended else "length",
    )
