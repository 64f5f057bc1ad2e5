"""Rows to prompts: columns renamed, bad rows named, prompts rendered and measured, the order drawn."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from grpoforge.errors import DataError, first_line, suggest
from grpoforge.seeds import mix
from grpoforge.sources import BadRow, Row
from grpoforge.types import Prompt

logger = logging.getLogger(__name__)

SKIP_HINT = "correct the row, or leave bad rows out with `--set data.skip_bad_rows=true`"


@dataclass(frozen=True, slots=True)
class Example:
    """A worked problem that is shown before the one to solve."""

    prompt: str
    solution: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How a row becomes the text that the model sees."""

    column: str
    """Column that holds the prompt's text."""
    system_prompt: str | None
    template: str
    """Used when the tokenizer has no chat template; ``{prompt}`` is replaced by the column's text."""
    max_length: int | None
    """Longest prompt in tokens; None for no limit."""
    limit_origin: str
    """What sets ``max_length``, as the end of a sentence: "the 512 that `data.max_prompt_length` allows"."""
    on_long: Literal["drop", "stop"]
    """What happens to a longer prompt."""
    instruction: str | None = None
    """Text under every question, or around it where ``{prompt}`` stands in it."""
    few_shot: int = 0
    """Examples shown before every question."""
    examples: tuple[Example, ...] = ()
    """One more than ``few_shot``, of different questions: a prompt shows the first that do not ask what it asks."""

    def asked(self, text: str) -> str:
        """What the user says: the question ``text`` and the instruction."""
        if self.instruction is None:
            return text
        if "{prompt}" in self.instruction:
            return self.instruction.replace("{prompt}", text)
        return f"{text}\n{self.instruction}"

    def shown_before(self, text: str) -> list[Example]:
        """The examples that the question ``text`` is shown after."""
        return [one for one in self.examples if same_question(one.prompt) != same_question(text)][: self.few_shot]


class PromptSource(Protocol):
    """Where the prompts of steps come from."""

    def at_step(self, step: int, count: int) -> list[Prompt]:
        """The ``count`` prompts of ``step``, counted from 0."""

    def extra(self, step: int, draw: int, count: int) -> Sequence[Prompt]:
        """At most ``count`` prompts for extra draw ``draw`` (from 1) of ``step``."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts of one split and the order in which steps take them."""

    prompts: tuple[Prompt, ...]
    seed: int

    def __len__(self) -> int:
        return len(self.prompts)

    def at_step(self, step: int, count: int) -> list[Prompt]:
        """The ``count`` prompts of ``step`` (from 0): consecutive parts of an endless row of shuffled passes.

        A pure function of the step, so that resuming needs no cursor.
        """
        return [self._at(position) for position in range(step * count, (step + 1) * count)]

    def extra(self, step: int, draw: int, count: int) -> list[Prompt]:
        """``count`` prompts for extra draw ``draw`` (from 1) of ``step``, chosen at random; a pure function too."""
        generator = torch.Generator().manual_seed(mix(self.seed, 3, step, draw))
        return [self.prompts[index] for index in torch.randint(len(self.prompts), (count,), generator=generator)]

    def _at(self, position: int) -> Prompt:
        epoch, offset = divmod(position, len(self.prompts))
        return self.prompts[_order(self.seed, epoch, len(self.prompts))[offset]]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    """The permutation of pass ``epoch``; two are kept, as a step may lie across two passes."""
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    return [int(index) for index in torch.randperm(size, generator=generator)]


def columns_of(rows: Sequence[Row | BadRow]) -> list[str]:
    """The names of all columns, sorted."""
    return sorted({name for row in rows if isinstance(row, Row) for name in row.columns})


def rename_columns(rows: Sequence[Row | BadRow], rename: Mapping[str, str], source: str) -> list[Row | BadRow]:
    """The rows with columns renamed, old name to new name. Rows that have the new name already stay as they are.

    Raises:
        DataError: there is no such column, or the new name belongs to another column.
    """
    columns = columns_of(rows)
    for old, new in rename.items() if columns else ():
        if old not in columns and new not in columns:
            raise DataError(
                f"`data.rename.{old}` is `{new}`, and {source} has no column `{old}`; it has: {', '.join(columns)}",
                suggest(old, columns),
            )
        taken = [name for name in columns if name != old and rename.get(name, name) == new]
        if old in columns and taken:
            raise DataError(
                f"`data.rename.{old}` is `{new}`, and column `{taken[0]}` of {source} has that name too",
                f"choose another name for one of them: `--set data.rename.{taken[0]}=OTHER`",
            )
    return [row if isinstance(row, BadRow) else renamed(row, rename) for row in rows]


def renamed(row: Row, rename: Mapping[str, str]) -> Row:
    """``row`` with its columns renamed."""
    return Row({rename.get(name, name): value for name, value in row.columns.items()}, row.origin)


def usable(rows: Sequence[Row | BadRow], required: Sequence[str], source: str, *, skip: bool) -> list[Row]:
    """The rows that have every ``required`` column, the prompt first.

    Raises:
        DataError: no rows; a column that no row has; a bad row (named by line) unless ``skip``; no row left.
    """
    if not rows:
        raise empty(source)
    columns = columns_of(rows)
    if columns:
        check_columns(columns, required, source)
    reasons = [fault(row, required) for row in rows]
    bad = [(row.origin, reason) for row, reason in zip(rows, reasons, strict=True) if reason is not None]
    if bad:
        _report(bad, len(rows), source, skip=skip)
    return [row for row, reason in zip(rows, reasons, strict=True) if isinstance(row, Row) and reason is None]


def empty(source: str) -> DataError:
    """What is wrong with a source without rows."""
    return DataError(f"{source} is empty", "give a dataset with at least one row")


def check_columns(columns: Sequence[str], required: Sequence[str], source: str) -> None:
    """Refuse rows with ``columns`` that lack a ``required`` one.

    Raises:
        DataError: names the column and what there is instead.
    """
    for name in required:
        if name not in columns:
            raise DataError(
                f"{source} has no column `{name}`; it has: {', '.join(columns)}",
                f"{suggest(name, columns)}; rename one with `--set data.rename.OLD={name}`",
            )


def _report(bad: Sequence[tuple[str, str]], num_rows: int, source: str, *, skip: bool) -> None:
    """Stop at the first bad row, or warn that the ``bad`` ones, of ``num_rows``, are left out."""
    origin, reason = bad[0]
    if not skip:
        others = f" (and {len(bad) - 1} more of {num_rows} rows cannot be used)" if len(bad) > 1 else ""
        raise DataError(f"{origin}: {reason}{others}", SKIP_HINT)
    first = f"the first, {origin}: {reason}"
    if len(bad) == num_rows:
        raise DataError(f"none of the {num_rows} rows of {source} can be used; {first}", "correct the dataset")
    logger.warning("left out %d of %d rows of %s that cannot be used; %s", len(bad), num_rows, source, first)


def fault(row: Row | BadRow, required: Sequence[str]) -> str | None:
    """Why ``row`` cannot be used, if so: unreadable, a required column without a value, a prompt that is no text."""
    if isinstance(row, BadRow):
        return row.reason
    for name in required:
        if row.columns.get(name) is None:
            return f"column `{name}` is missing"
    value = row.columns[required[0]]
    if not isinstance(value, str) or not value.strip():
        shown = repr(value)
        return f"column `{required[0]}` is {shown if len(shown) <= 40 else shown[:39] + '…'}, not the text of a prompt"
    return None


def hold_out(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """``rows`` divided by ``seed`` into those to train on and ``count`` held out (at most half; none of one row).

    Rows with the same columns stay on the same side only if they are the same row: a dataset with duplicates should
    name its own evaluation file.
    """
    count = min(count, len(rows) // 2)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(mix(seed, 1))).tolist()
    held = set(order[:count])
    return (
        [row for index, row in enumerate(rows) if index not in held],
        [rows[index] for index in sorted(held)],
    )


def same_question(text: str) -> str:
    """``text`` without what makes no other question of it: case, and how its words are spaced."""
    return " ".join(text.casefold().split())


def draw_examples(
    rows: Iterable[Row], count: int, seed: int, *, prompt: str, solution: str, source: str
) -> tuple[Example, ...]:
    """``count + 1`` examples with different questions, in an order that ``seed`` decides; none when ``count`` is 0.

    One more than is shown, so that every prompt finds ``count`` that are not itself. All prompts of a run are shown the
    same ones, but for that: what they have in common need be computed once only.

    Args:
        prompt: column of the question.
        solution: column of the worked solution; rows without one are no examples.

    Raises:
        DataError: there are too few.
    """
    if count == 0:
        return ()
    worked: dict[str, Example] = {}
    for row in rows:
        if row.columns.get(solution) is not None:
            text = str(row.columns[prompt])
            worked.setdefault(same_question(text), Example(text, str(row.columns[solution])))
    if len(worked) <= count:
        raise DataError(
            f"`data.few_shot` is {count}, and {source} has {len(worked)} different questions with a `{solution}`: "
            f"each needs {count} others",
            f"use at most {max(len(worked) - 1, 0)}, or name the column of the worked solutions with "
            "`--set data.solution=COLUMN`",
        )
    return tuple(random.Random(mix(seed, 5)).sample(list(worked.values()), count + 1))


def render(tokenizer: Any, text: str, fmt: PromptFormat) -> str:
    """The prompt as the model sees it: the tokenizer's chat template, else the plain one.

    Examples are earlier turns of the chat. In plain text each is the template, a space and the solution, and an empty
    line parts it from what follows.

    Raises:
        DataError: the chat template fails on this prompt.
    """
    if not getattr(tokenizer, "chat_template", None):
        return _plain(text, fmt)
    system = [{"role": "system", "content": fmt.system_prompt}] if fmt.system_prompt else []
    turns = [
        turn
        for one in fmt.shown_before(text)
        for turn in (
            {"role": "user", "content": fmt.asked(one.prompt)},
            {"role": "assistant", "content": one.solution},
        )
    ]
    messages = [*system, *turns, {"role": "user", "content": fmt.asked(text)}]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as failure:  # the boundary: a template is foreign code
        raise DataError(
            f"the tokenizer's chat template failed: {first_line(failure)}",
            "correct the template in the model folder, or leave out `data.system_prompt` if it takes none",
        ) from None


def _plain(text: str, fmt: PromptFormat) -> str:
    def asked(question: str) -> str:
        return fmt.template.replace("{prompt}", fmt.asked(question))

    opening = f"{fmt.system_prompt}\n" if fmt.system_prompt else ""
    shown = [f"{asked(one.prompt)} {one.solution}\n\n" for one in fmt.shown_before(text)]
    return opening + "".join(shown) + asked(text)


LONG_HINT = "shorten the prompts, lower `sampler.max_completion_length`, or raise `data.max_prompt_length` if it is set"
_DROP_HINT = "; `--set data.long_prompts=drop` leaves long prompts out"


def _render_row(tokenizer: Any, row: Row, fmt: PromptFormat) -> str:
    try:
        return render(tokenizer, str(row.columns[fmt.column]), fmt)
    except DataError as error:
        raise DataError(f"{row.origin}: {error.message}", error.hint) from None


def to_prompts(rows: Sequence[Row], tokenizer: Any, fmt: PromptFormat) -> tuple[Prompt, ...]:
    """Rows rendered and tokenized; prompts over the limit are left out with a warning, or refused if so asked.

    Raises:
        DataError: a prompt is longer than the limit and ``fmt.on_long`` is ``stop``; every prompt is; one is empty.
    """
    prompts, too_long = fit_prompts(list(enumerate(rows)), tokenizer, fmt)
    if not prompts:
        whole = f" ({len(too_long)} of {len(rows)} prompts are too long)" if len(too_long) > 1 else ""
        raise DataError(too_long[0] + whole, LONG_HINT)
    if too_long:
        logger.warning("%s; left out %d of %d prompts", too_long[0], len(too_long), len(rows))
    return tuple(prompts)


def fit_prompts(rows: Sequence[tuple[int, Row]], tokenizer: Any, fmt: PromptFormat) -> tuple[list[Prompt], list[str]]:
    """The prompts of numbered ``rows`` that keep to the limit, and what is wrong with each of the others.

    Raises:
        DataError: see `to_prompts`; that every prompt is too long is no error here unless ``fmt.on_long`` is ``stop``.
    """
    texts = [_render_row(tokenizer, row, fmt) for _, row in rows]
    # A chat template writes its own special tokens; the plain template leaves BOS to the tokenizer.
    special = not getattr(tokenizer, "chat_template", None)
    encoded = tokenizer(texts, add_special_tokens=special)["input_ids"]
    prompts, too_long = [], []
    for (index, row), text, ids in zip(rows, texts, encoded, strict=True):
        if not ids:
            raise DataError(f"{row.origin}: the prompt has no tokens", "check `data.template` and the tokenizer")
        if fmt.max_length is not None and len(ids) > fmt.max_length:
            too_long.append(
                f"{row.origin}: the prompt has {len(ids)} tokens, more than the {fmt.max_length} "
                f"that {fmt.limit_origin}"
            )
        else:
            prompts.append(
                Prompt(text=text, token_ids=tuple(ids), columns=dict(row.columns), index=index, origin=row.origin)
            )
    if too_long and fmt.on_long == "stop":
        whole = f" ({len(too_long)} of {len(rows)} prompts are too long)" if len(too_long) > 1 else ""
        raise DataError(too_long[0] + whole, LONG_HINT + (_DROP_HINT if prompts else ""))
    return prompts, too_long
