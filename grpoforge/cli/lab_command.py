"""``grpoforge lab``: what KL estimators, advantages and losses are worth, where the truth is known."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grpoforge.cli.settings import PluginFiles, announce, stdout_is_data

if TYPE_CHECKING:
    from grpoforge.lab import LabReport
    from grpoforge.registry import Component, Registry

MEASURED = ("kl", "advantage", "loss")
EVERYTHING = "all"
ARTICLES = {"advantage": "an advantage"}


def lab(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KIND] [NAME ...]", help="kl, advantage, loss or all; then components. Default: all."),
    ] = None,
    plugin: PluginFiles = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="OPTION=VALUE", help="An option of the components that have it; repeatable."),
    ] = None,
    samples: Annotated[
        int, typer.Option(metavar="N", min=2, help="Batches to draw where not all can be enumerated.")
    ] = 1000,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="What they are drawn from.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE|-", help="Write the figures here; - is standard output.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw them here; needs the extra `plot`.")
    ] = None,
) -> None:
    """Measure bias and variance of KL estimators, advantages and losses on small policies that are enumerated.

    Exit code 1: a component failed; the others are measured all the same.
    """
    _check_folders(json_file, plot)
    announce("loading torch ...")
    with stdout_is_data():
        report = _measure(what or [], plugin or [], settings or [], samples=samples, seed=seed, plot=plot)
    _show(report, json_file, plot)
    if report.failed:
        raise typer.Exit(1)


def _measure(
    what: list[str], files: list[Path], settings: list[str], *, samples: int, seed: int, plot: Path | None
) -> LabReport:
    from grpoforge.plugins import load_plugins

    components = choose(load_plugins(files).registry, what)
    options = _options(components, settings)
    if plot:
        from grpoforge.lab.plot import require_plotting

        require_plotting(plot)
    from grpoforge.lab import measure

    announce(f"measuring {len(components)} component{'s' if len(components) > 1 else ''} ...")
    return measure(components, options, samples=samples, seed=seed)


def choose(registry: Registry, what: Sequence[str]) -> list[Component]:
    """The components that the arguments mean: those of a kind, or of the names after it; all without arguments.

    Raises:
        PluginError: nothing that is measured has a name, several plugins do, or nothing is left to measure.
    """
    from grpoforge.errors import PluginError

    first, names = (what[0], what[1:]) if what and what[0] in (*MEASURED, EVERYTHING) else (EVERYTHING, what)
    kinds = MEASURED if first == EVERYTHING else (first,)
    measured = _only(registry, kinds)
    if not names:
        chosen = list(measured.list())
        if not chosen:
            raise PluginError(f"no {first} is installed", "see `grpoforge plugins list`")
        return chosen
    found = [component for name in names for component in _named(registry, measured, name)]
    return list({component.kind + component.id: component for component in found}.values())


def _only(registry: Registry, kinds: Sequence[str]) -> Registry:
    """The components of ``kinds``, and the plugins that did not load: they may explain a name that is missing."""
    from grpoforge.registry import Registry

    measured = Registry()
    for component in registry.list():
        if component.kind in kinds:
            measured.add(component)
    for broken in registry.broken:
        measured.add_broken(broken)
    return measured


def _named(registry: Registry, measured: Registry, name: str) -> list[Component]:
    from grpoforge.errors import PluginError

    kinds = dict.fromkeys(component.kind for component in measured.named(name))
    if kinds:
        return [measured.get(kind, name) for kind in kinds]
    others = registry.named(name)
    if others:
        kind = others[0].kind
        raise PluginError(f"`{name}` is {ARTICLES.get(kind, f'a {kind}')}, and is not measured", _known(measured))
    raise PluginError(f"unknown component `{name}`", measured.hint_unknown(name))


def _known(measured: Registry) -> str:
    return f"measured are: {', '.join(dict.fromkeys(component.name for component in measured.list()))}"


def _options(components: Sequence[Component], settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each component gets of ``--set``, by id: the options that it has, checked."""
    from grpoforge.errors import ConfigError, suggest
    from grpoforge.yaml_source import parse_override

    given: dict[str, Any] = {}
    for setting in settings:
        given |= parse_override(setting)
    known = {component.id: {option.name for option in component.option_parameters} for component in components}
    for name in given:
        if not any(name in names for names in known.values()):
            every = set().union(*known.values())
            hint = suggest(name, every) if every else "leave out `--set`"
            raise ConfigError(f"nothing that is measured takes the option `{name}`", hint)
    chosen = {
        component.id: {name: value for name, value in given.items() if name in known[component.id]}
        for component in components
    }
    for component in components:
        if chosen[component.id]:
            component.validate(chosen[component.id])
    return chosen


def _check_folders(*files: Path | None) -> None:
    """Refuse a file that cannot be written before half a minute is spent."""
    from grpoforge.errors import DataError

    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise DataError(f"the folder of `{file}` does not exist", f"make it: mkdir -p {file.parent}")


def _show(report: LabReport, json_file: Path | None, plot: Path | None) -> None:
    from grpoforge.cli.lab_display import print_report

    if json_file == Path("-"):
        sys.stdout.write(_as_text(report))
    else:
        print_report(report)
        if json_file is not None:
            _write(json_file, _as_text(report))
    if plot is not None:
        from grpoforge.lab.plot import write_plot

        write_plot(report, plot)
        sys.stderr.write(f"wrote {plot}\n")


def _as_text(report: LabReport) -> str:
    return json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    from grpoforge.errors import DataError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"`--json {path}` cannot be written: {error.strerror}", "give a file in a folder of yours"
        ) from None
    sys.stderr.write(f"wrote {path}\n")
