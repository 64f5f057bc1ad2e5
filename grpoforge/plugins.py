"""Finding plugins, registering what they bring, and remembering where everything came from.

A manager is built per call: nothing here is global. Installed plugins are independent of one another: one
that is broken is set aside with its reason. A file that the user names must load, or the error says why not.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from grpoforge import hookspecs
from grpoforge.errors import GrpoforgeError, PluginError, suggest
from grpoforge.registry import BrokenPlugin, Component, Kind, Registry, make_component
from grpoforge.signature import show_path

logger = logging.getLogger(__name__)

GROUP = "grpoforge"

REGISTER_HOOKS: Mapping[str, Kind] = {
    "register_rewards": "reward",
    "register_samplers": "sampler",
    "register_advantages": "advantage",
    "register_kl_estimators": "kl",
    "register_losses": "loss",
    "register_corrections": "correction",
    "register_trackers": "tracker",
    "register_datasets": "dataset",
}
HOOKS = (*REGISTER_HOOKS, "load_policy", "load_reader", "policy_size", "step_finished", "run_finished")

LOCAL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a plugin came from, for ``run.json``."""

    name: str
    version: str | None
    """Of the distribution; None for a local file."""
    source: str
    sha256: str | None
    """Of a local file, as it was loaded; None for an installed plugin."""
    hooks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginHost:
    """The loaded plugins of one run."""

    registry: Registry
    manager: pluggy.PluginManager
    _loaded: list[Provenance] = field(default_factory=list)

    @property
    def hook(self) -> pluggy.HookRelay:
        """Call a hook of all plugins: ``host.hook.load_policy(model=...)``."""
        return self.manager.hook

    @property
    def broken(self) -> tuple[BrokenPlugin, ...]:
        """Installed plugins that could not be loaded."""
        return self.registry.broken

    def provenance(self) -> list[dict[str, Any]]:
        """Name, version, source, sha256 (of local files) and hooks of each plugin, in loading order."""
        return [
            {
                "name": one.name,
                "version": one.version,
                "source": one.source,
                "sha256": one.sha256,
                "hooks": [*one.hooks],
            }
            for one in self._loaded
        ]

    def add_function(self, path: Path, function: str, kind: Kind = "reward") -> Component:
        """Register a plain function of a file (``--reward ./rewards.py:my_func``). See ``load_function``."""
        component = load_function(path, function, kind)
        source = show_path(path)
        for other in self._loaded:
            if other.name == component.plugin and other.source != source:
                raise _same_name(component.plugin, other.source, source)
        self.registry.add(component)
        if all(other.name != component.plugin for other in self._loaded):
            self._loaded.append(
                Provenance(name=component.plugin, version=None, source=source, sha256=_sha256(path), hooks=())
            )
        return component


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A plugin before it is loaded."""

    name: str
    version: str | None
    source: str
    path: Path | None
    """Of a local file; None for an installed plugin."""
    load: Callable[[], object]


def load_plugins(
    local: Sequence[Path] = (), *, entry_points: Iterable[importlib.metadata.EntryPoint] | None = None
) -> PluginHost:
    """A host with the installed plugins, by distribution name, then the ``local`` files, in the order given.

    Args:
        local: Python files, each a plugin named after the file.
        entry_points: instead of those that are installed.

    Raises:
        PluginError: a local file cannot be used, or two plugins have one name. A broken installed plugin
        raises
            nothing: it is logged and kept in ``PluginHost.broken``.
    """
    if entry_points is None:
        entry_points = importlib.metadata.entry_points(group=GROUP)
    candidates = [*_installed(entry_points), *(_local(path) for path in local)]
    seen: dict[str, str] = {}
    for candidate in candidates:
        if candidate.name in seen:
            raise _same_name(candidate.name, seen[candidate.name], candidate.source)
        seen[candidate.name] = candidate.source
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    host = PluginHost(registry=Registry(), manager=manager)
    for candidate in candidates:
        try:
            _admit(host, candidate)
        except PluginError as error:
            if candidate.path is not None:
                raise
            broken = BrokenPlugin(name=candidate.name, source=candidate.source, reason=error.message)
            host.registry.add_broken(broken)
            logger.warning("plugin `%s` is broken and left out: %s", broken.name, broken.reason)
            logger.debug("plugin `%s` in full", broken.name, exc_info=error)
    return host


def load_function(path: Path, function: str, kind: Kind = "reward") -> Component:
    """The function (or class) called ``function`` in the file ``path`` as a component; no hook is needed.

    Its plugin is named after the file. A reward may be ours or TRL's.

    Raises:
        PluginError: the file does not load, has no such function, or its signature cannot be used.
    """
    candidate = _local(path)
    module = _import_file(path)
    written = [
        name
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
    factory = getattr(module, function, None)
    if factory is None:
        raise PluginError(f"`{candidate.source}` has no function `{function}`", suggest(function, written))
    return make_component(kind, function, candidate.name, factory)


def reward_from_path(reference: str) -> Component:
    """The reward that ``./rewards.py:my_func`` names. See ``load_function``."""
    file, colon, function = reference.rpartition(":")
    if not colon or not function.isidentifier():
        raise PluginError(f"`{reference}` names no function in a file", "write it as `./rewards.py:my_func`")
    return load_function(Path(file), function)


def _installed(entry_points: Iterable[importlib.metadata.EntryPoint]) -> list[_Candidate]:
    """By distribution name; several entry points in one distribution are named ``distribution.entry``."""
    points = sorted(entry_points, key=lambda point: (_distribution(point), point.name))
    count = Counter(map(_distribution, points))
    return [
        _Candidate(
            name=_distribution(point) if count[_distribution(point)] == 1 else f"{_distribution(point)}.{point.name}",
            version=point.dist.version if point.dist else None,
            source=point.value,
            path=None,
            load=point.load,
        )
        for point in points
    ]


def _distribution(point: importlib.metadata.EntryPoint) -> str:
    return point.dist.name if point.dist else point.name


def _local(path: Path) -> _Candidate:
    """The file ``path`` as a candidate named after it."""
    path = Path(os.path.abspath(path))
    shown = show_path(path)
    if not path.is_file():
        neighbors = [neighbor.name for neighbor in path.parent.glob("*.py")]
        raise PluginError(
            f"the plugin file `{shown}` does not exist",
            f"its folder: {suggest(path.name, neighbors)}" if neighbors else "check the path",
        )
    if path.suffix != ".py" or not LOCAL_NAME.fullmatch(path.stem):
        raise PluginError(
            f"`{shown}` cannot be a plugin, which is named after its file",
            "name it `<plugin>.py`, with letters, digits, `.`, `_` and `-` only",
        )
    return _Candidate(name=path.stem, version=None, source=shown, path=path, load=lambda: _import_file(path))


def _import_file(path: Path) -> ModuleType:
    """The module in ``path``, under a name that no other module has; ``sys.path`` stays as it is."""
    name = f"grpoforge_local_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and string annotations look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise PluginError(
            f"cannot import the plugin `{show_path(path)}`: {_cause(error, str(path))}", _remedy(error)
        ) from error
    return module


def _admit(host: PluginHost, candidate: _Candidate) -> None:
    """Load one plugin and register all that it brings, or nothing of it."""
    plugin = _load(candidate)
    brought = Registry()
    try:
        hash(plugin)
        host.manager.register(plugin, candidate.name)
        _check_hooks(host.manager, plugin, candidate)
        others = [other for _, other in host.manager.list_name_plugin() if other is not plugin]
        for hook, kind in REGISTER_HOOKS.items():
            host.manager.subset_hook_caller(hook, others)(register=_registrar(brought, kind, candidate.name))
    except (Exception, SystemExit) as error:
        if host.manager.has_plugin(candidate.name):
            host.manager.unregister(plugin)
        if isinstance(error, GrpoforgeError):
            raise
        reason = _cause(error, str(candidate.path))
        raise PluginError(
            f"plugin `{candidate.name}` ({candidate.source}) failed to register: {reason}",
            "repair the plugin",
        ) from error
    for component in brought.list():
        host.registry.add(component)
    hooks = {caller.name for caller in host.manager.get_hookcallers(plugin) or ()}
    host._loaded.append(
        Provenance(
            name=candidate.name,
            version=candidate.version,
            source=candidate.source,
            sha256=_sha256(candidate.path) if candidate.path else None,
            hooks=tuple(hook for hook in HOOKS if hook in hooks),
        )
    )


def _load(candidate: _Candidate) -> Any:
    try:
        return candidate.load()
    except GrpoforgeError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(f"cannot import `{candidate.source}`: {_cause(error)}", _remedy(error)) from error


def _registrar(registry: Registry, kind: Kind, plugin: str) -> hookspecs.Register:
    """The ``register`` of one hook and one plugin."""

    def register(
        name: str, component: Callable[..., Any], *, weight: float | None = None, gate: str | None = None
    ) -> None:
        registry.add(make_component(kind, name, plugin, component, weight=weight, gate=gate))

    return register


def _check_hooks(manager: pluggy.PluginManager, plugin: object, candidate: _Candidate) -> None:
    """Refuse what would be silence: a misspelled hook, a forgotten ``@hookimpl``, no hook at all."""
    where = f"in plugin `{candidate.name}` ({candidate.source})"
    callers = manager.get_hookcallers(plugin) or []
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        for caller in callers:
            if not caller.has_spec():
                raise PluginError(f"unknown hook `{caller.name}` {where}", suggest(caller.name, HOOKS)) from error
        raise
    implemented = {caller.name for caller in callers}
    for hook in HOOKS:
        if hook not in implemented and inspect.isroutine(getattr(plugin, hook, None)):
            raise PluginError(f"`{hook}` {where} is not marked as a hook", "write `@hookimpl` above it")
    if not implemented:
        raise PluginError(
            f"no hook {where}",
            "mark one with `@hookimpl`; a plain reward function needs none: `--reward FILE.py:FUNCTION`",
        )


def _same_name(name: str, first: str, second: str) -> PluginError:
    return PluginError(
        f"two plugins have the name `{name}`: `{first}` and `{second}`",
        "leave one out, or rename the file of a local plugin",
    )


def _cause(error: BaseException, file: str | None = None) -> str:
    """``error`` in one line, with the line of ``file`` that raised it."""
    text = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"line {error.lineno}: {type(error).__name__}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"line {lines[-1]}: {text}" if lines else text


def _remedy(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"install `{error.name}` in this environment, or correct the import"
    return "a plugin file is ordinary Python: it must import without errors"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
