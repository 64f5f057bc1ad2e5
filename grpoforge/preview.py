"""Prompts as the model would see them, without the model: what ``grpoforge data show`` shows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grpoforge.assembly import prompt_format
from grpoforge.choice import ChosenReward, choose
from grpoforge.config import Config
from grpoforge.data import Example, fit_prompts
from grpoforge.errors import ModelError
from grpoforge.launch import load_host
from grpoforge.parts import choose_measured
from grpoforge.plugins import PluginHost
from grpoforge.policy import Reader
from grpoforge.problems import load_eval_rows, load_examples, load_problems
from grpoforge.sources import Row
from grpoforge.tracking import columns_json

Split = Literal["train", "validation", "test"]
MAX_BARS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownRow:
    """A row and its prompt."""

    origin: str
    """Where the row stands: ``train.jsonl:17``."""
    num_tokens: int
    text: str
    """The prompt's tokens as text, special ones too."""
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the rows."""

    name: str
    type: str
    """Of the value in the first row."""
    read_by: tuple[str, ...]
    """Rewards that read it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Prompts of ``low`` to ``high`` tokens, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long the prompts are, in tokens; quantiles are those of a prompt that exists, the median may lie between."""

    min: int
    median: float
    p95: int
    max: int
    num_over_limit: int
    histogram: tuple[Bar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """The prompts of a split: some of them whole, the lengths of all."""

    dataset: str
    split: Split
    model: str
    num_rows: int
    """Rows that were measured."""
    is_complete: bool
    """False for a stream: only the rows that fill its buffer were looked at."""
    limit: int | None
    """Longest prompt in tokens; None for no limit."""
    limit_origin: str
    few_shot: int
    lengths: Lengths
    columns: tuple[Column, ...]
    rows: tuple[ShownRow, ...]
    notes: tuple[str, ...]


def preview(config: Config, split: Split, count: int) -> Preview:
    """The first ``count`` prompts of ``split`` and the lengths of all of them.

    ``train`` is what steps draw from, ``validation`` what `grpoforge train` evaluates on, and ``test`` what `grpoforge
    eval` does: the same rows as ``validation`` where the dataset has no more.

    Raises:
        GrpoforgeError: a part, the data, or the model's tokenizer cannot be used.
    """
    host = load_host(config)
    measured, _ = choose_measured(config, host)
    sampler = choose("sampler", config.sampler, host, config.origins, ("sampler",)).build()
    rows, examples = _rows(config, host, measured, split)
    reader = load_reader(config, host)
    fmt = prompt_format(config, reader, sampler, examples)
    prompts, _ = fit_prompts(list(enumerate(rows)), reader.tokenizer, dataclasses.replace(fmt, max_length=None))
    return Preview(
        dataset=config.data.dataset if split == "train" else config.data.eval_dataset or config.data.dataset,
        split=split,
        model=config.model.name,
        num_rows=len(prompts),
        is_complete=not (config.data.streaming and split == "train"),
        limit=fmt.max_length,
        limit_origin=fmt.limit_origin,
        few_shot=fmt.few_shot,
        lengths=measure_lengths([len(prompt.token_ids) for prompt in prompts], fmt.max_length),
        columns=_columns(rows[0], measured),
        rows=tuple(
            ShownRow(
                origin=prompt.origin,
                num_tokens=len(prompt.token_ids),
                text=reader.tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False),
                columns=json.loads(columns_json(prompt)),
            )
            for prompt in prompts[:count]
        ),
        notes=reader.notes,
    )


def load_reader(config: Config, host: PluginHost) -> Reader:
    """What reads the prompts of ``config.model``, from the first plugin that knows the model.

    Raises:
        ModelError: nobody knows it, or it has no tokenizer that can be used.
    """
    reader: Reader | None = host.hook.load_reader(model=config.model)
    if reader is None:
        raise ModelError(f"no plugin can read for the model `{config.model.name}`", "give a model folder or a hub id")
    return reader


def _rows(
    config: Config, host: PluginHost, measured: Sequence[ChosenReward], split: Split
) -> tuple[Sequence[Row], Sequence[Example]]:
    if split == "test":
        return load_eval_rows(config, host, measured), load_examples(config, host, measured)
    problems = load_problems(config, host, measured)
    if split == "validation":
        return problems.held_out, problems.examples
    if problems.stream is None:
        return problems.train, problems.examples
    rows = (row for _, row in problems.stream.numbered())
    return list(itertools.islice(rows, problems.stream.buffer)), problems.examples


def _columns(row: Row, rewards: Sequence[ChosenReward]) -> tuple[Column, ...]:
    return tuple(
        Column(name=name, type=type(value).__name__, read_by=tuple(one.name for one in rewards if _reads(one, name)))
        for name, value in row.columns.items()
    )


def _reads(reward: ChosenReward, column: str) -> bool:
    component = reward.chosen.component
    return component.accepts_any_data or any(one.name == column for one in component.data)


def measure_lengths(lengths: Sequence[int], limit: int | None) -> Lengths:
    """The distribution of ``lengths``, at least one of them, all positive."""
    ranked = sorted(lengths)
    return Lengths(
        min=ranked[0],
        median=statistics.median(ranked),
        p95=ranked[math.ceil(0.95 * len(ranked)) - 1],
        max=ranked[-1],
        num_over_limit=0 if limit is None else sum(length > limit for length in ranked),
        histogram=_histogram(ranked),
    )


def _histogram(ranked: Sequence[int]) -> tuple[Bar, ...]:
    """Bars of one round width, at most `MAX_BARS` of them, from the shortest to the longest."""
    low, high = ranked[0], ranked[-1]
    widths = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    width = next(one for one in widths if high // one - low // one < MAX_BARS)
    counts = [0] * (high // width - low // width + 1)
    for length in ranked:
        counts[length // width - low // width] += 1
    first = low // width * width
    return tuple(
        Bar(low=first + number * width, high=first + (number + 1) * width - 1, count=count)
        for number, count in enumerate(counts)
    )
