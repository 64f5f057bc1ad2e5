"""What other systems do where we offer a choice: ``--dialect trl`` sets the options of the chosen components as TRL has
them. A layer of plain values like any other: above recipes and files, below ``--set`` and the flags.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from grpoforge.config import Config, Part
from grpoforge.errors import ConfigError, suggest
from grpoforge.yaml_source import as_mapping, parse_yaml

logger = logging.getLogger(__name__)

FLAG = "--dialect"
OWN_PLUGIN = "grpoforge:"


def dialect_names() -> list[str]:
    """Names of the dialects that come with the package."""
    folder = resources.files("grpoforge").joinpath("dialects")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_dialect(name: str) -> dict[str, dict[str, Any]]:
    """``{kind: {component: options}}`` of dialect ``name``, and ``reduction`` by loss.

    Raises:
        ConfigError: there is no such dialect.
    """
    if name not in dialect_names():
        raise ConfigError(f"unknown dialect `{name}` (from {FLAG})", suggest(name, dialect_names()))
    text = resources.files("grpoforge").joinpath("dialects", f"{name}.yaml").read_text(encoding="utf-8")
    return as_mapping(parse_yaml(text, f"dialect {name}"), f"dialect {name}")


def dialect_layer(name: str, chosen: Config, below: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The layer of dialect ``name`` for the components of ``chosen``, and its origin ``--dialect NAME``.

    A component that the dialect does not know is left alone, with a warning.

    Args:
        chosen: the configuration of all other layers.
        below: the merged values of the layers below this one: some components are only chosen above.

    Raises:
        ConfigError: there is no such dialect.
    """
    dialect = read_dialect(name)
    values: dict[str, Any] = {}
    for kind in _kinds(chosen):
        part: Part = getattr(chosen, kind)
        if options := _options(name, dialect, kind, part):
            # A component that is chosen above starts afresh there, unless it stands here already.
            stands = below.get(kind, {}).get("name") == part.name
            values[kind] = options if stands else {"name": part.name, **options}
    corrections = {part.name: _options(name, dialect, "correction", part) for part in chosen.corrections}
    if list(corrections) != _names(below.get("corrections")):
        values["corrections"] = [{"name": correction, **options} for correction, options in corrections.items()]
    elif any(corrections.values()):
        values["corrections"] = corrections
    if reduction := dialect["reduction"].get(_plain(chosen.loss.name)):
        values["reduction"] = reduction
    return f"{FLAG} {name}", values


def describe_dialect(config: Config) -> str:
    """``trl: advantage.epsilon 0.0001, ...``: what a dialect set and no other layer changed; empty without one."""
    values, settings, name = config.model_dump(mode="json"), [], ""
    for path, origin in sorted(config.origins.by_key.items()):
        if origin.startswith(f"{FLAG} ") and path and path[-1] not in ("name", "corrections"):
            name = origin.removeprefix(f"{FLAG} ")
            settings.append(f"{'.'.join(path)} {json.dumps(_at(values, path))}")
    return f"{name}: {', '.join(settings)}" if settings else ""


def _at(values: Any, path: Sequence[str]) -> Any:
    """The value of the key ``path``; of a list, the part by its name."""
    for key in path:
        values = next(part for part in values if part["name"] == key) if isinstance(values, list) else values[key]
    return values


def _kinds(config: Config) -> tuple[str, ...]:
    """The kinds that a dialect may speak of; without a KL its estimator plays no part."""
    return ("advantage", "loss", "kl") if config.kl.beta else ("advantage", "loss")


def _options(dialect_name: str, dialect: Mapping[str, Mapping[str, Any]], kind: str, part: Part) -> dict[str, Any]:
    """What the dialect sets of ``part``; nothing, with a warning, when it does not know it."""
    known = dialect[kind]
    if _plain(part.name) not in known:
        logger.warning("dialect %s has no %s `%s`: its options stay as they are", dialect_name, kind, part.name)
        return {}
    return dict(known[_plain(part.name)])


def _names(parts: Any) -> list[str]:
    """Names of the parts in a list, or in a mapping by name."""
    return [part if isinstance(part, str) else part["name"] for part in parts or ()]


def _plain(name: str) -> str:
    """The name of a first-party component without its plugin."""
    return name.removeprefix(OWN_PLUGIN)
