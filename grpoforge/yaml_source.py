"""Configuration files: YAML read safely, ``--set`` overrides, and the recipes that come with the package."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from grpoforge.errors import ConfigError, suggest
from grpoforge.sanitize import sanitize

MAX_YAML_CHARS = 1_000_000
MAX_YAML_DEPTH = 20


class _SafeLoader(yaml.SafeLoader):
    """Safe YAML in which every key is text and stands once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key}` stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _SafeDumper(yaml.SafeDumper):
    """Writes what `_SafeLoader` reads back as the same values."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _read_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


# YAML 1.1 reads `1e-5` as text, 1:30 as ninety and 2024-01-01 as a date: none is what a user means.
_OTHERWISE = tuple(f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp", "merge", "value"))
_INT = re.compile(r"[-+]?[0-9]{1,4000}\Z")
_FLOAT = re.compile(r"(?:[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)\Z")

for _class in (_SafeLoader, _SafeDumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OTHERWISE]
        for first, resolvers in _class.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_SafeLoader.add_constructor("tag:yaml.org,2002:int", _read_int)


def dump_yaml(values: Any) -> str:
    """``values`` as YAML that `parse_yaml` reads back unchanged. Characters that act on a terminal are escaped."""
    text: str = yaml.dump(values, Dumper=_SafeDumper, sort_keys=False, allow_unicode=True, width=10**6)
    if sanitize(text) == text:
        return text
    text = yaml.dump(values, Dumper=_SafeDumper, sort_keys=False, allow_unicode=False, width=10**6)
    return text


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: not YAML, too large or too deep, an alias, a tag, a key that stands twice.
    """
    if len(text) > MAX_YAML_CHARS:
        raise ConfigError(f"{origin} has {len(text)} characters", f"a configuration has at most {MAX_YAML_CHARS}")
    try:
        _check_events(text, origin)
        return yaml.load(text, Loader=_SafeLoader)
    except yaml.reader.ReaderError as failure:
        line = text.count("\n", 0, failure.position) + 1
        raise ConfigError(
            f"{origin}:{line}: character U+{ord(text[failure.position]):04X} cannot stand in YAML", "remove it"
        ) from None
    except yaml.YAMLError as failure:
        mark = getattr(failure, "problem_mark", None)
        problem = getattr(failure, "problem", None) or str(failure)
        raise ConfigError(f"{origin}:{mark.line + 1 if mark else 1}: {problem}", "correct the YAML") from None


def _check_events(text: str, origin: str) -> None:
    """Refuse what a configuration has no use for: a few lines of aliases could grow to gigabytes."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        mark: Any = event.start_mark
        line, tag = mark.line + 1, getattr(event, "tag", None)
        if depth > MAX_YAML_DEPTH:
            raise ConfigError(f"{origin}:{line}: nested deeper than {MAX_YAML_DEPTH} levels", "flatten it")
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{origin}:{line}: aliases (`*{event.anchor}`) are not allowed", "write the value out")
        if tag is not None:
            raise ConfigError(f"{origin}:{line}: tags (`{tag}`) are not allowed", "leave the tag out")


def read_file(path: Path) -> dict[str, Any]:
    """The values of a configuration file.

    Raises:
        ConfigError: missing, not text, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}", _nearest_file(path)) from None
    except UnicodeDecodeError as failure:
        raise ConfigError(
            f"{path} is not text: {failure.reason} at byte {failure.start}", "give a YAML file in UTF-8"
        ) from None
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise ConfigError(f"cannot read {path}: {reason}", "give a YAML file that you may read") from None
    return as_mapping(parse_yaml(text, str(path)), str(path))


def _nearest_file(path: Path) -> str:
    neighbors = [file.name for file in path.parent.glob("*.y*ml")]
    return f"its folder: {suggest(path.name, neighbors)}" if neighbors else "check the path, or name a recipe"


def as_mapping(values: Any, origin: str) -> dict[str, Any]:
    """``values`` if they are a mapping; nothing at all is an empty one."""
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{origin} holds a {type(values).__name__}, not keys and values", "write lines such as `max_steps: 40`"
        )
    return values


def parse_override(text: str) -> dict[str, Any]:
    """``a.b=c`` from ``--set`` as nested values; the right side is YAML.

    Raises:
        ConfigError: no ``=``, or an empty part of the key.
    """
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"`--set {text}` is not KEY=VALUE", "write for instance `--set optim.learning_rate=1e-5`")
    if parts == ["recipe"]:
        raise ConfigError(f"`--set {text}` would come too late", f"name the recipe first: `grpoforge train {value}`")
    nested: Any = parse_yaml(value, f"--set {key}")
    for part in reversed(parts):
        nested = {part: nested}
    return dict(nested)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("grpoforge").joinpath("recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_text(name: str, origin: str = "") -> str:
    """The YAML text of recipe ``name``, its opening comment included.

    Raises:
        ConfigError: there is no such recipe; the message says that ``origin`` asked for it.
    """
    if name not in recipe_names():
        place = f" (from {origin})" if origin else ""
        hint = suggest(name, recipe_names())
        if Path(name).suffix or "/" in name:
            hint = f"a configuration file ends in .yaml; recipes are {', '.join(recipe_names())}"
        raise ConfigError(f"unknown recipe `{name}`{place}", hint)
    return resources.files("grpoforge").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")


def read_recipe(name: str, origin: str = "") -> dict[str, Any]:
    """The values of recipe ``name``, without those of the recipe it builds on.

    Raises:
        ConfigError: there is no such recipe; the message says that ``origin`` asked for it.
    """
    return as_mapping(parse_yaml(recipe_text(name, origin), f"recipe {name}"), f"recipe {name}")


def recipe_layers(name: str, origin: str = "") -> list[tuple[str, dict[str, Any]]]:
    """``(origin, values)`` of recipe ``name``: below it the recipe that its ``recipe`` key names, and so on.

    Raises:
        ConfigError: see `read_recipe`.
    """
    values = read_recipe(name, origin)
    below = values.pop("recipe", None)
    layers = recipe_layers(str(below), f"recipe {name}") if below else []
    return [*layers, (f"recipe {name}", {**values, "recipe": name})]
