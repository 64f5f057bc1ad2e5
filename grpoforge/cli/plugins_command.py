"""``grpoforge plugins``: what is installed, what it takes, and what is broken."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.console import Console

    from grpoforge.plugins import PluginHost
    from grpoforge.registry import Component, Kind, Registry
    from grpoforge.testing import Report

PIPE_WIDTH = 500
"""Columns of a table that goes to a file or a pipe: nothing is wrapped there."""


LIST_ITEM = re.compile(r"([-*]|[0-9]{1,3}[.)]) ")


class ListByDefault(TyperGroup):
    """``plugins`` alone, or with options only, means ``plugins list``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(name="plugins", cls=ListByDefault, help="Show the components that plugins bring.")

PluginFiles = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="PATH", help="Load this plugin file as well; repeatable."),
]
KindOption = Annotated[str | None, typer.Option("--kind", metavar="KIND", help="Only components of this kind.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]


@app.command("list")
def list_components(kind: KindOption = None, as_json: AsJson = False, plugin: PluginFiles = None) -> None:
    """List the components of all plugins, then the plugins that are broken."""
    host = _load(plugin)
    components = host.registry.list(_parse_kind(kind))
    if as_json:
        broken = [{"name": one.name, "source": one.source, "reason": one.reason} for one in host.broken]
        _write_json({"components": [describe(component) for component in components], "broken": broken})
        return
    console = _console()
    _print_table(console, ("kind", "name", "what it does", "plugin"), map(_row, components))
    if host.broken:
        console.print()
        rows = ((one.name, one.source, one.reason) for one in host.broken)
        _print_table(console, ("broken plugin", "source", "reason"), rows)


@app.command("show")
def show_component(
    name: Annotated[str, typer.Argument(help="A name, or `plugin:name`.")],
    kind: KindOption = None,
    as_json: AsJson = False,
    plugin: PluginFiles = None,
) -> None:
    """Show one component: its source, data, options and documentation."""
    component = find(_load(plugin).registry, name, _parse_kind(kind))
    if as_json:
        _write_json(describe(component))
    else:
        _print_component(_console(), component)


@app.command("check")
def check(
    target: Annotated[
        str, typer.Argument(metavar="PATH|NAME", help="A plugin file, `FILE.py:FUNCTION`, a component or a plugin.")
    ],
    kind: KindOption = None,
    as_json: AsJson = False,
    plugin: PluginFiles = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="OPTION=VALUE", help="An option of the component; repeatable.")
    ] = None,
) -> None:
    """Check that components keep their contract; exit code 1 when a rule is broken."""
    components = targets(target, _parse_kind(kind), plugin or [])
    options = _options(target, components, settings or [])
    from grpoforge.testing import check_component

    reports = [check_component(one, given) for one, given in zip(components, options, strict=True)]
    if as_json:
        _write_json({"reports": [report.as_json() for report in reports]})
    else:
        typer.echo("\n\n".join([*map(str, reports), _verdict(reports)]))
    if not all(report.kept for report in reports):
        raise typer.Exit(1)


def targets(target: str, kind: Kind | None, files: list[Path]) -> tuple[Component, ...]:
    """The components that ``target`` means: those of a file or a plugin, a function of a file, or one by its name.

    Raises:
        PluginError: a file that does not load, or nothing of that name or ``kind``.
    """
    from grpoforge.errors import PluginError
    from grpoforge.plugins import load_function, load_plugins

    file, _, function = target.rpartition(":")
    if file.endswith(".py"):
        return (load_function(Path(file), function, kind or "reward"),)
    path = Path(target)
    if path.is_dir() and os.sep in target:
        raise PluginError(f"`{target}` is a folder", "name the plugin's file, or an installed plugin by its name")
    is_file = path.suffix == ".py" or os.sep in target
    registry = load_plugins([*files, path] if is_file else files).registry
    name = path.stem if is_file else target
    brought = [one for one in registry.list() if one.plugin == name]
    if not brought and not is_file:
        return (find(registry, target, kind),)
    found = tuple(one for one in brought if kind in (None, one.kind))
    if not found:
        kinds = ", ".join(dict.fromkeys(one.kind for one in brought))
        raise PluginError(f"`{target}` registers no {kind or 'component'}", f"it registers: {kinds or 'nothing'}")
    return found


def _options(target: str, components: Sequence[Component], settings: Sequence[str]) -> list[dict[str, Any]]:
    """What each component gets of ``--set``: the options that it has."""
    from grpoforge.errors import ConfigError, suggest
    from grpoforge.yaml_source import parse_override

    given: dict[str, Any] = {}
    for setting in settings:
        given |= parse_override(setting)
    known = [{option.name for option in component.option_parameters} for component in components]
    for name in given:
        if not any(name in names for names in known):
            every = set().union(*known)
            hint = suggest(name, every) if every else "leave out `--set`"
            raise ConfigError(f"nothing in `{target}` takes the option `{name}`", hint)
    return [{name: value for name, value in given.items() if name in names} for names in known]


def _verdict(reports: Sequence[Report]) -> str:
    """How many rules were kept, in a line."""
    statuses = [finding.status for report in reports for finding in report.findings]
    count = f"{len(reports)} component{'s' if len(reports) > 1 else ''}"
    return f"{count}; rules kept: {statuses.count('passed')}, broken: {statuses.count('failed')}"


def find(registry: Registry, name: str, kind: Kind | None) -> Component:
    """The component that ``name`` means, of whatever kind when ``kind`` is None.

    Raises:
        PluginError: nothing has the name, several plugins do, or components of several kinds do.
    """
    from grpoforge.errors import PluginError

    found = registry.named(name, kind)
    kinds = list(dict.fromkeys(component.kind for component in found))
    if kind is None and not found:
        raise PluginError(f"unknown component `{name}`", registry.hint_unknown(name))
    if len(kinds) > 1:
        raise PluginError(
            f"`{name}` is the name of components of several kinds: {', '.join(kinds)}",
            f"add `--kind {kinds[0]}`",
        )
    return registry.get(kind or kinds[0], name)


def describe(component: Component) -> dict[str, Any]:
    """``component`` as JSON values."""
    return {
        "kind": component.kind,
        "id": component.id,
        "name": component.name,
        "plugin": component.plugin,
        "source": component.source,
        "weight": component.weight if component.kind == "reward" else None,
        "gate": component.gate,
        "data": [{"name": one.name, "required": one.required} for one in component.data],
        "accepts_any_data": component.accepts_any_data,
        "options": [
            {
                "name": option.name,
                "type": option.type,
                "required": option.required,
                "default": option.default,
                "help": option.help,
            }
            for option in component.option_parameters
        ],
        "doc": component.full_doc,
    }


def _load(files: list[Path] | None) -> PluginHost:
    from grpoforge.plugins import load_plugins

    return load_plugins(files or ())


def _parse_kind(kind: str | None) -> Kind | None:
    from grpoforge.errors import ConfigError, suggest
    from grpoforge.registry import KINDS

    for known in KINDS:
        if kind == known:
            return known
    if kind is None:
        return None
    raise ConfigError(f"unknown kind `{kind}`", suggest(kind, KINDS))


def _console() -> Console:
    """Standard output. rich itself drops color for ``NO_COLOR`` and for pipes."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


def _write_json(document: dict[str, Any]) -> None:
    # Defaults are Python values: a path or a set of them is shown as text.
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, default=str))


def _print_table(console: Console, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        # Text, because names, reasons and docstrings are not markup.
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def _row(component: Component) -> tuple[str, ...]:
    return component.kind, component.name, _single_ticks(component.doc), component.plugin


def _data(component: Component) -> str:
    """The data by name; ``?`` marks what is optional, ``...`` stands for every dataset column."""
    names = [one.name if one.required else f"{one.name}?" for one in component.data]
    return ", ".join([*names, "..."] if component.accepts_any_data else names)


def _single_ticks(text: str) -> str:
    return text.replace("``", "`")


def reflow(doc: str) -> str:
    """A docstring with the lines of each paragraph, and of each item of a list, joined; indented text stays."""
    lines: list[str] = []
    for line in _single_ticks(doc).splitlines():
        in_item = bool(lines) and LIST_ITEM.match(lines[-1])
        starts_anew = not line or LIST_ITEM.match(line.lstrip()) or (line.startswith(" ") and not in_item)
        if not lines or starts_anew or not lines[-1] or lines[-1].startswith(" "):
            lines.append(line)
        else:
            lines[-1] += " " + line.lstrip()
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """A default as it reads in a table: strings without quotes, unless that would hide one."""
    return value if isinstance(value, str) and value.strip() and value.isprintable() else repr(value)


def _print_component(console: Console, component: Component) -> None:
    from rich.text import Text

    facts = [("id", component.id), ("kind", component.kind), ("source", component.source)]
    if component.kind == "reward":
        facts.append(("weight", f"{component.weight:g}"))
    if component.gate:
        facts.append(("gate", component.gate))
    facts.append(("data", _data(component) or "none"))
    for title, value in facts:
        console.print(Text(f"{title:<8}{value}"))
    console.print()
    if component.option_parameters:
        rows = (
            (
                option.name,
                option.type,
                "required" if option.required else _plain(option.default),
                _single_ticks(option.help),
            )
            for option in component.option_parameters
        )
        _print_table(console, ("option", "type", "default", "help"), rows)
    else:
        console.print("It takes no options.")
    if component.full_doc:
        console.print()
        console.print(Text(reflow(component.full_doc)))
