"""Stop strings: a completion ends with the token that completes one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpoforge_plugins.samplers.requests import PATIENCE


class StopStrings:
    """Where completions end. Their tokens go up to the one that completes a stop string, and their text ends with it.

    What that token says behind the stop string is left out of the text and stays in the tokens, which are what was
    sampled and what is trained on.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.strings = tuple(strings)
        # A token has a byte at least, and a character four at most; the rest is for what decoding does to the first.
        self.window = 2 * PATIENCE + 4 * max(map(len, strings), default=0)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, to the end of the first stop string in it."""
        text = self._decode(tokens)
        ends = [place + len(one) for one in self.strings if (place := text.find(one)) >= 0]
        return text[: min(ends, default=len(text))]

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether a stop string was completed by one of the last `PATIENCE` tokens."""
        return self._has_stop(tokens[-self.window :])

    def length(self, tokens: Sequence[int]) -> int | None:
        """How many tokens there are up to the first stop string; None without one."""
        if not self.strings or not self._has_stop(tokens):
            return None
        low, high = 1, len(tokens)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._has_stop(tokens[:middle]) else (middle + 1, high)
        return low

    def _has_stop(self, tokens: Sequence[int]) -> bool:
        text = self._decode(tokens)
        return any(one in text for one in self.strings)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.batch_decode([list(tokens)], skip_special_tokens=True)[0]
        return text
