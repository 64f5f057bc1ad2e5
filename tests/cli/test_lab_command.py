"""`grpoforge lab`: tables, JSON and plot; anybody's components; what fails is listed and the rest is measured."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpoforge.lab.report import SAMPLES
from grpoforge.plugins import load_plugins

GUIDE = Path(__file__).parents[2] / "docs/guides/lab.md"

PLUGIN = '''
from grpoforge import hookimpl


def mine(logprobs, ref_logprobs, *, factor: float = 1.0):
    """`factor` times x."""
    return factor * (logprobs - ref_logprobs)


def broken(logprobs, ref_logprobs):
    """Not an estimate."""
    raise ValueError("no idea")


def infinite(logprobs, ref_logprobs):
    """Not one either."""
    return (logprobs - ref_logprobs) / 0.0


def huge(logprobs, ref_logprobs):
    """Finite, and its variance is not."""
    return 1e300 * (logprobs - ref_logprobs)


def needy(logprobs, ref_logprobs, *, factor: float):
    """An option without a default."""
    return factor * (logprobs - ref_logprobs)


def raw(rewards):
    """The rewards as they are."""
    return rewards[:, :, 0]


@hookimpl
def register_kl_estimators(register):
    register("mine", mine)
    register("broken", broken)
    register("infinite", infinite)
    register("huge", huge)
    register("needy", needy)


@hookimpl
def register_advantages(register):
    register("raw", raw)
'''


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(PLUGIN, encoding="utf-8")
    return "own.py"


@pytest.fixture
def figures(cli: Callable[..., Any]) -> Callable[..., Any]:
    """What `lab ARGUMENTS --json -` writes."""

    def run(*arguments: str) -> Any:
        said = cli("lab", *arguments, "--json", "-")
        assert said.code == 0, said.err
        return json.loads(said.out)

    return run


def test_tables(cli: Callable[..., Any]) -> None:
    said = cli("lab", "kl", "k1", "k3")
    assert said.code == 0
    assert "KL estimators, one token, on-policy; KL(policy || reference) is 0.4885" in said.out
    lines = [line.split() for line in said.out.splitlines()]
    on_policy = next(line for line in lines if line[:1] == ["k3"])
    assert on_policy[1] == "0" and on_policy[3] == "forward"
    assert next(line for line in lines if line[:1] == ["k1"])[3] == "zero"


def test_names_without_a_kind(cli: Callable[..., Any]) -> None:
    said = cli("lab", "leave_one_out", "reinforce", "--samples", "10")
    assert said.code == 0
    assert "Advantages, two prompts, groups of 8; 10 batches sampled, seed 0" in said.out
    assert "Losses, three tokens, at ratio 1" in said.out and "KL estimators" not in said.out
    assert re.search(r"^leave_one_out +█+ +1 +1 +1$", said.out, re.MULTILINE)


def test_the_schema(figures: Callable[..., Any]) -> None:
    found = figures("all", "k3", "group_mean", "clip", "clip_cov", "--samples", "5", "--seed", "3")
    assert set(found) == {"schema", "samples", "seed", "kl", "advantage", "loss", "failed"}
    assert (found["schema"], found["samples"], found["seed"], found["failed"]) == (1, 5, 3, [])
    (kl,) = found["kl"]["rows"]
    assert set(kl) == {"id", "name", "on_policy", "off_policy", "in_loss", "in_reward"}
    assert kl["id"] == "grpoforge:k3" and kl["on_policy"]["gradient"] == "forward"
    (advantage,) = found["advantage"]["rows"]
    assert set(advantage["groups"]) == {"2", "4", "8"} and advantage["groups"]["4"]["scale"] == pytest.approx(0.75)
    assert advantage["groups"]["4"]["error"] is None and advantage["groups"]["8"]["error"] > 0
    assert len(advantage["weight_by_difficulty"]) == len(found["advantage"]["difficulties"])
    clip, clip_cov = found["loss"]["rows"]
    assert len(clip["gaps"]) == len(found["loss"]["gaps"]) == len(found["loss"]["exact_ratio"])
    assert set(clip["gaps"][0]) == {"cosine", "scale", "bias", "variance", "noise", "error"}
    assert (clip["is_sampled"], clip_cov["is_sampled"]) == (False, True)


def test_json_in_a_file_beside_the_tables(cli: Callable[..., Any], tmp_path: Path) -> None:
    said = cli("lab", "k1", "--json", "lab.json")
    assert said.code == 0 and "KL estimators" in said.out and "wrote lab.json" in said.err
    written = (tmp_path / "lab.json").read_text()
    assert cli("lab", "k1", "--json", "-").out == written, "no date, no time: equal runs, equal figures"


def test_a_component_of_somebody_else(figures: Callable[..., Any], plugin: str) -> None:
    found = figures("mine", "raw", "needy", "--plugin", plugin, "--set", "factor=2.0", "--samples", "10")
    (kl, needy), (advantage,) = found["kl"]["rows"], found["advantage"]["rows"]
    assert needy["on_policy"] == kl["on_policy"]
    assert kl["id"] == "own:mine"
    assert kl["on_policy"]["value"] == pytest.approx(2 * found["kl"]["exact"]["one_token"])
    assert kl["on_policy"]["gradient"] == "zero"
    assert advantage["groups"]["2"]["bias"] == pytest.approx(0, abs=1e-10)
    assert advantage["weight_by_difficulty"] == pytest.approx([1.0] * 9)


def test_what_fails_is_listed_and_the_others_are_measured(cli: Callable[..., Any], plugin: str) -> None:
    said = cli("lab", "kl", "k1", "broken", "infinite", "huge", "needy", "mine", "--plugin", plugin)
    assert said.code == 1
    assert re.search(r"^failed +component +reason +source *$", said.out, re.MULTILINE)
    assert re.search(
        r"^kl +own:broken +raised ValueError: no idea \(own\.py:12\) +\./own\.py:10$", said.out, re.MULTILINE
    )
    assert re.search(r"^kl +own:infinite +a value is not finite ", said.out, re.MULTILINE)
    assert re.search(r"^kl +own:huge +its values are too large: a mean or a variance ", said.out, re.MULTILINE)
    assert re.search(r"^kl +own:needy +refused it: option `factor` of kl `own:needy` is req", said.out, re.MULTILINE)
    assert re.search(r"^mine +0 ", said.out, re.MULTILINE) and re.search(r"^k1 +0 ", said.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["kl", "k3_pluss"], "unknown component `k3_pluss`", "did you mean `k3_plus`?"),
        (["advantage", "leave_on_out"], "unknown component `leave_on_out`", "did you mean `leave_one_out`?"),
        (["kl", "clip"], "`clip` is a loss, and is not measured", "measured are: abs, full, "),
        (["kl", "leave_one_out"], "`leave_one_out` is an advantage, and is not measured", "measured are: abs, "),
        (["math"], "`math` is a reward, and is not measured", "measured are: batch_std, "),
        (["k3", "--set", "clam=[1, 1]"], "nothing that is measured takes the option `clam`", "did you mean `clamp`?"),
        (["k3", "--set", "clamp=[0, 1]"], "option `clamp` of kl `grpoforge:k3`: ", "`clamp` is "),
        (["k3", "--plot", "lab.png"], "`--plot lab.png` is not an SVG file", "name it `lab.svg`"),
        (["k3", "--plot", "no/lab.svg"], "the folder of `no/lab.svg` does not exist", "make it: mkdir -p no"),
        (["k3", "--json", "no/lab.json"], "the folder of `no/lab.json` does not exist", "make it: mkdir -p no"),
    ],
)
def test_mistakes(refused: Callable[..., tuple[str, str]], arguments: list[str], message: str, hint: str) -> None:
    found = refused("lab", *arguments)
    assert found[0].startswith(message) and found[1].startswith(hint)


def test_a_file_that_cannot_be_written(cli: Callable[..., Any], tmp_path: Path) -> None:
    for flag, name in (("--json", "taken.json"), ("--plot", "taken.svg")):
        (tmp_path / name).mkdir()
        said = cli("lab", "k1", flag, name)
        assert said.code == 2
        assert f"error: `{flag} {name}` cannot be written: Is a directory" in said.err


def test_the_plot_is_an_svg(cli: Callable[..., Any], tmp_path: Path) -> None:
    written = []
    for name in ("one.svg", "two.svg"):
        said = cli("lab", "k3", "abs", "group", "clip", "--samples", "5", "--plot", name)
        assert said.code == 0 and f"wrote {name}" in said.err
        written.append((tmp_path / name).read_bytes())
    root = ElementTree.fromstring(written[0])
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"k3", "abs", "group", "clip", "exact ratio"} <= texts
    assert written[0] == written[1], "equal figures, equal files"


def test_without_matplotlib(refused: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert refused("lab", "k1", "--plot", "lab.svg") == (
        "`--plot` draws with matplotlib, which is not installed",
        "install it: pip install 'grpoforge[plot]'",
    )


def test_bars_where_the_terminal_has_no_blocks() -> None:
    from grpoforge.cli.lab_display import _bar, _curve

    assert _bar(0.5, 1.0, plain=False) == "████    " and _bar(0.3, 1.0, plain=False) == "██▍     "
    assert _bar(0.5, 1.0, plain=True) == "####    " and _bar(-1.0, 1.0, plain=True) == " " * 8
    assert _curve([0.0, 0.5, 1.0], plain=False) == "▁▅█" and _curve([0.0, 1.0], plain=True) == "_="


def test_the_default_of_samples_is_the_library_s(figures: Callable[..., Any]) -> None:
    assert figures("k1")["samples"] == SAMPLES


@pytest.mark.slow
def test_the_guide_is_up_to_date() -> None:
    command = [sys.executable, "benchmarks/bench_lab.py", "--check"]
    checked = subprocess.run(command, cwd=GUIDE.parents[2], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "up to date\n"), checked.stderr


@pytest.mark.parametrize("kind", ["kl", "advantage", "loss"])
def test_the_guide_shows_every_component_of_ours(kind: str) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    part = text[text.index(f"<!-- lab: {kind} -->") : text.index(f"<!-- end of {kind} -->")]
    shown = set(re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE))
    assert shown == {one.name for one in load_plugins().registry.list(kind) if one.plugin == "grpoforge"}  # type: ignore[arg-type]
