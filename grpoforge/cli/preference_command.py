"""``grpoforge preference``: pairs, training and figures of a preference model, away from any run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from grpoforge.cli.settings import PluginFiles, announce, stdout_is_data

app = typer.Typer(name="preference", help="Train and measure a preference model on pairs of completions.")

Settings = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="OPTION=VALUE", help="Change an option; repeatable.")
]
ComponentName = Annotated[
    str, typer.Option("--component", metavar="NAME", help="The reward whose preference model it is.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]
Pairs = Annotated[
    Path, typer.Argument(metavar="PAIRS.jsonl", help="Columns prompt, chosen, rejected; and margin and kind.")
]

SHOWN_UPDATES = 10
NOTHING: Mapping[str, Any] = {}


@app.command("train")
def train(
    pairs: Pairs,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the trained model.")],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="FOLDER|ID", help="An encoder to start from; default: a new small BERT."),
    ] = None,
    settings: Settings = None,
    component: ComponentName = "preference",
    plugin: PluginFiles = None,
    as_json: AsJson = False,
) -> None:
    """Teach an encoder which of two completions is better; writes an ordinary Hugging Face folder."""
    _check_new(output)
    announce("loading torch ...")
    flags = {} if model is None else {"model": model}
    with stdout_is_data():
        report = _function(component, "train", settings, plugin, flags)(pairs, output, _show_progress)
    _show(report, as_json)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder that `preference train` wrote, or a hub id.")],
    pairs: Pairs,
    settings: Settings = None,
    component: ComponentName = "preference",
    plugin: PluginFiles = None,
    as_json: AsJson = False,
) -> None:
    """Measure a preference model on pairs: accuracy, calibration, length bias, antisymmetry."""
    announce("loading torch ...")
    with stdout_is_data():
        report = _function(component, "evaluate", settings, plugin)(model, pairs)
    _show(report, as_json)


@app.command("pairs")
def make_pairs(
    problems: Annotated[
        Path, typer.Argument(metavar="PROBLEMS.jsonl", help="Columns question and answer, as GSM8K has them.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PAIRS.jsonl", help="File for the pairs.")],
    settings: Settings = None,
    component: ComponentName = "preference",
    plugin: PluginFiles = None,
    as_json: AsJson = False,
) -> None:
    """Make pairs from worked problems: the solution, and the same with a mistake."""
    with stdout_is_data():
        report = _function(component, "pairs", settings, plugin)(problems, output)
    _show(report, as_json)


def _check_new(folder: Path) -> None:
    """Refuse a folder that holds something or cannot be made, before anything is loaded."""
    from grpoforge.errors import ConfigError

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"`--output {folder}` exists and is not empty", "name a new folder")
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"`--output {folder}` cannot be made in {above}", "name a folder of yours")


def _function(
    name: str,
    what: str,
    settings: Sequence[str] | None,
    plugin: list[Path] | None,
    flags: Mapping[str, Any] = NOTHING,
) -> Callable[..., dict[str, Any]]:
    """What the reward ``name`` calls ``what``, with its options checked and bound.

    Raises:
        PluginError: there is no such reward, or it has no preference model to train.
        ConfigError: an option is unknown or of the wrong type.
    """
    from grpoforge.errors import PluginError
    from grpoforge.plugins import load_plugins
    from grpoforge.registry import make_component
    from grpoforge.yaml_source import parse_override

    options: dict[str, Any] = {}
    for setting in settings or ():
        options |= parse_override(setting)
    reward = load_plugins(plugin or []).registry.get("reward", name)
    function = getattr(reward.factory, what, None)
    if function is None:
        raise PluginError(
            f"reward `{reward.id}` has no preference model: its class has no function `{what}`",
            "leave out `--component`, or name a reward that has",
        )
    checked = make_component("reward", f"{reward.name}.{what}", reward.plugin, function)
    bound: Callable[..., dict[str, Any]] = checked.build({**options, **flags})
    return bound


def _show_progress(done: int, total: int, loss: float) -> None:
    """Ten lines over the whole of it."""
    if done == total or done * SHOWN_UPDATES // total > (done - 1) * SHOWN_UPDATES // total:
        sys.stderr.write(f"update {done}/{total}  loss {loss:.3f}\n")


def _show(report: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2, allow_nan=False) + "\n")
        return
    for name, value in _lines(report):
        sys.stdout.write(f"{name:<32}{value}\n")


def _lines(report: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The figures of a report, one a line; an accuracy is shown with its interval."""
    lines: list[tuple[str, str]] = []
    for name, value in report.items():
        label = f"{prefix}{name}"
        if isinstance(value, Mapping) and "accuracy" in value and "low" in value:
            lines.append((label, _accuracy(value)))
        elif isinstance(value, Mapping):
            lines += _lines(value, f"{label}/")
        elif isinstance(value, list):
            lines += [(f"{label}/{one['from']:.2f}-{one['to']:.2f}", _bin(one)) for one in value]
        else:
            lines.append((label, _number(value)))
    return lines


def _accuracy(value: Mapping[str, Any]) -> str:
    return f"{value['accuracy']:.1%}  ({value['low']:.1%} to {value['high']:.1%}, {value['pairs']} pairs)"


def _bin(value: Mapping[str, Any]) -> str:
    return f"sure {value['confidence']:.1%}, right {value['accuracy']:.1%}, {value['pairs']} pairs"


def _number(value: Any) -> str:
    """A figure as people read it; what was not measured is a dash."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
