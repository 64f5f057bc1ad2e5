"""`grpoforge plugins check`: exit code 0 when every rule is kept, 1 when one is broken, 2 for a mistake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "plugins"

KEPT = '''
from grpoforge import hookimpl


def polite(completions, *, word: str):
    """1.0 when the completion says `word`, else 0.0."""
    return [float(word in text.lower()) for text in completions]


def centered(rewards, weights):
    """The total minus its mean over the scored rows of the group."""
    total = (rewards * weights).nansum(dim=2).masked_fill(rewards.isnan().all(dim=2), float("nan"))
    return (total - total.nanmean(dim=1, keepdim=True)).nan_to_num(nan=0.0)


@hookimpl
def register_rewards(register):
    register("polite", polite)


@hookimpl
def register_advantages(register):
    register("centered", centered)
'''


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    """A plugin of two components, one of which has an option that must be given."""
    (tmp_path / "mine.py").write_text(KEPT, encoding="utf-8")
    return "mine.py"


def test_a_file_that_keeps_its_contract(cli: Callable[..., Any], plugin: str) -> None:
    said = cli("plugins", "check", plugin, "--set", "word=please")
    assert said.code == 0, said.out + said.err
    lines = said.out.splitlines()
    assert lines[0] == "reward mine:polite  ./mine.py:5"
    assert "  passed  order             three prompts and four completions in another order" in lines
    assert "advantage mine:centered  ./mine.py:10" in lines
    assert lines[-1].startswith("2 components; rules kept: ") and lines[-1].endswith(", broken: 0")


def test_one_kind_of_a_file(cli: Callable[..., Any], plugin: str) -> None:
    said = cli("plugins", "check", plugin, "--kind", "advantage")
    assert said.code == 0
    assert "polite" not in said.out and said.out.startswith("advantage mine:centered")


def test_a_broken_file_ends_with_1_and_says_promise_and_hint(cli: Callable[..., Any], tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "broken_reward.py", tmp_path)
    said = cli("plugins", "check", "broken_reward.py")
    assert (said.code, said.err) == (1, "")
    lines = [line.strip() for line in said.out.splitlines()]
    at = next(index for index, line in enumerate(lines) if line.startswith("BROKEN  order"))
    assert lines[at + 1] == "Reordering completions and prompts reorders the rewards, and nothing else."
    assert lines[at + 2] == ("hint: look at each completion for itself; for a comparison of siblings take `rollouts`")
    assert lines[-1] == "1 component; rules kept: 3, broken: 6"


def test_json(cli: Callable[..., Any], tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "broken_advantage.py", tmp_path)
    said = cli("plugins", "check", "broken_advantage.py", "--json")
    assert said.code == 1
    (report,) = json.loads(said.out)["reports"]
    assert (report["kind"], report["id"], report["kept"]) == ("advantage", "broken_advantage:hasty", False)
    by_rule = {one["rule"]: one for one in report["findings"]}
    assert by_rule["float64"] == {
        "rule": "float64",
        "promise": "Float64 in, float64 out.",
        "hint": "compute in float64: rewards and weights are float64, so do not call `.float()`",
        "status": "failed",
        "detail": "it returned float32",
    }
    assert by_rule["state"]["status"] == "not applicable"


def test_a_component_by_name_with_an_option(cli: Callable[..., Any]) -> None:
    said = cli("plugins", "check", "clip", "--set", "epsilon_high=0.28")
    assert said.code == 0, said.out
    assert said.out.startswith("loss grpoforge:clip  ")


def test_a_plain_function_of_a_file(cli: Callable[..., Any], tmp_path: Path) -> None:
    code = (
        "def exact(completions, answer, **kwargs):\n    return [float(a == b) for a, b in zip(completions, answer)]\n"
    )
    (tmp_path / "rewards.py").write_text(code, encoding="utf-8")
    said = cli("plugins", "check", "./rewards.py:exact")
    assert said.code == 0, said.out
    assert said.out.startswith("reward rewards:exact  ./rewards.py:1\n")


def test_all_components_of_a_plugin(cli: Callable[..., Any], plugin: str) -> None:
    said = cli("plugins", "check", "mine", "--plugin", plugin, "--set", "word=please")
    assert said.code == 0
    assert said.out.splitlines()[-1].startswith("2 components;")


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["clipp"], "unknown component `clipp`", "did you mean `clip`?"),
        (["clip", "--kind", "kl"], "unknown kl `clip`", None),
        (["clip", "--kind", "los"], "unknown kind `los`", "did you mean `loss`?"),
        (["clip", "--set", "epsilon_hi=1"], "nothing in `clip` takes the option `epsilon_hi`", None),
        (["k3_plus", "--set", "clamp=x"], "option `clamp` of kl `grpoforge:k3_plus`: ", None),
        (["brevity", "--set", "word"], "`--set word` is not KEY=VALUE", None),
        (["absent.py"], "the plugin file `./absent.py` does not exist", None),
        (["mine.py", "--kind", "loss"], "`mine.py` registers no loss", "it registers: reward, advantage"),
        (["mine.py"], "option `word` of reward `mine:polite` is required", "`word` is `str`"),
        (["./"], "`./` is a folder", "name the plugin's file, or an installed plugin by its name"),
        (["mine.py:nothing"], "`./mine.py` has no function `nothing`", None),
        ([], "missing argument 'PATH|NAME'", "see `grpoforge plugins check --help`"),
    ],
)
def test_mistakes_are_told_with_a_hint(
    refused: Callable[..., tuple[str, str]], plugin: str, arguments: list[str], message: str, hint: str | None
) -> None:
    said = refused("plugins", "check", *arguments)
    assert said[0].startswith(message), said
    assert said[1] and (hint is None or said[1] == hint)


def test_a_signature_that_cannot_be_used_is_refused(refused: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    code = "from grpoforge import hookimpl\n\n\n@hookimpl\ndef register_losses(register):\n"
    (tmp_path / "odd.py").write_text(code + '    register("odd", lambda *inputs: inputs)\n', encoding="utf-8")
    assert refused("plugins", "check", "odd.py") == (
        "loss `odd:odd` takes `*inputs`",
        "name each parameter: positional ones are data",
    )
