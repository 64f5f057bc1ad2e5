"""``grpoforge eval`` of an embedded model, a folder and a run; its JSON; and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

FEW = ("--num-problems", "4", "--set", "sampler.max_completion_length=8")


@pytest.fixture
def run(cli: Callable[..., Any], small: Sequence[str]) -> str:
    """A finished run of two steps, with a checkpoint of each."""
    said = cli("train", *small, "--set", "checkpoint.every=1", "--output", "run")
    assert said.code == 0, said.err
    return "run"


def test_json_is_all_there_is_on_stdout(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "print('a')\ndef loud(completions):\n    print('b')\n    return [0.5 for _ in completions]\n"
    )
    said = cli("eval", "tiny-math", *FEW, "--samples", "2", "--reward", "./mine.py:loud", "--json")
    assert said.code == 0, said.err
    whole = json.loads(said.out)
    assert (whole["model"], whole["dataset"]) == ("tiny-math", "tiny-math")
    assert list(whole) == [
        *("model", "dataset", "num_problems", "correctness", "max_completion_length", "seed", "metrics")
    ]
    assert [whole[key] for key in ("num_problems", "correctness", "max_completion_length", "seed")] == [4, "math", 8, 0]
    metrics = whole["metrics"]
    assert metrics["eval_rewards/loud/mean"] == 0.5
    assert {"eval_pass@1", "eval_mean@2", "eval_sampled_rewards/loud/mean", "eval_rewards/math/mean"} <= set(metrics)
    assert all(isinstance(value, float) for value in metrics.values())


def test_a_table(cli: Callable[..., Any]) -> None:
    said = cli("eval", "tiny-math", *FEW)
    lines = [line.split() for line in said.out.splitlines()]
    assert lines[0] == ["tiny-math", "on", "tiny-math"]
    assert any("eval_pass@1" in line for line in lines)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.out.splitlines()]
    for row in (
        ["problems", "4"],
        ["right is what gets 1 from", "math"],
        ["longest completion", "8 tokens"],
        ["seed", "0"],
    ):
        assert row in cells


def test_fewer_problems_than_asked_for(cli: Callable[..., Any], dataset: Callable[..., str]) -> None:
    name = dataset(*({"question": f"{n}+1?", "answer": str(n + 1)} for n in range(3)))
    said = cli("eval", "tiny-math", "--set", f"data.eval_dataset={name}", *FEW)
    assert said.code == 0, said.err
    assert (
        f"warning: measured on 3 problems: {name} has no more to evaluate on, and `--num-problems` is 4\n" in said.err
    )


@pytest.mark.parametrize("name", ["tiny-math", "./m"])
def test_a_model_in_a_folder_that_holds_a_run(
    cli: Callable[..., Any], model: Callable[..., str], tmp_path: Path, name: str
) -> None:
    (tmp_path / "tiny-math-1").mkdir()
    (tmp_path / "tiny-math-1" / "run.json").write_text("{}")
    model("m")
    said = cli("eval", name, *FEW, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["model"] == name


def test_checkpoints_without_a_run(refused: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "torn" / "checkpoints").mkdir(parents=True)
    assert refused("eval", "torn")[0] == "torn holds no run (there is no run.json)"


def test_the_same_model_has_the_same_figures(cli: Callable[..., Any], model: Callable[..., str]) -> None:
    flags = (*FEW, "--samples", "2", "--json")
    first = json.loads(cli("eval", "tiny-math", *flags).out)
    assert json.loads(cli("eval", model("m"), *flags).out)["metrics"] == first["metrics"]


def test_another_dataset(cli: Callable[..., Any], dataset: Callable[..., str]) -> None:
    name = dataset({"question": "1+1?", "answer": "2"})
    said = cli("eval", "tiny-math", "--dataset", name, *FEW, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["dataset"] == name


def test_a_folder_whose_name_looks_like_markup(cli: Callable[..., Any], model: Callable[..., str]) -> None:
    said = cli("eval", model("[red]m"), *FEW)
    assert said.code == 0, said.err
    assert said.out.splitlines()[0].strip() == "./[red]m on tiny-math"


def test_a_run(cli: Callable[..., Any], run: str) -> None:
    named = {}
    for which in ("best", "last", "1"):
        said = cli("eval", run, "--checkpoint", which, "--json")
        assert said.code == 0, said.err
        named[which] = Path(json.loads(said.out)["model"]).resolve().name
    assert named["last"] == "step-000002"
    assert named["1"] == "step-000001"
    assert json.loads(cli("eval", run, "--json").out)["model"].endswith(("step-000001", "step-000002"))


def test_a_checkpoint_that_is_not_there(refused: Callable[..., Any], run: str) -> None:
    for which in ("7", "newest"):
        assert refused("eval", run, "--checkpoint", which) == (
            f"run has no checkpoint `{which}`",
            "use best, last, or one of: 1, 2",
        )


def test_a_run_has_its_own_configuration(refused: Callable[..., Any], run: str) -> None:
    assert refused("eval", run, "--recipe", "tiny-math") == (
        "`--recipe tiny-math` does not go with run, a run that has its own configuration",
        "leave it out, or change single keys with `--set`",
    )


def test_a_run_without_checkpoints(refused: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "run.json").write_text('{"config": {}}')
    assert refused("eval", "early") == ("early has no checkpoint yet", "wait for the first one, or evaluate a model")


def test_a_run_that_is_not_there(refused: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "trained" / "first").mkdir(parents=True)
    (tmp_path / "trained" / "first" / "run.json").write_text("{}")
    message, hint = refused("eval", "trained/frist")
    assert message == "trained/frist holds no run (there is no run.json)"
    assert hint == "did you mean `trained/first`?"
    assert refused("eval", "trained/zzz")[1] == "known: trained/first"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ("./nowhere",),
            "there is no model folder ./nowhere",
            "give a folder with config.json and *.safetensors, or a hub id",
        ),
        (
            ("tiny-maths",),
            "there is no model folder tiny-maths",
            "give a folder with config.json and *.safetensors, or a hub id",
        ),
        (
            ("tiny-math", "--checkpoint", "best"),
            "`--checkpoint best` needs a run directory, and tiny-math is none",
            "leave it out, or name a run",
        ),
        (
            ("tiny-math", "--num-problems", "0"),
            "`data.num_eval` is `0` (from --num-problems): it must be greater than or equal to 1",
            "`num_eval`: Problems to evaluate on.",
        ),
        (
            ("tiny-math", "--samples", "-1"),
            "`eval.samples` is `-1` (from --samples): it must be greater than or equal to 0",
            "`samples`: Completions per problem drawn as in training, beside the greedy one; 0 for none.",
        ),
        (
            ("tiny-math", "--dataset", "nope.jsonl"),
            "there is no dataset at nope.jsonl (from --dataset)",
            "check the path (`--dataset FILE`)",
        ),
        (("tiny-math", "--recipe", "nope"), "unknown recipe `nope`", None),
        (("tiny-math", "--set", "sampler.x=1"), None, None),
        ((), "missing argument 'RUN|MODEL'", "see `grpoforge eval --help`"),
    ],
)
def test_refusals(refused: Callable[..., Any], arguments: Sequence[str], message: str | None, hint: str | None) -> None:
    said = refused("eval", *arguments)
    assert said == (message or said[0], hint or said[1])
    assert all(said)


def test_an_empty_folder_is_no_model(refused: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refused("eval", "empty") == (
        "the model folder empty has no config.json",
        "give a folder saved by `save_pretrained`",
    )
