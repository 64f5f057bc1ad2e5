"""``grpoforge data``: what the model will be asked."""

from __future__ import annotations

import dataclasses
import json
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grpoforge.cli.settings import (
    Dataset,
    Overrides,
    PluginFiles,
    Rewards,
    announce,
    base_layers,
    flag_layers,
    reward_layer,
    stdout_is_data,
    user_layers,
)

if TYPE_CHECKING:
    from grpoforge.preview import Bar, Column, Preview, ShownRow

app = typer.Typer(name="data", help="Show the problems as the model will see them.")

BAR_WIDTH = 40
MAX_PROMPT_CHARS = 20_000
MAX_VALUE_CHARS = 100


class Split(StrEnum):
    """Which rows."""

    train = "train"
    validation = "validation"
    test = "test"


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("show")
def show(
    recipes: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE|FILE.yaml]...", help="What to start from, as in `train`.")
    ] = None,
    dataset: Dataset = None,
    model: Annotated[
        str | None, typer.Option(metavar="DIR|ID", help="A model folder or a hub id: its tokenizer, not its weights.")
    ] = None,
    split: Annotated[
        Split, typer.Option(help="Rows of training, those it evaluates on, or those of `grpoforge eval`.")
    ] = Split.train,
    rows: Annotated[int, typer.Option(metavar="N", min=0, help="Rows to show whole.")] = 3,
    reward: Rewards = None,
    plugin: PluginFiles = None,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Show prompts exactly as the model will see them, and how long all of them are."""
    from grpoforge.layers import build

    flags = [
        *reward_layer(reward),
        *flag_layers({"--dataset": ("data.dataset", dataset), "--model": ("model.name", model)}),
    ]
    config = build(user_layers(base_layers(recipes), set_, flags, plugin))
    announce("reading the problems and the tokenizer ...")
    from grpoforge.preview import preview

    with stdout_is_data():
        shown = preview(config, split.value, rows)
        for note in shown.notes:
            sys.stderr.write(f"note: {_line(note)}\n")
    sys.stdout.write(_as_json(shown) if as_json else "\n".join(lines(shown)) + "\n")


def _as_json(shown: Preview) -> str:
    """One object; characters beyond ASCII are escaped, so nothing acts on a terminal."""
    return json.dumps(dataclasses.asdict(shown), indent=2, allow_nan=False) + "\n"


def lines(shown: Preview) -> list[str]:
    """The preview for people: rows, columns, lengths."""
    shots = f", {shown.few_shot} examples before each" if shown.few_shot else ""
    some = "" if shown.is_complete else "the first "
    head = f"{_line(shown.dataset)}, {shown.split}: {some}{shown.num_rows:,} prompts for {_line(shown.model)}{shots}"
    return [
        head,
        *(line for row in shown.rows for line in _row_lines(row, shown.limit)),
        "",
        "columns",
        *_column_lines(shown.columns, shown.rows[0].columns if shown.rows else {}),
        "",
        "prompt length in tokens",
        *_length_lines(shown),
    ]


def _row_lines(row: ShownRow, limit: int | None) -> list[str]:
    """The prompt's lines behind a bar, so that an empty last line can be seen."""
    from grpoforge.sanitize import sanitize

    over = "" if limit is None or row.num_tokens <= limit else f", over the limit of {limit}"
    text = sanitize(row.text, max_chars=MAX_PROMPT_CHARS)
    return ["", f"{_line(row.origin)}  {row.num_tokens} tokens{over}", *(f"  | {line}" for line in text.split("\n"))]


def _column_lines(columns: tuple[Column, ...], values: Any) -> list[str]:
    names = [_line(column.name) for column in columns]
    width, widest = max(map(len, names), default=0), max((len(column.type) for column in columns), default=0)
    return [
        f"  {name:<{width}}  {column.type:<{widest}}  {_line(json.dumps(values.get(column.name), ensure_ascii=False))}"
        + (f"  (read by {', '.join(map(_line, column.read_by))})" if column.read_by else "")
        for name, column in zip(names, columns, strict=True)
    ]


def _length_lines(shown: Preview) -> list[str]:
    lengths = shown.lengths
    limit = "none" if shown.limit is None else f"{shown.limit} ({_line(shown.limit_origin)})"
    return [
        *_bars(lengths.histogram),
        f"  min {lengths.min}  median {lengths.median:g}  p95 {lengths.p95}  max {lengths.max}",
        f"  limit {limit}; {lengths.num_over_limit:,} of {shown.num_rows:,} prompts exceed it",
    ]


def _bars(histogram: tuple[Bar, ...]) -> list[str]:
    most = max(bar.count for bar in histogram)
    labels = [f"{bar.low}-{bar.high}" if bar.high > bar.low else str(bar.low) for bar in histogram]
    width = max(map(len, labels))
    return [
        f"  {label:>{width}}  {'#' * -(-bar.count * BAR_WIDTH // most):<{BAR_WIDTH}}  {bar.count:,}"
        for label, bar in zip(labels, histogram, strict=True)
    ]


def _line(text: str) -> str:
    from grpoforge.sanitize import one_line

    return one_line(text, max_chars=MAX_VALUE_CHARS)
