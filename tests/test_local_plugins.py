"""Plugins that are files the user names: they load, or the error says where and why not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpoforge.errors import PluginError
from grpoforge.plugins import PluginHost, load_plugins

FIXTURES = Path(__file__).with_name("fixtures") / "plugins"


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


def test_a_local_file_is_a_plugin_named_after_it() -> None:
    brevity = local("my_reward.py").registry.get("reward", "brevity")
    assert brevity.id == "my_reward:brevity"
    assert brevity.build({"max_chars": 1})(["a", "ab"]) == [1.0, 0.0]
    assert brevity.source.endswith("fixtures/plugins/my_reward.py:4")


def test_a_plugin_registers_every_kind() -> None:
    registry = local("every_kind.py").registry
    assert [(one.kind, one.name) for one in registry.list()] == [
        ("reward", "accuracy"),
        ("sampler", "paired"),
        ("advantage", "centered"),
        ("kl", "squared"),
        ("loss", "reinforce"),
        ("correction", "close"),
        ("tracker", "memory"),
        ("dataset", "two-rows"),
    ]
    accuracy = registry.get("reward", "accuracy")
    assert (accuracy.weight, accuracy.gate) == (0.5, "format")
    assert registry.get("tracker", "memory").build({"limit": 2}, "run").run == "run"
    assert registry.get("dataset", "two-rows").build({"seed": 3})("train")[0]["question"] == "train 3"
    assert registry.get("sampler", "paired").build({"temperatures": [1]}).temperatures == (1.0,)


def test_the_other_hooks_are_called_through_the_host() -> None:
    hook = local("every_kind.py", "my_reward.py").hook
    report: list[str] = []
    hook.step_finished(report=report)
    assert report == ["every_kind"]
    assert hook.load_policy(model="mine") == "policy of mine"
    assert hook.load_policy(model="theirs") is None


def test_a_file_may_have_the_name_of_a_module(here: Path) -> None:
    path = write(here / "random.py", (FIXTURES / "my_reward.py").read_text(encoding="utf-8"))
    before = list(sys.path)
    assert load_plugins([path], entry_points=[]).registry.get("reward", "random:brevity").name == "brevity"
    assert sys.path == before
    import random

    assert random.random() < 1.0


def test_hosts_share_nothing() -> None:
    first, second = local("my_reward.py"), local("every_kind.py")
    assert len(first.registry.list()) == 1
    assert not first.manager.has_plugin("every_kind")
    assert second.manager.has_plugin("every_kind")


def test_a_missing_file_is_named(here: Path) -> None:
    write(here / "my_reward.py", "")
    assert refusal(load_plugins, [Path("my_rewards.py")], entry_points=[]) == (
        "the plugin file `./my_rewards.py` does not exist",
        "its folder: did you mean `my_reward.py`?",
    )
    assert refusal(load_plugins, [Path("no/such.py")], entry_points=[]) == (
        "the plugin file `./no/such.py` does not exist",
        "check the path",
    )


@pytest.mark.parametrize("name", ["plugin.txt", "two words.py", ".hidden.py"])
def test_a_file_that_cannot_name_a_plugin_is_refused(here: Path, name: str) -> None:
    write(here / name, "")
    assert refusal(load_plugins, [Path(name)], entry_points=[]) == (
        f"`./{name}` cannot be a plugin, which is named after its file",
        "name it `<plugin>.py`, with letters, digits, `.`, `_` and `-` only",
    )


def test_a_file_that_does_not_import_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES)
    assert refusal(load_plugins, [Path("broken_import.py")], entry_points=[]) == (
        "cannot import the plugin `./broken_import.py`: line 3: "
        "ModuleNotFoundError: No module named 'no_such_module_anywhere'",
        "install `no_such_module_anywhere` in this environment, or correct the import",
    )
    assert "grpoforge_local_broken_import" not in sys.modules


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("x = 1\nx = x / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("\n\ndef reward(:\n", "line 3: SyntaxError: invalid syntax"),
        ("import sys\n\nsys.exit(3)\n", "line 3: SystemExit: 3"),
        ("raise ValueError('one\\ntwo')\n", "line 1: ValueError: one"),
        ("def f():\n    raise KeyError('a')\nf()\n", "line 2: KeyError: 'a'"),
    ],
)
def test_the_line_of_the_failure_is_named(here: Path, text: str, cause: str) -> None:
    write(here / "mine.py", text)
    assert refusal(load_plugins, [Path("mine.py")], entry_points=[]) == (
        f"cannot import the plugin `./mine.py`: {cause}",
        "a plugin file is ordinary Python: it must import without errors",
    )


def test_a_misspelled_hook_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES)
    assert refusal(load_plugins, [Path("misspelled.py")], entry_points=[]) == (
        "unknown hook `register_reward` in plugin `misspelled` (./misspelled.py)",
        "did you mean `register_rewards`?",
    )


def test_a_hook_without_its_mark_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES)
    assert refusal(load_plugins, [Path("unmarked.py")], entry_points=[]) == (
        "`register_rewards` in plugin `unmarked` (./unmarked.py) is not marked as a hook",
        "write `@hookimpl` above it",
    )


def test_a_plugin_without_a_hook_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES)
    assert refusal(load_plugins, [Path("no_hook.py")], entry_points=[]) == (
        "no hook in plugin `no_hook` (./no_hook.py)",
        "mark one with `@hookimpl`; a plain reward function needs none: `--reward FILE.py:FUNCTION`",
    )


def test_a_name_registered_twice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES)
    assert refusal(load_plugins, [Path("registers_twice.py")], entry_points=[]) == (
        "plugin `registers_twice` registers the reward `same` twice: ./registers_twice.py:4 and ./registers_twice.py:8",
        "rename one of them",
    )


HOOK_THAT = """\
from grpoforge import hookimpl


@hookimpl
def register_rewards({parameters}):
    {body}
"""


def test_a_hook_that_raises_names_plugin_and_line(here: Path) -> None:
    write(here / "mine.py", HOOK_THAT.format(parameters="register", body="register('x', undefined)"))
    assert refusal(load_plugins, [Path("mine.py")], entry_points=[]) == (
        "plugin `mine` (./mine.py) failed to register: line 6: NameError: name 'undefined' is not defined",
        "repair the plugin",
    )


def test_a_hook_with_other_parameters_is_an_error(here: Path) -> None:
    write(here / "mine.py", HOOK_THAT.format(parameters="registry", body="pass"))
    message, _ = refusal(load_plugins, [Path("mine.py")], entry_points=[])
    assert message.startswith("plugin `mine` (./mine.py) failed to register: PluginValidationError: Plugin 'mine'")


def test_weight_is_for_rewards_only(here: Path) -> None:
    text = HOOK_THAT.format(parameters="register", body="register('x', lambda a, b: a, weight=2)")
    write(here / "mine.py", text.replace("register_rewards", "register_kl_estimators"))
    assert refusal(load_plugins, [Path("mine.py")], entry_points=[]) == (
        "kl `mine:x` is registered with `weight=2`",
        "only rewards have a weight",
    )


def test_two_files_with_one_name_are_an_error(here: Path) -> None:
    for folder in ("a", "b"):
        write(
            here / folder / "mine.py",
            "raise AssertionError('names are compared before anything is imported')",
        )
    assert refusal(load_plugins, [Path("a/mine.py"), Path("b/mine.py")], entry_points=[]) == (
        "two plugins have the name `mine`: `./a/mine.py` and `./b/mine.py`",
        "leave one out, or rename the file of a local plugin",
    )
