"""``grpoforge recipes`` and the bare program."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from grpoforge import __version__
from grpoforge.config import Config
from grpoforge.yaml_source import recipe_names, recipe_text

TASKS = ["gsm8k-qwen2.5-0.5b", "gsm8k-qwen2.5-3b", "gsm8k-smoke", "tiny-math"]
IN_ORDER = [*TASKS, *(name for name in recipe_names() if name not in TASKS)]


@pytest.mark.parametrize("arguments", [("recipes",), ("recipes", "list")])
def test_list(cli: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    said = cli(*arguments)
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == IN_ORDER
    titles = [line for line in lines if not line.startswith("  ")]
    assert titles == [
        "tasks: a model, problems and rewards",
        "algorithms: on tiny-math, or over a task (grpoforge train TASK ALGORITHM)",
    ]
    assert [lines.index(title) for title in titles] == [0, 1 + len(TASKS)]


def test_list_as_json(cli: Callable[..., Any]) -> None:
    said = cli("recipes", "list", "--json")
    listed = json.loads(said.out)
    assert [one["name"] for one in listed] == IN_ORDER
    assert [one["name"] for one in listed if one["kind"] == "task"] == TASKS
    assert all(one["about"] for one in listed)


@pytest.mark.parametrize("name", recipe_names())
def test_show(cli: Callable[..., Any], name: str) -> None:
    assert cli("recipes", "show", name).out == recipe_text(name)
    whole = json.loads(cli("recipes", "show", name, "--json").out)
    assert Config.model_validate(whole).recipe == name


def test_an_unknown_recipe(refused: Callable[..., Any]) -> None:
    assert refused("recipes", "show", "tiny-mth") == ("unknown recipe `tiny-mth`", "did you mean `tiny-math`?")


def test_a_misspelled_command(refused: Callable[..., Any]) -> None:
    message, hint = refused("recieps")
    assert message.startswith("no such command 'recieps'")
    assert hint == "see `grpoforge --help`"


def test_without_arguments_it_explains_itself(cli: Callable[..., Any]) -> None:
    said = cli()
    assert said.code == 0
    assert "train" in said.out
    assert "Usage: grpoforge" in said.out


def test_version(cli: Callable[..., Any]) -> None:
    assert cli("--version").out == f"{__version__}\n"


def test_warnings_are_one_safe_line_on_stderr(cli: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    cli("--version")
    logging.getLogger("grpoforge.data").warning("a \x1b[31mrow %s", "\u202e")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "warning: a \\x1b[31mrow \\u202e\n")


def test_a_dialect_on_the_command_line(cli: Callable[..., Any]) -> None:
    said = cli("train", "tiny-math", "cispo", "--dialect", "verl", "--dry-run")
    assert said.code == 0
    assert '# dialect       verl: advantage.epsilon 1e-06, advantage.std "sample", loss.max_ratio 1.2,' in said.out


def test_an_unknown_dialect_on_the_command_line(refused: Callable[..., Any]) -> None:
    assert refused("train", "--dialect", "tlr") == ("unknown dialect `tlr` (from --dialect)", "did you mean `trl`?")


def test_a_dialect_does_not_go_with_resume(refused: Callable[..., Any]) -> None:
    message, hint = refused("train", "--resume", "somewhere", "--dialect", "trl")
    assert message == "`--dialect trl` does not go with `--resume`: a run goes on where it is, as it was configured"
    assert hint == "leave it out; single keys change with `--set`"
