"""Components: what plugins register, how options reach them, and how they are found by name."""

from __future__ import annotations

import functools
import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pydantic
import pydantic_core

from grpoforge.errors import ConfigError, PluginError, suggest
from grpoforge.signature import (
    DataParameter,
    OptionParameter,
    find_method,
    locate,
    option_parameters,
    read_signature,
    validate_options,
)

__all__ = [
    "KINDS",
    "BrokenPlugin",
    "Component",
    "DataParameter",
    "Kind",
    "OptionParameter",
    "Registry",
    "make_component",
]

Kind = Literal["reward", "sampler", "advantage", "kl", "loss", "correction", "tracker", "dataset"]
KINDS: tuple[Kind, ...] = typing.get_args(Kind)

CALLED_KINDS: tuple[Kind, ...] = ("reward", "advantage", "kl", "loss", "correction", "dataset")
"""Kinds that get their data with every call; a class of another kind gets its data when it is built."""

METHODS: Mapping[Kind, tuple[str, ...]] = {
    "sampler": ("sample", "greedy", "sync"),
    "tracker": ("step_finished", "evaluated", "close"),
}
"""Kinds with several methods: only a class will do."""

COMPONENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenPlugin:
    """An installed plugin that could not be loaded. It stops a run only if the run needs it."""

    name: str
    source: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Component:
    """A registered function or class, and what its signature says about it."""

    kind: Kind
    name: str
    plugin: str
    factory: Callable[..., Any]
    weight: float
    """Of a reward, when the run names none."""
    gate: str | None
    """Of a reward: the name of the reward that must reach 1 for this one to pay."""
    data: tuple[DataParameter, ...]
    accepts_any_data: bool
    """True for a TRL-style reward: ``**kwargs`` takes every dataset column."""
    options: type[pydantic.BaseModel]
    source: str
    """``file:line``."""
    doc: str
    """First line of the docstring."""
    full_doc: str

    @property
    def id(self) -> str:
        return f"{self.plugin}:{self.name}"

    @property
    def option_parameters(self) -> tuple[OptionParameter, ...]:
        """The options in the order of the signature."""
        return option_parameters(self.options)

    def validate(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options, given and default, as the component will receive them.

        Raises:
            ConfigError: an option is unknown, missing or of the wrong type.
        """
        known = [option.name for option in self.option_parameters]
        for name in options:
            if name not in known:
                takes = ", ".join(known) or "no options"
                raise ConfigError(
                    f"unknown option `{name}` of {self.kind} `{self.id}`; it takes: {takes}",
                    suggest(str(name), known) if known else "remove the option",
                )
        try:
            return validate_options(self.options, options)
        except pydantic.ValidationError as error:
            raise self._refusal(error) from None
        except pydantic_core.PydanticSerializationError as error:
            raise ConfigError(
                f"options of {self.kind} `{self.id}`: {error}", "options are what YAML can hold"
            ) from None

    def build(self, options: Mapping[str, Any], *data: Any) -> Any:
        """The component ready for use: a function with ``options`` bound, or an instance of a class.

        Args:
            options: as the user wrote them; those left out keep the default of the signature.
            data: what a class needs when it is built, positionally. A function gets its data when it is
            called.

        Raises:
            ConfigError: see ``validate``. A ``GrpoforgeError`` of the class's ``__init__`` passes through.
        """
        validated = self.validate(options)
        given = {name: validated[name] for name in options}
        if inspect.isclass(self.factory):
            return self.factory(*data, **given)
        assert not data, f"{self.kind} `{self.id}` is a function: it gets its data when it is called"
        return functools.partial(self.factory, **given) if given else self.factory

    def _refusal(self, error: pydantic.ValidationError) -> ConfigError:
        first = error.errors(include_url=False)[0]
        name, *path = first["loc"]
        option = next(option for option in self.option_parameters if option.name == name)
        hint = f"`{name}` is `{option.type}`" + (f": {option.help}" if option.help else "")
        if first["type"] == "missing" and not path:
            return ConfigError(f"option `{name}` of {self.kind} `{self.id}` is required", hint)
        place = f"{name}" + "".join(f"[{step}]" for step in path if isinstance(step, int))
        problem = first["msg"][:1].lower() + first["msg"][1:]
        return ConfigError(
            f"option `{place}` of {self.kind} `{self.id}`: {problem}, got `{_shorten(repr(first['input']))}`",
            hint,
        )


class Registry:
    """Every component of the loaded plugins, found by ``name`` or ``plugin:name``."""

    def __init__(self) -> None:
        self._components: dict[tuple[Kind, str, str], Component] = {}
        self._broken: list[BrokenPlugin] = []

    @property
    def broken(self) -> tuple[BrokenPlugin, ...]:
        return tuple(self._broken)

    def add(self, component: Component) -> None:
        """Add ``component``. Raises PluginError when its plugin has one of that kind and name already."""
        key = (component.kind, component.name, component.plugin)
        if key in self._components:
            raise PluginError(
                f"plugin `{component.plugin}` registers the {component.kind} `{component.name}` twice: "
                f"{self._components[key].source} and {component.source}",
                "rename one of them",
            )
        self._components[key] = component

    def add_broken(self, plugin: BrokenPlugin) -> None:
        """Remember a plugin that did not load: it may explain a name that is missing."""
        self._broken.append(plugin)

    def get(self, kind: Kind, name: str) -> Component:
        """The component called ``name``, bare or ``plugin:name``.

        Raises:
            PluginError: nobody registers the name, or several plugins do.
        """
        found = self.named(name, kind)
        if not found:
            raise self._unknown(kind, name)
        if len(found) > 1:
            raise _ambiguous(kind, name, found)
        return found[0]

    def named(self, name: str, kind: Kind | None = None) -> tuple[Component, ...]:
        """Every component that ``name``, bare or ``plugin:name``, may mean."""
        return tuple(component for component in self.list(kind) if name in (component.name, component.id))

    def list(self, kind: Kind | None = None) -> tuple[Component, ...]:
        """All components, or those of ``kind``: by kind, then name, then plugin."""
        chosen = [component for component in self._components.values() if kind in (None, component.kind)]
        return tuple(sorted(chosen, key=lambda one: (KINDS.index(one.kind), one.name, one.plugin)))

    def hint_unknown(self, name: str, kind: Kind | None = None) -> str:
        """What to do about an unknown ``name``: the nearest one, and the broken plugins it may be in."""
        plugin, qualified, _ = name.rpartition(":")
        hint = suggest(name, (one.id if qualified else one.name for one in self.list(kind)))
        for broken in self._broken:
            if not qualified or broken.name == plugin:
                hint += f"; or repair the plugin `{broken.name}`, which is broken: {broken.reason}"
        return hint

    def _unknown(self, kind: Kind, name: str) -> PluginError:
        return PluginError(f"unknown {kind} `{name}`", self.hint_unknown(name, kind))


def make_component(
    kind: Kind,
    name: str,
    plugin: str,
    factory: Callable[..., Any],
    *,
    weight: float | None = None,
    gate: str | None = None,
) -> Component:
    """``factory`` as a component of ``plugin``: data and options are read from its signature.

    Raises:
        PluginError: the name, the weight, the gate or the signature cannot be used.
    """
    label = f"{kind} `{plugin}:{name}`"
    _check_name(kind, name, plugin)
    _check_factory(label, kind, factory)
    _check_pay(label, kind, weight, gate)
    signature = read_signature(factory, label, called=kind in CALLED_KINDS, any_data=kind == "reward")
    full_doc = inspect.cleandoc(factory.__doc__ or "")
    return Component(
        kind=kind,
        name=name,
        plugin=plugin,
        factory=factory,
        weight=1.0 if weight is None else float(weight),
        gate=gate,
        data=signature.data,
        accepts_any_data=signature.accepts_any_data,
        options=signature.options,
        source=locate(factory),
        doc=full_doc.partition("\n")[0],
        full_doc=full_doc,
    )


def _check_name(kind: Kind, name: str, plugin: str) -> None:
    # A colon would be read as `plugin:name`, a leading digit as the weight in `--reward name:0.5`.
    if not isinstance(name, str) or not COMPONENT_NAME.fullmatch(name):
        raise PluginError(
            f"plugin `{plugin}` registers a {kind} under the name {_shorten(repr(name))}",
            "a name is letters, digits, `.`, `_` and `-`, at most 64, a letter or `_` first",
        )


def _check_factory(label: str, kind: Kind, factory: Callable[..., Any]) -> None:
    is_function = inspect.isfunction(factory) or inspect.ismethod(factory)
    if not is_function and not inspect.isclass(factory):
        raise PluginError(
            f"{label} is a `{type(factory).__name__}`, not a function or a class",
            "register the function itself, or a class whose `__init__` takes the options",
        )
    methods = METHODS.get(kind, ())
    if methods and is_function:
        raise PluginError(
            f"{label} is a function, and a {kind} has several methods: {', '.join(methods)}",
            f"register a class; `grpoforge.types.{kind.capitalize()}` says what it must have",
        )
    if inspect.isclass(factory):
        for method in methods or (("__call__",) if kind in CALLED_KINDS else ()):
            if find_method(factory, method) is None:
                raise PluginError(f"{label} has no method `{method}`", f"a {kind} needs it")


def _check_pay(label: str, kind: Kind, weight: float | None, gate: str | None) -> None:
    """Refuse ``weight`` and ``gate`` that mean nothing."""
    for option, value in {"weight": weight, "gate": gate}.items():
        if value is not None and kind != "reward":
            raise PluginError(f"{label} is registered with `{option}={value!r}`", f"only rewards have a {option}")
    numeric = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
    if weight is not None and not numeric:
        raise PluginError(f"{label} is registered with `weight={weight!r}`", "a weight is a finite number")
    if gate is not None and (not isinstance(gate, str) or not gate):
        raise PluginError(f"{label} is registered with `gate={gate!r}`", "a gate is the name of another reward")


def _ambiguous(kind: Kind, name: str, found: tuple[Component, ...]) -> PluginError:
    number = {2: "two", 3: "three", 4: "four"}.get(len(found), str(len(found)))
    width = max(len(component.id) for component in found) + 8
    rows = "\n".join(f"  {component.id:<{width}}{component.source}" for component in found)
    return PluginError(
        f"{number} plugins register the {kind} `{name}`:\n{rows}",
        f"write one of them in full, e.g., `{found[0].id}`",
    )


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"
