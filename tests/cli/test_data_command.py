"""``grpoforge data show``: prompts as the model sees them, and how long they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from grpoforge.cli.data_command import lines
from grpoforge.data import PromptFormat, to_prompts
from grpoforge.layers import build
from grpoforge.plugins import load_plugins
from grpoforge.preview import Lengths, measure_lengths, preview
from grpoforge.problems import load_examples, load_rows
from grpoforge.yaml_source import read_recipe
from grpoforge_plugins.datasets.tiny_math import tiny_math

ROOT = Path(__file__).parents[2]
RECIPE = ("recipe", read_recipe("tiny-math"))
ROWS = [{"question": f"What is {n}+1?", "answer": str(n + 1)} for n in range(12)]


@pytest.fixture(scope="module")
def shared() -> Path:
    """The folder with the models and the data that no package may carry."""
    folder = Path(os.environ.get("GRPOFORGE_SHARED", ROOT.parent / "shared"))
    assert (folder / "models/stories260K").is_dir(), f"{folder} has no models/stories260K; set GRPOFORGE_SHARED"
    return folder


def as_json(cli: Callable[..., Any], *arguments: str) -> dict[str, Any]:
    said = cli("data", "show", "--json", *arguments)
    assert said.code == 0, said.err
    shown: dict[str, Any] = json.loads(said.out)
    return shown


def test_a_row_as_the_model_sees_it(cli: Callable[..., Any]) -> None:
    said = cli("data", "show", "--rows", "1", "--set", "data.system_prompt=Be brief.")
    assert said.code == 0, said.err
    question = tiny_math("train")[0]["question"]
    assert said.out.splitlines()[:9] == [
        "tiny-math, train: 4,096 prompts for tiny-math",
        "",
        said.out.splitlines()[2],
        "  | <|im_start|>system",
        "  | Be brief.<|im_end|>",
        "  | <|im_start|>user",
        f"  | {question}<|im_end|>",
        "  | <|im_start|>assistant",
        "  | ",
    ]
    assert said.out.splitlines()[2].startswith("tiny-math/train:1  ")
    assert "(read by math)" in said.out
    assert said.out.splitlines()[-1] == (
        "  limit 192 (a context of 256 leaves beside completions of 64); 0 of 4,096 prompts exceed it"
    )


def test_the_tokens_it_counts_are_those_of_the_prompts_of_a_run(cli: Callable[..., Any]) -> None:
    """What is shown is what `to_prompts` makes, token by token."""
    config = build([RECIPE, ("mine", {"data": {"few_shot": 2, "instruction": "Think."}})])
    shown = preview(config, "train", 5)
    reader = load_plugins().hook.load_reader(model=config.model)
    policy = load_plugins().hook.load_policy(model=config.model)
    assert (reader.context_length, reader.tokenizer.get_vocab()) == (
        policy.context_length,
        policy.tokenizer.get_vocab(),
    )
    fmt = PromptFormat(
        column="question", system_prompt=None, template="{prompt}", max_length=None, limit_origin="", on_long="drop",
        instruction="Think.", few_shot=2, examples=load_examples(config, load_plugins(), ()),
    )  # fmt: skip
    prompts = to_prompts(load_rows(config, load_plugins(), ())[0], policy.tokenizer, fmt)
    assert [row.text for row in shown.rows] == [prompt.text for prompt in prompts[:5]]
    assert [row.num_tokens for row in shown.rows] == [len(prompt.token_ids) for prompt in prompts[:5]]
    assert shown.lengths.max == max(len(prompt.token_ids) for prompt in prompts)


def test_json(cli: Callable[..., Any], dataset: Callable[..., str]) -> None:
    name = dataset(*ROWS)
    shown = as_json(cli, "--dataset", name, "--set", "data.num_eval=4", "--rows", "2", "--reward", "math")
    assert (shown["dataset"], shown["split"], shown["num_rows"], shown["limit"]) == ("train.jsonl", "train", 8, 192)
    assert shown["columns"] == [
        {"name": "question", "type": "str", "read_by": []},
        {"name": "answer", "type": "str", "read_by": ["math"]},
    ]
    assert len(shown["rows"]) == 2
    row = shown["rows"][0]
    number = int(row["origin"].partition(":")[2]) - 1
    assert row["columns"] == ROWS[number]
    assert f"What is {number}+1?<|im_end|>" in row["text"]
    assert sum(bar["count"] for bar in shown["lengths"]["histogram"]) == 8


def test_the_splits(cli: Callable[..., Any], dataset: Callable[..., str]) -> None:
    """Of a file, what is held out is both validation and test; of a dataset, its own."""
    flags = ("--dataset", dataset(*ROWS), "--set", "data.num_eval=4", "--rows", "12")
    origins = {
        split: [row["origin"] for row in as_json(cli, *flags, "--split", split)["rows"]]
        for split in ("train", "validation", "test")
    }
    assert len(origins["train"]) == 8
    assert origins["validation"] == origins["test"]
    assert {*origins["train"], *origins["test"]} == {f"train.jsonl:{number}" for number in range(1, 13)}


def test_validation_and_test_of_gsm8k(cli: Callable[..., Any], shared: Path) -> None:
    flags = (
        *("--dataset", "gsm8k", "--rows", "1", "--model", str(shared / "models/stories260K"), "--set"),
        *(f"data.options.path={shared / 'data/gsm8k'}", "data.options.num_validation=200", "data.num_eval=2000"),
    )
    sizes = {split: as_json(cli, *flags, "--split", split) for split in ("train", "validation", "test")}
    assert [one["num_rows"] for one in sizes.values()] == [7273, 200, 1319]
    assert sizes["test"]["rows"][0]["origin"] == "test.jsonl:1"
    assert sizes["test"]["rows"][0]["columns"]["answer"] == "18"
    assert sizes["test"]["rows"][0]["text"].startswith("<s> Question: Janet")
    assert {one["name"]: one["read_by"] for one in sizes["train"]["columns"]} == {
        "question": [], "solution": [], "answer": ["math"],
    }  # fmt: skip


def test_lengths_by_hand() -> None:
    """1..20: the middle is 10.5; 95% of 20 is the 19th; 13 to 20 are over 12."""
    lengths = measure_lengths(list(range(20, 0, -1)), 12)
    assert (lengths.min, lengths.median, lengths.p95, lengths.max, lengths.num_over_limit) == (1, 10.5, 19, 20, 8)
    # Bars of 2 from 0: 1 | 2 3 | ... | 18 19 | 20.
    assert [(bar.low, bar.high, bar.count) for bar in lengths.histogram] == [
        (0, 1, 1), *((low, low + 1, 2) for low in range(2, 20, 2)), (20, 21, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("lengths", [[7], [3, 900], list(range(1, 5000, 7)), [1000, 1001]])
def test_every_prompt_is_in_one_bar(lengths: list[int]) -> None:
    measured: Lengths = measure_lengths(lengths, None)
    assert 1 <= len(measured.histogram) <= 12
    assert measured.num_over_limit == 0
    for bar in measured.histogram:
        assert bar.count == sum(bar.low <= length <= bar.high for length in lengths)
    assert sum(bar.count for bar in measured.histogram) == len(lengths)


def test_long_prompts_are_counted_and_shown(cli: Callable[..., Any], dataset: Callable[..., str]) -> None:
    name = dataset(*[{"question": "one two three " * 50, "answer": "1"}] * 3, {"question": "a", "answer": "1"})
    flags = ("--dataset", name, "--set", "data.num_eval=1", "data.max_prompt_length=20", "data.long_prompts=stop")
    said = cli("data", "show", *flags, "--set", "seed=1")
    assert said.code == 0, said.err
    assert "over the limit of 20" in said.out
    assert said.out.splitlines()[-1].startswith("  limit 20 (`data.max_prompt_length` allows); ")


def test_a_hostile_row_never_acts_on_the_terminal(cli: Callable[..., Any], dataset: Callable[..., str]) -> None:
    hostile = "\x1b]0;owned\x07\u202e[bold red]1+1?[/]\x1b[2J"
    name = dataset(*[{"question": hostile, "\x1b[31m": "\x1b[2J", "answer": "2"}] * 4)
    said = cli("data", "show", "--dataset", name)
    assert said.code == 0, said.err
    assert not {"\x1b", "\x07", "\u202e"} & {*said.out, *said.err}
    assert "\\x1b[31m" in said.out
    assert not {"\x1b", "\x07", "\u202e"} & set(cli("data", "show", "--dataset", name, "--json").out)


def test_the_bars_are_plain_characters() -> None:
    shown = lines(preview(build([RECIPE]), "validation", 0))
    bars = [line for line in shown if "#" in line]
    assert bars and all(line.isascii() for line in bars)
    assert max(line.count("#") for line in bars) == 40


def test_a_stream_is_shown_from_its_buffer(cli: Callable[..., Any], dataset: Callable[..., str]) -> None:
    flags = ("--dataset", dataset(*ROWS), "--set", "data.streaming=true", "data.num_eval=2", "data.shuffle_buffer=5")
    said = cli("data", "show", *flags)
    assert said.out.splitlines()[0] == "train.jsonl, train: the first 5 prompts for tiny-math"
    assert as_json(cli, *flags)["is_complete"] is False


def test_a_stream_that_evaluation_uses_up_is_refused(
    refused: Callable[..., tuple[str, str]], dataset: Callable[..., str]
) -> None:
    message, hint = refused("data", "show", "--dataset", dataset(*ROWS), "--set", "data.streaming=true")
    assert "ends within the rows held out for evaluation" in message
    assert hint.startswith("lower `data.num_eval`")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "nope"), "unknown dataset `nope` (from --dataset)"),
        (("--dataset", "nope.jsonl"), "there is no dataset at nope.jsonl (from --dataset)"),
        (("--model", "./nope"), "there is no model folder ./nope"),
        (("--set", "data.promt=x"), "unknown key `data.promt` (from --set data.promt=x)"),
    ],
)
def test_mistakes(refused: Callable[..., tuple[str, str]], arguments: Sequence[str], message: str) -> None:
    found, hint = refused("data", "show", *arguments)
    assert found == message
    assert hint


def test_its_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom grpoforge.cli.main import main\ntry: main(['data', 'show', '--help'])\n"
        "except SystemExit: print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--split" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_without_a_command_it_shows_its_help(cli: Callable[..., Any]) -> None:
    said = cli("data")
    assert (said.code, said.err) == (0, "")
    assert "show" in said.out
