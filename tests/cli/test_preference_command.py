"""`grpoforge preference`: what it says, what it writes, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SETTINGS = (
    "--set",
    "hidden_size=32",
    "--set",
    "num_layers=1",
    "--set",
    "learning_rate=3e-3",
    "--set",
    "epochs=4",
    "--set",
    "batch_size=8",
)


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[..., str]:
    """Writes pairs of which the polite one is preferred, of two kinds and all lengths; names the file."""

    def write(*more: Any, first: int = 0, name: str = "pairs.jsonl") -> str:
        rows: list[Any] = []
        for number in range(first, first + 64):
            extra = " and so on" * (number % 3)
            polite, rude = f"please take {number}{extra}", f"go away {number}{' and so on' * ((number + 1) % 3)}"
            kind = ("odd", "even")[number % 2]
            rows.append({"prompt": f"Number {number}?", "chosen": polite, "rejected": rude, "kind": kind})
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
        return name

    return write


def test_it_learns_what_is_preferred_and_says_how_well(
    cli: Callable[..., Any], pairs: Callable[..., str], tmp_path: Path
) -> None:
    trained = cli("preference", "train", pairs(), "--output", "model", *SETTINGS)
    assert trained.code == 0 and trained.err.count("update ") == 10, trained.err
    shown = dict(line.split(None, 1) for line in trained.out.splitlines())
    assert shown["updates"] == "32" and float(shown["loss_last_tenth"]) < 0.2 < float(shown["loss_first"])
    measured = cli("preference", "eval", "model", pairs(first=100, name="other.jsonl"), "--json")
    assert measured.code == 0, measured.err
    figures = json.loads(measured.out)
    assert figures["pairs"]["accuracy"] == 1.0 and figures["pairs"]["pairs"] == 64 and figures["pairs"]["low"] > 0.9
    assert figures["kinds"]["odd"]["pairs"] == figures["kinds"]["even"]["pairs"] == 32
    assert figures["length"]["chosen_shorter"]["accuracy"] == figures["length"]["chosen_longer"]["accuracy"] == 1.0
    assert abs(figures["length"]["margin_correlation"]) < 0.5
    assert figures["antisymmetry"]["max_error"] < 1e-6 and figures["calibration"]["ece"] < 0.2
    as_text = cli("preference", "eval", "model", "other.jsonl")
    assert "kinds/odd                       100.0%  (" in as_text.out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    inputs = tokenizer(["Number 7?"] * 2, ["please take 7", "go away 7"], return_tensors="pt", padding=True)
    with torch.no_grad():
        better, worse = model(**inputs).logits[:, 0].tolist()
    assert better > worse + 1


def test_equal_commands_write_equal_files(cli: Callable[..., Any], pairs: Callable[..., str], tmp_path: Path) -> None:
    sums = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        torch.manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
        cli("preference", "train", pairs(), "-o", name, *SETTINGS, "-s", "epochs=1", "-s", f"seed={seed}")
        sums.append(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert sums[0] == sums[1] != sums[2]


def test_training_starts_from_a_folder(cli: Callable[..., Any], pairs: Callable[..., str]) -> None:
    cli("preference", "train", pairs(), "-o", "first", *SETTINGS)
    again = cli(
        "preference", "train", pairs(), "-o", "second", "--model", "first", "-s", "learning_rate=1e-6", "--json"
    )
    assert again.code == 0 and json.loads(again.out)["loss_first"] < 0.2, again.err


def test_a_bad_pair_is_named_by_its_line(
    refused: Callable[..., Any], pairs: Callable[..., str], tmp_path: Path
) -> None:
    message, hint = refused("preference", "train", pairs({"prompt": "p", "chosen": "c"}), "-o", "model")
    assert message == "pairs.jsonl:65: column `rejected` is missing"
    assert hint == "a pair has the texts prompt, chosen and rejected, the last two unlike"
    assert not (tmp_path / "model").exists()


def test_a_completion_that_is_too_long_is_refused_or_left_out_and_said(
    cli: Callable[..., Any], refused: Callable[..., Any], pairs: Callable[..., str]
) -> None:
    long = {"prompt": "p", "chosen": "please " * 70, "rejected": "no"}
    flags = ("preference", "train", pairs(long), "-o", "model", *SETTINGS, "--set", "max_length=64")
    message, hint = refused(*flags)
    assert message == "pairs.jsonl:65: a completion does not fit into the 64 tokens of the encoder"
    assert "--set long_completions=drop" in hint
    said = cli(*flags, "--set", "long_completions=drop", "--json")
    assert said.code == 0 and json.loads(said.out)["pairs"] == 64
    assert (
        "warning: left out 1 of 65 pairs with a completion of more than 64 tokens; the first is pairs.jsonl:65"
        in said.err
    )


def test_pairs_of_a_small_margin_are_left_out(
    cli: Callable[..., Any], refused: Callable[..., Any], pairs: Callable[..., str]
) -> None:
    close = {"prompt": "p", "chosen": "please", "rejected": "no", "margin": 0.3}
    flags = ("preference", "train", pairs(close), "-o", "model", *SETTINGS)
    said = cli(*flags, "--set", "preference_threshold=0.2", "--json")
    assert json.loads(said.out)["pairs"] == 1 and json.loads(said.out)["left_out"] == 64
    message, hint = refused(*flags[:3], "-o", "other", "--set", "preference_threshold=0.5")
    assert message == "none of the 65 pairs of pairs.jsonl has a margin of at least 0.5"
    assert hint == "lower `preference_threshold`"


def test_mistakes_are_answered(refused: Callable[..., Any], pairs: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for arguments, message, hint in (
        (("train", pairs(), "-o", "full"), "`--output full` exists and is not empty", "name a new folder"),
        (
            ("train", pairs(), "-o", "full/file/m"),
            "`--output full/file/m` cannot be made in ",
            "name a folder of yours",
        ),
        (("train", "nothing.jsonl", "-o", "m"), "there is no pairs file nothing.jsonl", "give a .jsonl file"),
        (
            ("train", pairs(), "-o", "m", "--set", "lr=1"),
            "unknown option `lr` of reward `grpoforge:preference.train`",
            "",
        ),
        (("train", pairs(), "-o", "m", "--set", "epochs=0"), "option `epochs` of reward", "`epochs` is `int`"),
        (("train", pairs(), "-o", "m", "--model", "./no"), "there is no encoder folder ./no", "give a folder with"),
        (("eval", "./no", pairs()), "there is no encoder folder ./no", "give a folder with"),
        (("eval", "m", pairs(), "--component", "math"), "reward `grpoforge:math` has no preference model", "leave out"),
        (("pairs", "nothing.jsonl", "-o", "p"), "there is no dataset at nothing.jsonl", ""),
    ):
        found = refused("preference", *arguments)
        assert found[0].startswith(message) and found[1].startswith(hint) and found[1], found


def test_a_reward_that_learns_from_others_needs_one(refused: Callable[..., Any]) -> None:
    message, hint = refused("train", "--reward", "preference", "--dry-run")
    assert (
        message == "reward `preference` learns from the other rewards of the run, and none has a weight (from --reward)"
    )
    assert hint == "add one, such as `--reward math`"
    message, _ = refused("train", "--reward", "preference", "--reward", "math:0", "--dry-run")
    assert "none has a weight" in message


def test_pairs_are_made_from_worked_problems(cli: Callable[..., Any], tmp_path: Path) -> None:
    rows = [
        {"question": f"{n}+1?", "answer": f"It is {n}+1 = <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"} for n in range(8)
    ]
    (tmp_path / "solved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = cli("preference", "pairs", "solved.jsonl", "-o", "pairs.jsonl", "-s", "kinds=[wrong_number]", "--json")
    assert said.code == 0 and json.loads(said.out)["kinds"] == {"wrong_number": 8}
    written = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert written[0]["chosen"] == "It is 0+1 = 1.\n#### 1" and written[0]["rejected"] != written[0]["chosen"]
