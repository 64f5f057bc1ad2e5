"""Prompts from rows that are read as they are needed: a shuffle buffer, and a place in the stream to come back to."""

from __future__ import annotations

import functools
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grpoforge.data import LONG_HINT, SKIP_HINT, PromptFormat, empty, fault, fit_prompts
from grpoforge.errors import DataError
from grpoforge.seeds import mix
from grpoforge.sources import BadRow, Row
from grpoforge.types import Prompt

logger = logging.getLogger(__name__)

Numbered = tuple[int, Row]
"""A row and its number among the usable rows of the stream, counted from 0."""


def usable_rows(rows: Iterable[Row | BadRow], required: Sequence[str], source: str, *, skip: bool) -> Iterator[Row]:
    """The rows that have every ``required`` column, the prompt first, looked at one by one.

    Raises:
        DataError: a bad row (named by line) unless ``skip``; no row at all can be used.
    """
    num_rows = num_bad = 0
    for row in rows:
        num_rows += 1
        reason = fault(row, required)
        if reason is None and isinstance(row, Row):
            yield row
            continue
        if not skip:
            raise DataError(f"{row.origin}: {reason}", SKIP_HINT)
        num_bad += 1
        if num_bad == 1:
            logger.warning("left out %s: %s; other unusable rows of this pass go unnamed", row.origin, reason)
    if not num_rows:
        raise empty(source)
    if num_bad == num_rows:
        raise DataError(f"none of the {num_rows} rows of {source} can be used", "correct the dataset")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStream:
    """Training rows that may be read any number of times, from the start each time."""

    source: str
    open: Callable[[], Iterator[Row]]
    """A new pass over the rows, in their order."""
    columns: tuple[str, ...]
    """What every row has."""
    buffer: int
    """Rows held in memory."""
    seed: int

    def numbered(self) -> Iterator[Numbered]:
        """A pass with the rows' numbers.

        Raises:
            DataError: it has no rows.
        """
        number = -1
        for number, row in enumerate(self.open()):
            yield number, row
        if number < 0:
            raise DataError(
                f"{self.source} ends within the rows held out for evaluation: nothing is left to train on",
                "lower `data.num_eval`, or name evaluation rows with `--set data.eval_dataset=FILE`",
            )


class Shuffled:
    """An endless row of passes over a stream, each shuffled through a buffer: the same for the same seed.

    The buffer is filled; then each row that is read takes the place of one drawn from it at random. At the end of the
    pass what is left comes in random order, so that a pass gives every row once.
    """

    def __init__(self, stream: RowStream) -> None:
        self.stream = stream
        self.buffer: list[Numbered] = []
        """Rows read and not yet given."""
        self.taken = 0
        """Rows given."""
        self.passes = 0
        """Passes begun."""
        self._rows = self._endless()

    def __iter__(self) -> Iterator[Numbered]:
        return self

    def __next__(self) -> Numbered:
        self.taken += 1
        return next(self._rows)

    def _endless(self) -> Iterator[Numbered]:
        while True:
            self.passes += 1
            yield from self._pass(random.Random(mix(self.stream.seed, 4, self.passes)))

    def _pass(self, dice: random.Random) -> Iterator[Numbered]:
        for row in self.stream.numbered():
            if len(self.buffer) < self.stream.buffer:
                self.buffer.append(row)
                continue
            place = dice.randrange(len(self.buffer))
            drawn, self.buffer[place] = self.buffer[place], row
            yield drawn
        dice.shuffle(self.buffer)
        while self.buffer:
            yield self.buffer.pop()


class StreamedPrompts:
    """The prompts of steps, out of a stream. Where it stands is part of a checkpoint; without it, it reads anew."""

    def __init__(self, stream: RowStream, tokenizer: Any, fmt: PromptFormat) -> None:
        self._stream = stream
        self._fit = functools.partial(fit_prompts, tokenizer=tokenizer, fmt=fmt)
        self._warned = False
        self._rewind()

    def at_step(self, step: int, count: int) -> list[Prompt]:
        """The ``count`` prompts of ``step`` (from 0): consecutive parts of an endless row of shuffled passes.

        A function of step and count alone: where it is not the next step, the stream is read again from its start.

        Raises:
            DataError: a row cannot be used; no prompt of a whole pass keeps to the limit.
        """
        if self._given != step * count:
            self._rewind()
            while self._given < step * count:
                self._next(min(count, step * count - self._given))
        return self._next(count)

    def extra(self, step: int, draw: int, count: int) -> list[Prompt]:
        """At most ``count`` prompts for extra draw ``draw`` (from 1) of ``step``, the step last asked for.

        Drawn from the rows that wait in the buffer, and not taken out of it; those too long for a prompt are left out.
        """
        if not self._rows.buffer:
            return []
        dice = random.Random(mix(self._stream.seed, 3, step, draw))
        prompts, _ = self._fit(dice.choices(self._rows.buffer, k=count))
        return prompts

    def state_dict(self) -> dict[str, int]:
        """How many rows and prompts are given: a resumed run need not look at them again."""
        return {"rows": self._rows.taken, "prompts": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state`` was taken."""
        self._rewind()
        for _ in range(state["rows"]):
            next(self._rows)
        self._given = state["prompts"]

    def _rewind(self) -> None:
        self._rows = Shuffled(self._stream)
        self._given = 0

    def _next(self, count: int) -> list[Prompt]:
        prompts: list[Prompt] = []
        first_pass = self._rows.passes
        while len(prompts) < count:
            found, too_long = self._fit(list(itertools.islice(self._rows, count - len(prompts))))
            prompts += found
            self._report(too_long, is_hopeless=not prompts and self._rows.passes > first_pass + 1)
        self._given += count
        return prompts

    def _report(self, too_long: Sequence[str], *, is_hopeless: bool) -> None:
        """Warn of the first prompt that is left out; give up where a whole pass has no other."""
        if is_hopeless:
            raise DataError(f"{too_long[0]}, and so has every other of {self._stream.source}", LONG_HINT)
        if too_long and not self._warned:
            self._warned = True
            logger.warning("%s; other prompts that are too long are left out in silence", too_long[0])
