"""Recipe < file < ``--set`` < dedicated flags: layers of plain values become one `grpoforge.config.Config`.

Unknown keys are refused with the nearest known one, and every error says which layer the value came from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from grpoforge.config import Config, Origins, Part, check_batch, check_samples
from grpoforge.errors import ConfigError, suggest

SEE_DEFAULTS = "see `grpoforge recipes show tiny-math --json` for every key"

KEPT_ON_RENAME: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("kl",): ("beta", "placement", "target", "horizon"),
    ("sampler",): ("max_completion_length",),
    ("model",): ("precision", "gradient_checkpointing", "lora"),
}
"""Keys that stay when another component takes the place of one: how long a completion may be is the task's to say, and
how a model is held and trained the machine's."""


def build(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> Config:
    """Merge ``(origin, values)`` layers, later ones winning, and validate the result.

    Raises:
        ConfigError: an unknown key (nearest suggested), a wrong type, or numbers that cannot work together.
    """
    merged, places = merge(layers)
    origins = Origins(places)
    try:
        config = Config.model_validate(merged).with_origins(origins)
    except ValidationError as failure:
        raise _explain(failure, merged, origins) from None
    check_batch(config)
    check_samples(config)
    return config


def merge(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """``(origin, values)`` layers as one mapping, later ones winning, not validated; and where each key came from.

    Raises:
        ConfigError: a layer changes a part that is not there.
    """
    # The default lists of parts lie below everything, so that `trackers.console.x` has something to change.
    merged: Any = Config().model_dump(include={"rewards", "trackers"})
    places: dict[tuple[str, ...], str] = {}
    for origin, given in layers:
        values = _in_full(given, merged)
        merged = _merge(merged, values, (), origin)
        for path in _leaves(values):
            places[path] = origin
            if len(path) > 1 and path[0] == "corrections":
                # `corrections.tis.cap=2` chooses `tis`, if nothing did before.
                places.setdefault((*path[:2], "name"), origin)
    return merged, places


def _in_full(values: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with the parts of files under their full names: `score` may stand for ``./rewards.py:score``."""
    return {
        key: {_full_name(name, below[key], value): options for name, options in value.items()}
        if isinstance(value, Mapping) and _is_parts(below.get(key))
        else value
        for key, value in values.items()
    }


def _full_name(name: str, parts: list[Any], taken: Mapping[str, Any]) -> str:
    """The one part of a file whose function is ``name``; ``name`` itself when it is a part or means several."""
    known = [part["name"] for part in parts]
    meant = [full for full in known if full.endswith(f".py:{name}") and full not in taken]
    return meant[0] if len(meant) == 1 and name not in known else name


def _merge(below: Any, above: Any, path: tuple[str, ...], origin: str) -> Any:
    """``above`` over ``below``: mappings merge, lists of named parts merge by name, everything else replaces.

    A component chosen by another name starts afresh: the options of the old one would not fit it.
    """
    if _is_parts(below) and (_is_parts(above) or isinstance(above, Mapping)):
        return _merge_parts(below, above, path, origin)
    if not isinstance(above, Mapping):
        return above
    if not isinstance(below, Mapping):
        below = {}
    elif _other_name(below, above):
        below = {key: below[key] for key in KEPT_ON_RENAME.get(path, ()) if key in below}
    elif "options" in below and above.get("dataset", below.get("dataset")) != below.get("dataset"):
        below = {key: value for key, value in below.items() if key != "options"}
    return {**below, **{key: _merge(below.get(key), value, (*path, key), origin) for key, value in above.items()}}


def _merge_parts(
    below: list[Any], above: list[Any] | Mapping[str, Any], path: tuple[str, ...], origin: str
) -> list[Any]:
    """A list chooses the parts and keeps what was said about the chosen; a mapping changes parts by name."""
    known = {part["name"]: part for part in below}
    if isinstance(above, list):
        return [_merge(known.get(part["name"], {}), part, (*path, part["name"]), origin) for part in above]
    for name, value in above.items():
        where = ".".join((*path, name))
        if name not in known:
            raise ConfigError(
                f"`{where}` (from {origin}) changes `{name}`, which is not among the {path[-1]}: {', '.join(known)}",
                suggest(name, known),
            )
        if not isinstance(value, Mapping):
            raise ConfigError(f"`{where}` is {_show(value)} (from {origin})", f"name a key, e.g., `{where}.weight`")
        if "name" in value:
            raise ConfigError(
                f"`{where}.name` (from {origin}) would put another component in its place", f"set the list `{path[-1]}`"
            )
    return [_merge(part, above.get(part["name"], {}), (*path, part["name"]), origin) for part in below]


def _is_parts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, Mapping) and isinstance(part.get("name"), str) for part in value)
    )


def _other_name(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "name" in old and "name" in new and old["name"] != new["name"]


def _leaves(values: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[str, ...]]:
    """Every key that ``values`` sets, the parts of a list under their names."""
    if _is_parts(values):
        yield path
        values = {part["name"]: part for part in values}
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield path


def _explain(failure: ValidationError, merged: Any, origins: Origins) -> ConfigError:
    """The first validation error as one line that names the key, the value and where it came from."""
    error = failure.errors()[0]
    path, model = _locate(error["loc"], merged)
    key, place = ".".join(path), origins.of(*path) or _first_below(path, origins)
    if error["type"] == "extra_forbidden":
        known = list(model.model_fields) if model else []
        return ConfigError(f"unknown key `{key}`{place}", suggest(path[-1], known) if known else SEE_DEFAULTS)
    if error["type"] == "value_error" and not path:
        return ConfigError(f"{error['ctx']['error']}{origins.of('rewards')}", "name one with `--reward NAME`")
    if error["type"] == "missing":
        return ConfigError(f"`{key}` is missing{place}", _describe(model, path[-1]))
    shown = f"`{key}` is {_show(error['input'])}{place}"
    if error["type"] in ("model_type", "dict_type"):
        if isinstance(error["input"], str) and path[-1].isdigit():
            return ConfigError(f"{shown}: it holds keys and values", f"write `{{name: {error['input']}}}`")
        example = "name" if issubclass(_section_at(path) or Config, Part) else "KEY"
        return ConfigError(f"{shown}: it holds keys and values", f"set one of its keys, e.g., `{key}.{example}`")
    if error["type"] == "value_error":
        return ConfigError(f"{shown}: {error['ctx']['error']}", _describe(model, path[-1]))
    problem = error["msg"].replace("Input should be", "it must be")
    return ConfigError(f"{shown}: {problem}", _describe(model, path[-1]))


def _first_below(path: tuple[str, ...], origins: Origins) -> str:
    """Where a section that no layer set as a whole came from: the layer that set the first key in it."""
    return next((origins.of(*key) for key in origins.by_key if key[: len(path)] == path), "")


def _section_at(path: tuple[str, ...]) -> type[BaseModel] | None:
    """The section that stands at ``path``, if one does."""
    model: type[BaseModel] | None = Config
    for step in path:
        found = model.model_fields.get(step) if model else None
        model = _section_of(found.annotation) if found else None
    return model


def _locate(loc: tuple[int | str, ...], merged: Any) -> tuple[tuple[str, ...], type[BaseModel] | None]:
    """The key that pydantic's ``loc`` means, parts by their names, and the section that the key belongs to.

    What pydantic adds to tell the members of a union apart is left out.
    """
    path: list[str] = []
    value = merged
    model: type[BaseModel] | None = Config
    owner: type[BaseModel] | None = None
    for step in loc:
        if isinstance(value, list) and isinstance(step, int):
            value = value[step]
            named = isinstance(value, Mapping) and isinstance(value.get("name"), str)
            path.append(value["name"] if named else str(step))
        elif isinstance(value, Mapping) and (step in value or step in getattr(model, "model_fields", {})):
            owner = model
            found = model.model_fields.get(str(step)) if model else None
            model = _section_of(found.annotation) if found else None
            value = value.get(step)
            path.append(str(step))
    return tuple(path), owner


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The model class inside an annotation such as ``LoRAConfig | None`` or ``list[Part]``."""
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _describe(model: type[BaseModel] | None, name: str) -> str:
    """What the key is for, as its documentation says."""
    found = model.model_fields.get(name) if model else None
    text = " ".join((found.description or "").replace("``", "`").split()) if found else ""
    return f"`{name}`: {text}" if text else SEE_DEFAULTS


def _show(value: Any) -> str:
    """A value as YAML would show it, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return f"`{text}`" if len(text) <= 60 else f"`{text[:59]}…`"
