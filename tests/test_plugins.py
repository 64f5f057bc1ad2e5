"""Discovery, registration, isolation and provenance of plugins."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pluggy
import pytest

import grpoforge
from grpoforge import hookimpl, hookspecs
from grpoforge.errors import PluginError
from grpoforge.plugins import HOOKS, REGISTER_HOOKS, PluginHost, load_function, load_plugins, reward_from_path
from grpoforge.registry import KINDS

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).with_name("fixtures") / "plugins"
EXAMPLE = ROOT / "examples" / "plugins" / "grpoforge-politeness"
GUIDE = ROOT / "docs" / "guides" / "write-a-plugin.md"


@dataclass(frozen=True)
class FakeEntryPoint:
    """What the loader uses of importlib.metadata.EntryPoint."""

    name: str
    value: str
    dist: Any
    load: Callable[[], Any]


def entry_point(plugin: Any, distribution: str, name: str = "main", version: str = "1.0") -> Any:
    """An installed plugin: ``plugin`` itself, or an exception that its import raises."""

    def load() -> Any:
        if isinstance(plugin, BaseException):
            raise plugin
        return plugin

    dist = SimpleNamespace(name=distribution, version=version)
    return FakeEntryPoint(name=name, value=f"{distribution}_module", dist=dist, load=load)


def reward_plugin(*names: str) -> ModuleType:
    """A module that registers a reward under each of ``names``."""
    module = ModuleType("made")

    def register_rewards(register: Any) -> None:
        for name in names:
            register(name, zero)

    module.register_rewards = hookimpl(register_rewards)  # type: ignore[attr-defined]
    return module


def zero(completions: list[str]) -> list[float]:
    """Nothing for anybody."""
    return [0.0 for _ in completions]


def local(*names: str) -> PluginHost:
    return load_plugins([FIXTURES / name for name in names], entry_points=[])


def refusal(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[str, str]:
    with pytest.raises(PluginError) as raised:
        function(*arguments, **options)
    return raised.value.message, raised.value.hint


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_package_exports_the_marker_and_the_version() -> None:
    assert grpoforge.__all__ == ["__version__", "hookimpl"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", grpoforge.__version__)


def test_finding_plugins_does_not_import_torch() -> None:
    code = (
        "import sys, grpoforge.plugins; grpoforge.plugins.load_plugins(entry_points=[]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_every_hook_is_listed_and_documented() -> None:
    manager = pluggy.PluginManager("grpoforge")
    manager.add_hookspecs(hookspecs)
    specified = {name for name in vars(manager.hook) if not name.startswith("_")}
    assert specified == set(HOOKS)
    assert all(getattr(hookspecs, hook).__doc__ for hook in HOOKS)
    assert tuple(REGISTER_HOOKS.values()) == KINDS


def test_installed_plugins_come_by_distribution_name() -> None:
    points = [entry_point(reward_plugin("x"), "zebra"), entry_point(reward_plugin("x"), "aardvark")]
    host = load_plugins(entry_points=points)
    assert [one["name"] for one in host.provenance()] == ["aardvark", "zebra"]
    assert [one.id for one in host.registry.list()] == ["aardvark:x", "zebra:x"]
    assert refusal(host.registry.get, "reward", "x")[1] == "write one of them in full, e.g., `aardvark:x`"


def test_two_entry_points_of_a_distribution_are_two_plugins() -> None:
    points = [entry_point(reward_plugin(name), "pair", name) for name in ("one", "two")]
    ids = [component.id for component in load_plugins(entry_points=points).registry.list()]
    assert ids == ["pair.one:one", "pair.two:two"]


def test_an_object_may_be_a_plugin() -> None:
    class Plugin:
        def reward(self, completions: list[str], *, value: float = 0.0) -> list[float]:
            return [value for _ in completions]

        @hookimpl
        def register_rewards(self, register: Any) -> None:
            register("same", self.reward)

    reward = load_plugins(entry_points=[entry_point(Plugin(), "objects")]).registry.get("reward", "same")
    assert [one.name for one in reward.data] == ["completions"]
    assert reward.build({"value": 2})(["a"]) == [2.0]


def test_a_hook_under_another_name_registers_once() -> None:
    class Plugin:
        @hookimpl(specname="register_rewards")
        def add(self, register: Any) -> None:
            register("same", zero)

    points = [entry_point(Plugin(), "a"), entry_point(reward_plugin("other"), "b")]
    assert [one.id for one in load_plugins(entry_points=points).registry.list()] == ["b:other", "a:same"]


def test_an_installed_distribution_is_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(here / "grpoforge_installed_here.py", (FIXTURES / "my_reward.py").read_text(encoding="utf-8"))
    information = here / "grpoforge_installed_here-2.5.dist-info"
    write(information / "METADATA", "Metadata-Version: 2.1\nName: grpoforge-installed-here\nVersion: 2.5\n")
    write(information / "entry_points.txt", "[grpoforge]\nany = grpoforge_installed_here\n")
    monkeypatch.syspath_prepend(str(here))
    installed = importlib.metadata.entry_points

    def only_this(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return [point for point in installed(group=group) if point.value == "grpoforge_installed_here"]

    monkeypatch.setattr(importlib.metadata, "entry_points", only_this)
    host = load_plugins()
    assert host.registry.get("reward", "brevity").id == "grpoforge-installed-here:brevity"
    assert host.provenance() == [
        {
            "name": "grpoforge-installed-here",
            "version": "2.5",
            "source": "grpoforge_installed_here",
            "sha256": None,
            "hooks": ["register_rewards"],
        }
    ]


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (
            ModuleNotFoundError("No module named 'zeal'", name="zeal"),
            "cannot import `bad_module`: ModuleNotFoundError: No module named 'zeal'",
        ),
        (SystemExit(1), "cannot import `bad_module`: SystemExit: 1"),
        (ModuleType("empty"), "no hook in plugin `bad` (bad_module)"),
        (reward_plugin("fine", "twice", "twice"), "plugin `bad` registers the reward `twice` twice: "),
        (reward_plugin("not a name"), "plugin `bad` registers a reward under the name 'not a name'"),
    ],
)
def test_a_broken_installed_plugin_is_set_aside(plugin: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    points = [entry_point(plugin, "bad"), entry_point(reward_plugin("good"), "fine")]
    with caplog.at_level(logging.WARNING):
        host = load_plugins(entry_points=points)
    assert [one.id for one in host.registry.list()] == ["fine:good"]
    assert [(one.name, one.source) for one in host.broken] == [("bad", "bad_module")]
    assert host.broken[0].reason.startswith(reason)
    assert caplog.messages == [f"plugin `bad` is broken and left out: {host.broken[0].reason}"]
    assert not host.manager.has_plugin("bad")
    assert [one["name"] for one in host.provenance()] == ["fine"]
    assert "or repair the plugin `bad`, which is broken: " in refusal(host.registry.get, "reward", "lost")[1]


def test_an_installed_plugin_with_a_misspelled_hook_is_broken_alone() -> None:
    misspelled = ModuleType("misspelled")
    misspelled.register_reward = hookimpl(lambda register: None)  # type: ignore[attr-defined]
    points = [entry_point(misspelled, "bad"), entry_point(reward_plugin("good"), "fine")]
    host = load_plugins(entry_points=points)
    assert host.broken[0].reason == "unknown hook `register_reward` in plugin `bad` (bad_module)"
    assert host.registry.get("reward", "good").plugin == "fine"


def test_a_broken_plugin_leaves_no_hook_behind() -> None:
    half = reward_plugin("not a name")
    half.step_finished = hookimpl(lambda report: report.append("half"))  # type: ignore[attr-defined]
    host = load_plugins(entry_points=[entry_point(half, "half")])
    report: list[str] = []
    host.hook.step_finished(report=report)
    assert report == []


def test_an_unhashable_plugin_is_the_one_that_is_broken() -> None:
    class Plugin:
        __hash__ = None  # type: ignore[assignment]

        @hookimpl
        def register_rewards(self, register: Any) -> None:
            register("same", zero)

    points = [entry_point(Plugin(), "a"), entry_point(reward_plugin("good"), "b")]
    host = load_plugins(entry_points=points)
    assert [one.name for one in host.broken] == ["a"]
    assert host.broken[0].reason.endswith("failed to register: TypeError: unhashable type: 'Plugin'")
    assert [one.id for one in host.registry.list()] == ["b:good"]


def test_one_module_under_two_names_is_broken_once() -> None:
    module = reward_plugin("good")
    host = load_plugins(entry_points=[entry_point(module, "a"), entry_point(module, "b")])
    assert [one.id for one in host.registry.list()] == ["a:good"]
    assert [one.name for one in host.broken] == ["b"]


def test_an_installed_and_a_local_plugin_with_one_name_are_an_error() -> None:
    message, _ = refusal(
        load_plugins, [FIXTURES / "my_reward.py"], entry_points=[entry_point(reward_plugin("x"), "my_reward")]
    )
    assert message.startswith("two plugins have the name `my_reward`: `my_reward_module` and `")


def test_provenance_tells_where_everything_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES)
    point = entry_point(reward_plugin("x"), "installed", version="0.3")
    host = load_plugins([Path("every_kind.py")], entry_points=[point])
    assert host.provenance() == [
        {
            "name": "installed",
            "version": "0.3",
            "source": "installed_module",
            "sha256": None,
            "hooks": ["register_rewards"],
        },
        {
            "name": "every_kind",
            "version": None,
            "source": "./every_kind.py",
            "sha256": hashlib.sha256(Path("every_kind.py").read_bytes()).hexdigest(),
            "hooks": [*REGISTER_HOOKS, "load_policy", "step_finished"],
        },
    ]


def test_a_plain_function_is_a_reward() -> None:
    length = load_function(FIXTURES / "rewards_only.py", "length")
    assert length.id == "rewards_only:length"
    assert length.build({"scale": 2})(["abc"]) == [6.0]
    assert load_function(FIXTURES / "rewards_only.py", "trl_style").accepts_any_data


def test_a_reference_names_a_file_and_a_function() -> None:
    assert reward_from_path(f"{FIXTURES / 'rewards_only.py'}:length").name == "length"
    for reference in ("./rewards.py", "./rewards.py:", "./rewards.py:0.5", "./rewards.py:two words"):
        assert refusal(reward_from_path, reference) == (
            f"`{reference}` names no function in a file",
            "write it as `./rewards.py:my_func`",
        )


def test_a_missing_function_is_named_with_a_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES)
    assert refusal(load_function, Path("rewards_only.py"), "lenght") == (
        "`./rewards_only.py` has no function `lenght`",
        "did you mean `length`?",
    )
    assert refusal(load_function, Path("rewards_only.py"), "zzz")[1] == "known: length, trl_style"
    assert refusal(load_function, Path("rewards_onl.py"), "length")[0].endswith("does not exist")


def test_a_plain_function_joins_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES)
    host = local("my_reward.py")
    host.add_function(Path("rewards_only.py"), "length")
    host.add_function(Path("rewards_only.py"), "trl_style")
    assert host.registry.get("reward", "length").id == "rewards_only:length"
    assert [one["name"] for one in host.provenance()] == ["my_reward", "rewards_only"]
    assert host.provenance()[1] == {
        "name": "rewards_only",
        "version": None,
        "source": "./rewards_only.py",
        "sha256": hashlib.sha256(Path("rewards_only.py").read_bytes()).hexdigest(),
        "hooks": [],
    }


def test_a_plain_function_of_a_file_named_like_a_plugin_is_refused(here: Path) -> None:
    write(here / "my_reward.py", "def length(completions):\n    return [0.0]\n")
    message, _ = refusal(local("my_reward.py").add_function, Path("my_reward.py"), "length")
    assert message.startswith("two plugins have the name `my_reward`: ")
    assert message.endswith(" and `./my_reward.py`")
