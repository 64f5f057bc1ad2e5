"""Which problems a run trains on, which it evaluates on, and which it shows as worked examples."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpoforge.choice import ChosenReward, with_options
from grpoforge.config import Config, DataConfig
from grpoforge.data import (
    Example,
    check_columns,
    columns_of,
    draw_examples,
    hold_out,
    rename_columns,
    renamed,
    usable,
)
from grpoforge.declarations import declared
from grpoforge.errors import ConfigError, DataError, GrpoforgeError, first_line, suggest
from grpoforge.origins import from_origin
from grpoforge.plugins import PluginHost
from grpoforge.registry import Component
from grpoforge.scoring import BUILTIN_DATA
from grpoforge.sources import BadRow, Row, is_array, is_path, iterate_hub, iterate_path, number_rows
from grpoforge.streaming import RowStream, usable_rows

logger = logging.getLogger(__name__)

ANSWER = "answer"
"""The column that ``data.answer`` stands in for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """The rows of a run. No row is in two of them but that examples are training rows."""

    train: tuple[Row, ...]
    """Rows to train on; none when they are a stream."""
    stream: RowStream | None
    held_out: tuple[Row, ...]
    """Rows to evaluate on while training."""
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What becomes of the columns of one source."""

    names: tuple[str, ...]
    """Every column, renamed."""
    required: tuple[str, ...]
    """Columns without which a row cannot be used, the prompt first."""
    answer: str
    """The column that rewards read as ``answer``."""

    def complete(self, row: Row) -> Row:
        """``row`` with every column, None where it has no value, and ``answer`` as rewards read it."""
        columns = {name: value for name, value in row.columns.items() if name in self.names}
        columns |= {name: None for name in self.names if name not in columns}
        if self.answer != ANSWER:
            columns[ANSWER] = columns[self.answer]
        return Row(columns, row.origin)


def load_problems(config: Config, host: PluginHost, rewards: Sequence[ChosenReward]) -> Problems:
    """What a run trains on, evaluates on and shows as examples.

    Raises:
        DataError: see `load_rows`.
        ConfigError: a stream without ``max_steps``.
    """
    if not config.data.streaming:
        train, held_out = load_rows(config, host, rewards)
        examples = _examples(config, train)
        return Problems(train=tuple(train), stream=None, held_out=tuple(held_out), examples=examples)
    stream, held_out = open_stream(config, host, rewards)
    examples = _examples(config, itertools.islice(stream.open(), config.data.shuffle_buffer))
    return Problems(train=(), stream=stream, held_out=tuple(held_out), examples=examples)


def load_rows(config: Config, host: PluginHost, rewards: Sequence[ChosenReward]) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to evaluate on, with every column that the prompt and the rewards need.

    Raises:
        DataError: see `grpoforge.data.usable`; too few rows to divide.
    """
    data = config.data
    train = _usable(config, _iterate(data.dataset, config, host, "train"), rewards, data.dataset)
    if _has_own_eval(data):
        held_out = _load_split(config, host, rewards, _split_while_training(config, host))
    else:
        num_usable = len(train)
        train, held_out = hold_out(train, data.num_eval, config.seed)
        if not held_out:
            raise DataError(
                f"{data.dataset} has 1 usable row: too few to train and to evaluate on",
                "give more rows, or another file with `--set data.eval_dataset=FILE`",
            )
        if len(held_out) < data.num_eval:
            logger.info(
                "holding out %d of the %d problems of %s for evaluation, at most half (`data.num_eval` is %d)",
                len(held_out),
                num_usable,
                data.dataset,
                data.num_eval,
            )
    _tell_repetition(len(train), config)
    _tell_hidden(columns_of(train), data.dataset)
    return train, held_out


def open_stream(config: Config, host: PluginHost, rewards: Sequence[ChosenReward]) -> tuple[RowStream, list[Row]]:
    """The training rows as a stream, and the rows to evaluate on: the first of it, unless there are others.

    The columns are those of the first row that can be read: a stream is not looked through for more.

    Raises:
        DataError: see `grpoforge.streaming.usable_rows`; a column that the first row lacks.
        ConfigError: ``max_steps`` is not set.
    """
    data, origins = config.data, config.origins
    if config.max_steps is None:
        raise ConfigError(
            f"`data.streaming` is true{origins.of('data', 'streaming')}, so how many rows {data.dataset} has is not "
            "known, and `epochs` is no number of steps",
            "say how many steps to take: `--max-steps N`",
        )
    if config.epochs is not None:
        logger.warning("`epochs` is %d, and nobody counts the rows of a stream: the run takes all of its %d steps",
                       config.epochs, config.max_steps)  # fmt: skip
    columns, read = _lazily(config, host, rewards, data.dataset, "train")
    if _has_own_eval(data):
        num_held_out, held_out = 0, _load_split(config, host, rewards, _split_while_training(config, host))
    else:
        num_held_out, held_out = data.num_eval, list(itertools.islice(read(), data.num_eval))
    _tell_hidden(columns.names, data.dataset)
    stream = RowStream(
        source=data.dataset,
        open=lambda: itertools.islice(read(), num_held_out, None),
        columns=tuple(columns.complete(Row({}, "")).columns),
        buffer=data.shuffle_buffer,
        seed=config.seed,
    )
    return stream, held_out


def load_eval_rows(config: Config, host: PluginHost, rewards: Sequence[ChosenReward]) -> list[Row]:
    """Rows that `grpoforge eval` measures on: the named evaluation dataset, the test split, or what training holds out.

    Raises:
        DataError: see `grpoforge.data.usable`.
    """
    if not _has_own_eval(config.data):
        return list(load_problems(config, host, rewards).held_out)
    return _load_split(config, host, rewards, "test")


def load_examples(config: Config, host: PluginHost, rewards: Sequence[ChosenReward]) -> tuple[Example, ...]:
    """The worked examples of a run's prompts, from its training rows; these are not read when there are none.

    Raises:
        DataError: see `load_problems`.
    """
    return load_problems(config, host, rewards).examples if config.data.few_shot else ()


def _load_split(config: Config, host: PluginHost, rewards: Sequence[ChosenReward], split: str) -> list[Row]:
    source, count = config.data.eval_dataset or config.data.dataset, config.data.num_eval
    if config.data.streaming:
        return list(itertools.islice(_lazily(config, host, rewards, source, split)[1](), count))
    return _usable(config, _iterate(source, config, host, split), rewards, source)[:count]


def _lazily(
    config: Config, host: PluginHost, rewards: Sequence[ChosenReward], source: str, split: str
) -> tuple[Columns, Callable[[], Iterator[Row]]]:
    """What becomes of the columns of a split, read off its first row, and what begins a pass over its usable rows."""
    data = config.data
    first = next((row for row in _iterate(source, config, host, split) if isinstance(row, Row)), None)
    known = rename_columns([first] if first else [], data.rename, source)
    columns = _columns(config, columns_of(known), rewards, source)
    if known:
        check_columns(columns.names, columns.required, source)

    def read() -> Iterator[Row]:
        rows = _iterate(source, config, host, split)
        named = (row if isinstance(row, BadRow) else renamed(row, data.rename) for row in rows)
        return map(columns.complete, usable_rows(named, columns.required, source, skip=data.skip_bad_rows))

    return columns, read


def _split_while_training(config: Config, host: PluginHost) -> str:
    """``validation`` of a dataset that declares such a split: its test split is for `grpoforge eval`."""
    source = config.data.eval_dataset or config.data.dataset
    found = () if _is_elsewhere(source) else host.registry.named(source, "dataset")
    return "validation" if any("validation" in declared(one.factory, "splits", ()) for one in found) else "test"


def _examples(config: Config, rows: Iterable[Row]) -> tuple[Example, ...]:
    data = config.data
    if not data.few_shot:
        return ()
    rows = list(rows)
    columns = columns_of(rows)
    solution = data.solution or ("solution" if "solution" in columns else ANSWER)
    if solution not in columns:
        raise DataError(
            f"`data.few_shot` shows the column `{solution}`{config.origins.of('data', 'solution')}, and {data.dataset} "
            f"has no such column; it has: {', '.join(columns)}",
            "name the column of the worked solutions with `--set data.solution=COLUMN`",
        )
    return draw_examples(rows, data.few_shot, config.seed, prompt=data.prompt, solution=solution, source=data.dataset)


def _tell_repetition(num_train: int, config: Config) -> None:
    if num_train < config.batch.prompts_per_step:
        logger.warning(
            "%s leaves %d to train on, fewer than the %d prompts of a step: problems repeat within a step",
            config.data.dataset,
            num_train,
            config.batch.prompts_per_step,
        )


def _tell_hidden(columns: Sequence[str], source: str) -> None:
    hidden = [name for name in columns if name in BUILTIN_DATA]
    if hidden:
        logger.warning(
            "%s has a column `%s`, which rewards cannot read: under that name they get the run's own data; "
            "rename it with `--set data.rename.%s=NAME`",
            source,
            hidden[0],
            hidden[0],
        )


def _has_own_eval(data: DataConfig) -> bool:
    return data.eval_dataset is not None or not _is_elsewhere(data.dataset)


def _is_elsewhere(name: str) -> bool:
    """True for files, folders and hub ids; False for registered datasets."""
    return is_path(name) or "/" in name


def _iterate(name: str, config: Config, host: PluginHost, split: str) -> Iterator[Row | BadRow]:
    """The rows of a split as they come; of a file the split is all of it."""
    # The options are those of the training dataset; another one that only evaluates takes none.
    options = config.data.options if name == config.data.dataset else {}
    origin = config.origins.of("data", "dataset" if name == config.data.dataset else "eval_dataset")
    if _is_elsewhere(name):
        _refuse_options(name, options, config.origins)
        with from_origin(origin):
            yield from _elsewhere(name, config, split, options)
        return
    with from_origin(origin):
        if os.path.isdir(name) and not host.registry.named(name, "dataset"):
            raise DataError(f"unknown dataset `{name}`", f"the folder of that name is `./{name}`")
        component = host.registry.get("dataset", name)
    dataset = with_options(component, options, config.origins, ("data", "options")).build()
    yield from number_rows(_call(component, dataset, split), f"{name}/{split}")


def _elsewhere(name: str, config: Config, split: str, options: Mapping[str, Any]) -> Iterator[Row | BadRow]:
    if not is_path(name):
        return iterate_hub(name, split, options.get("config"), streaming=config.data.streaming)
    path = Path(os.path.expanduser(name))
    if config.data.streaming and path.is_file() and is_array(path):
        raise DataError(
            f"{name} is one JSON array, which cannot be read row by row",
            "write one object per line, or leave out `data.streaming`",
        )
    return iterate_path(name)


def _refuse_options(name: str, options: Mapping[str, Any], origins: Any) -> None:
    """A file has no options, a hub dataset only its ``config``."""
    known = () if is_path(name) else ("config",)
    for option in options:
        if option not in known:
            kind = "file" if is_path(name) else "hub dataset"
            raise ConfigError(
                f"`data.options.{option}` is given{origins.of('data', 'options', option)}, and the {kind} {name} takes "
                f"{'no options' if not known else 'only `config`'}",
                "leave it out; options are for registered datasets, see `grpoforge plugins list --kind dataset`",
            )


def _call(component: Component, dataset: Any, split: str) -> Iterator[Any]:
    try:
        yield from dataset(split)
    except GrpoforgeError:
        raise
    except Exception as failure:  # the boundary: a dataset is foreign code
        raise DataError(
            f"dataset `{component.id}` raised {type(failure).__name__}: {first_line(failure)}",
            f"it is written in {component.source}",
        ) from failure


def _usable(config: Config, rows: Iterable[Row | BadRow], rewards: Sequence[ChosenReward], source: str) -> list[Row]:
    named = rename_columns(list(rows), config.data.rename, source)
    columns = _columns(config, columns_of(named), rewards, source)
    return [columns.complete(row) for row in usable(named, columns.required, source, skip=config.data.skip_bad_rows)]


def _columns(config: Config, names: Sequence[str], rewards: Sequence[ChosenReward], source: str) -> Columns:
    """What becomes of the columns ``names`` of ``source``, which are none when it has no rows.

    Raises:
        DataError: a reward, or ``data.answer``, names a column that is not there.
    """
    answer = _answer_column(config, names, source)
    readable = [*names, ANSWER] if names and answer != ANSWER else names
    required = [config.data.prompt]
    for number, reward in enumerate(rewards):
        only_evaluates = number >= len(config.rewards)
        where = f" (`eval.reward`{config.origins.of('eval', 'reward')})" if only_evaluates else ""
        remedy = "choose another `eval.reward`" if only_evaluates else "choose other rewards"
        required += _required_columns(reward, readable, source, where, remedy)
    wanted = dict.fromkeys(answer if name == ANSWER else name for name in required)
    return Columns(names=tuple(names), required=tuple(wanted), answer=answer)


def _answer_column(config: Config, names: Sequence[str], source: str) -> str:
    wanted = config.data.answer
    # Rows that only evaluate may come with the name that rewards know.
    if wanted is None or not names or (source != config.data.dataset and wanted not in names and ANSWER in names):
        return ANSWER
    if wanted not in names:
        raise DataError(
            f"`data.answer` is `{wanted}`{config.origins.of('data', 'answer')}, and {source} has no such column; "
            f"it has: {', '.join(names)}",
            suggest(wanted, names),
        )
    return wanted


def _required_columns(
    reward: ChosenReward, columns: Sequence[str], source: str, where: str, remedy: str
) -> Sequence[str]:
    """Every column that ``reward`` cannot do without; ``columns`` are those of ``source``, if it has rows at all."""
    component = reward.chosen.component
    needed = [one.name for one in component.data if one.required and one.name not in BUILTIN_DATA]
    for name in needed:
        if columns and name not in columns:
            raise DataError(
                f"reward `{component.id}`{where} reads the dataset column `{name}`, which {source} does not have; "
                f"it has: {', '.join(columns)}",
                f"rename a column with `--set data.rename.OLD={name}`, or {remedy}",
            )
    return needed
