"""`grpoforge plugins`: what is listed, what is shown, what is refused."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from grpoforge.cli.plugins_command import app, reflow
from grpoforge.errors import GrpoforgeError

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).with_name("fixtures") / "plugins"
EVERY_KIND = ("--plugin", "every_kind.py")


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the fixtures are plugins, whatever is installed."""
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    monkeypatch.chdir(FIXTURES)


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.exception
    return result


def refusal(*arguments: str) -> tuple[str, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, GrpoforgeError)
    assert result.stdout == ""
    return result.exception.message, result.exception.hint


def lines(*arguments: str) -> list[str]:
    return [line.rstrip() for line in run(*arguments).stdout.splitlines()]


def install_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Any:
        raise ModuleNotFoundError("No module named 'zeal [red]'", name="zeal")

    dist = SimpleNamespace(name="grpoforge-zeal", version="1.0")
    point = SimpleNamespace(name="zeal", value="grpoforge_zeal", dist=dist, load=load)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: (point,))


def test_the_list_is_one_line_per_component() -> None:
    assert lines("list", "--plugin", "my_reward.py", "--kind", "reward") == [
        "kind    name     what it does                                          plugin",
        "reward  brevity  1.0 when a completion fits in `max_chars`, else 0.0.  my_reward",
    ]


def test_plugins_alone_lists() -> None:
    assert lines("--plugin", "my_reward.py") == lines("list", "--plugin", "my_reward.py")
    assert lines() == ["kind  name  what it does  plugin"]


def test_the_list_shows_every_kind_in_order() -> None:
    kinds = [line.split()[0] for line in lines(*EVERY_KIND)[1:]]
    assert kinds == ["reward", "sampler", "advantage", "kl", "loss", "correction", "tracker", "dataset"]


def test_a_docstring_is_shown_as_paragraphs() -> None:
    doc = """First ``line``.

    A paragraph that
    goes on.

    - one item
      that goes on
    - another

    Args:
        name: indented text
            stays.
    """
    assert reflow(inspect.cleandoc(doc)).splitlines() == [
        *("First `line`.", "", "A paragraph that goes on.", ""),
        *("- one item that goes on", "- another", ""),
        *("Args:", "    name: indented text", "        stays."),
    ]


def test_plugin_files_may_be_given_more_than_once() -> None:
    names = [line.split()[1] for line in lines("--kind", "reward", *EVERY_KIND, "--plugin", "my_reward.py")]
    assert names == ["name", "accuracy", "brevity"]


def test_broken_plugins_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    install_broken(monkeypatch)
    assert lines("--plugin", "my_reward.py")[2:] == [
        "",
        "broken plugin   source          reason",
        "grpoforge-zeal  grpoforge_zeal  cannot import `grpoforge_zeal`: "
        "ModuleNotFoundError: No module named 'zeal [red]'",
    ]


def test_the_list_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    install_broken(monkeypatch)
    document = json.loads(run("--json", "--kind", "reward", "--plugin", "my_reward.py").stdout)
    assert document == {
        "components": [
            {
                "kind": "reward",
                "id": "my_reward:brevity",
                "name": "brevity",
                "plugin": "my_reward",
                "source": "./my_reward.py:4",
                "weight": 1.0,
                "gate": None,
                "data": [{"name": "completions", "required": True}],
                "accepts_any_data": False,
                "options": [{"name": "max_chars", "type": "int", "required": False, "default": 200, "help": ""}],
                "doc": "1.0 when a completion fits in `max_chars`, else 0.0.",
            }
        ],
        "broken": [
            {
                "name": "grpoforge-zeal",
                "source": "grpoforge_zeal",
                "reason": "cannot import `grpoforge_zeal`: ModuleNotFoundError: No module named 'zeal [red]'",
            }
        ],
    }


def test_show_tells_everything_about_a_reward() -> None:
    assert lines("show", "accuracy", *EVERY_KIND) == [
        "id      every_kind:accuracy",
        "kind    reward",
        "source  ./every_kind.py:15",
        "weight  0.5",
        "gate    format",
        "data    completions, answer, prompts?",
        "",
        "It takes no options.",
        "",
        "1.0 when the completion is the answer.",
        "",
        "Longer text with [red]markup[/red].",
    ]


def test_show_tells_types_defaults_and_help() -> None:
    assert lines("show", "every_kind:paired", *EVERY_KIND) == [
        "id      every_kind:paired",
        "kind    sampler",
        "source  ./every_kind.py:23",
        "data    none",
        "",
        "option        type               default     help",
        "temperatures  tuple[float, ...]  (0.7, 1.3)  one per half",
    ]
    assert "limit   int   required  steps kept" in lines("show", "memory", *EVERY_KIND)


def test_show_as_json() -> None:
    document = json.loads(run("show", "paired", "--json", *EVERY_KIND).stdout)
    assert (document["id"], document["weight"]) == ("every_kind:paired", None)
    assert document["options"][0]["default"] == [0.7, 1.3]


def test_nothing_is_colored_in_a_pipe() -> None:
    assert "\x1b" not in run(*EVERY_KIND).stdout + run("show", "memory", *EVERY_KIND).stdout


def test_an_unknown_component_gets_a_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("show", "acuracy", *EVERY_KIND) == (
        "unknown component `acuracy`",
        "did you mean `accuracy`?",
    )
    assert refusal("show", "accuracy", "--kind", "kl", *EVERY_KIND) == (
        "unknown kl `accuracy`",
        "known: squared",
    )
    install_broken(monkeypatch)
    assert refusal("show", "zeal")[1].startswith("none is known; or repair the plugin `grpoforge-zeal`")


def test_an_unknown_kind_gets_a_suggestion() -> None:
    assert refusal("--kind", "rewards") == ("unknown kind `rewards`", "did you mean `reward`?")


def test_a_name_of_two_kinds_needs_the_kind(tmp_path: Path) -> None:
    path = tmp_path / "double.py"
    text = (FIXTURES / "every_kind.py").read_text(encoding="utf-8")
    path.write_text(text.replace('"squared"', '"same"').replace('"reinforce"', '"same"'), encoding="utf-8")
    for name in ("same", "double:same"):
        assert refusal("show", name, "--plugin", str(path)) == (
            f"`{name}` is the name of components of several kinds: kl, loss",
            "add `--kind kl`",
        )
    assert lines("show", "same", "--kind", "loss", "--plugin", str(path))[1] == "kind    loss"


def test_a_name_of_two_plugins_is_shown_in_full(tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    path.write_text((FIXTURES / "my_reward.py").read_text(encoding="utf-8"), encoding="utf-8")
    message, hint = refusal("show", "brevity", "--plugin", "my_reward.py", "--plugin", str(path))
    assert message.startswith("two plugins register the reward `brevity`:\n  my_reward:brevity        ./my_")
    assert hint == "write one of them in full, e.g., `my_reward:brevity`"


def test_a_broken_file_stops_the_command() -> None:
    assert refusal("--plugin", "misspelled.py")[1] == "did you mean `register_rewards`?"


def test_help_and_import_are_light() -> None:
    code = "import sys, grpoforge.cli.plugins_command; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
    assert "Show the components that plugins bring." in run("--help").stdout
