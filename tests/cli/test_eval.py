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
        *("model", "dataset", "num_problems", "correctness", "max_completion_length", "seed", "metrics"),
        *("samples", "temperatures", "intervals", "counts", "comparison"),
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
        (
            ("tiny-math", "--temperature", "0.5"),
            "`--temperature 0.5` changes nothing: no completion is sampled",
            "add `--samples K`; greedy completions have no temperature",
        ),
        (
            ("tiny-math", "--samples", "2", "--temperature", "0"),
            "sampler option `temperature` is 0",
            "choose it above 0",
        ),
        (
            ("tiny-math", "--samples", "4", "--k", "2,8"),
            "`eval.k` has 8 (from --k), and there are 4 samples of each problem (from --samples)",
            "draw at least 8 (`--set eval.samples=8`), or leave 8 out",
        ),
        (
            ("tiny-math", "--samples", "4", "--k", "0"),
            "`eval.k.0` is `0` (from --k): it must be greater than or equal to 1",
            None,
        ),
        (
            ("tiny-math", "--samples", "4", "--k", "1;2"),
            "`--k 1;2` is no list of numbers",
            "write for instance `--k 1,4,8`",
        ),
        (("tiny-math", "--output", "r.csv"), "`--output r.csv` is no Parquet file", "call it `r.csv.parquet`"),
        (
            ("tiny-math", "--compare", "r.parquet"),
            "there are no results at r.parquet",
            "write some with `grpoforge eval MODEL --output FILE.parquet`",
        ),
        (
            ("tiny-math", "--num-problems", "2", "--compare", "./nowhere"),
            "there is no model folder ./nowhere",
            "give a folder with config.json and *.safetensors, or a hub id",
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


def measured(cli: Callable[..., Any], *arguments: str) -> Any:
    """What ``grpoforge eval ARGUMENTS --json`` says."""
    said = cli("eval", *arguments, "--json")
    assert said.code == 0, said.err
    return json.loads(said.out)


LONGER = ("--num-problems", "6")
"""Completions long enough to be right: the model is right on half of the problems."""


def test_every_figure_has_its_uncertainty(cli: Callable[..., Any]) -> None:
    whole = measured(cli, "tiny-math", *LONGER, "--samples", "4")
    names = {f"eval_{name}" for name in ("pass@1", "mean@4", "pass@2", "pass@4", "maj@2", "maj@4")}
    assert set(whole["intervals"]) == names
    for name in names:
        one = whole["intervals"][name]
        assert one["value"] == pytest.approx(whole["metrics"][name], abs=1e-15)
        assert 0 <= one["low"] <= one["value"] <= one["high"] <= 1
        assert one["standard_error"] >= 0
    assert 0 < whole["metrics"]["eval_mean@4"] < 1
    assert whole["metrics"]["eval_mean@4"] <= whole["metrics"]["eval_pass@2"] <= whole["metrics"]["eval_pass@4"]
    assert (whole["samples"], whole["temperatures"]) == (4, [1.0])
    right = {kind: counts["right"] for kind, counts in whole["counts"].items()}
    assert right["greedy"] / 6 == whole["metrics"]["eval_pass@1"]
    assert right["sampled"] / 24 == whole["metrics"]["eval_mean@4"]
    assert {kind: sum(counts.values()) for kind, counts in whole["counts"].items()} == {"greedy": 6, "sampled": 24}
    assert whole["comparison"] is None


def test_one_problem_has_no_standard_error(cli: Callable[..., Any]) -> None:
    one = measured(cli, "tiny-math", "--num-problems", "1")["intervals"]["eval_pass@1"]
    assert one["standard_error"] is None
    assert (one["low"], one["high"]) in [(0.0, pytest.approx(0.975)), (pytest.approx(0.025), 1.0)]


def test_the_k_that_are_asked_for(cli: Callable[..., Any]) -> None:
    intervals = measured(cli, "tiny-math", *FEW, "--samples", "4", "--k", "1,3")["intervals"]
    assert set(intervals) == {"eval_pass@1", "eval_mean@4", "eval_pass@3", "eval_maj@3"}


def test_completions_that_were_cut_are_counted_apart(cli: Callable[..., Any]) -> None:
    whole = measured(cli, "tiny-math", "--num-problems", "4", "--set", "sampler.max_completion_length=2")
    assert whole["counts"] == {
        "greedy": {"right": 0, "wrong": 0, "no answer": 0, "truncated": 4, "not scored": 0},
    }
    assert whole["metrics"]["eval_completions/no_answer_ratio"] == 1.0


def test_a_reward_that_says_nothing_of_answers(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def ends(completions):\n    return [float('#' in c) for c in completions]\n")
    said = cli("eval", "tiny-math", *FEW, "--samples", "2", "--reward", "./mine.py:ends", "--set", "eval.reward=null",
               "--json")  # fmt: skip
    assert said.code == 0, said.err
    assert (
        "reward `ends` declares no `answer_of`: neither majority votes nor answers that cannot be read are counted\n"
        in said.err
    )
    whole = json.loads(said.out)
    assert not [name for name in whole["metrics"] if "maj@" in name or "no_answer" in name]
    assert "no answer" not in whole["counts"]["greedy"]


def test_the_temperature_of_the_samples(cli: Callable[..., Any]) -> None:
    cold = measured(cli, "tiny-math", *LONGER, "--samples", "2", "--temperature", "0.0001")
    hot = measured(cli, "tiny-math", *LONGER, "--samples", "2", "--temperature", "1.5")
    assert (cold["temperatures"], hot["temperatures"]) == ([0.0001], [1.5])
    # Near zero, sampling is greedy; greedy figures never depend on the temperature.
    assert cold["metrics"]["eval_mean@2"] == cold["metrics"]["eval_pass@1"] == hot["metrics"]["eval_pass@1"]
    assert cold["metrics"]["eval_sampled_completions/mean_length"] == cold["metrics"]["eval_completions/mean_length"]


def test_a_temperature_for_a_sampler_that_has_none(refused: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from grpoforge import hookimpl\n"
        "class Fixed:\n"
        "    def __init__(self, *, max_completion_length: int = 8): ...\n"
        "    def sample(self, policy, prompts, group_size, seed): ...\n"
        "    def greedy(self, policy, prompts): ...\n"
        "    def sync(self, policy): ...\n"
        "@hookimpl\n"
        "def register_samplers(register):\n"
        "    register('fixed', Fixed)\n"
    )
    flags = ("--plugin", "mine.py", "--sampler", "fixed", "--samples", "2", "--temperature", "0.5")
    message, hint = refused("eval", "tiny-math", *flags, "--set", "sampler.max_completion_length=9")
    assert message == "sampler `mine:fixed` has no option `temperature` (from --temperature)"
    assert hint == "evaluate with a sampler that has one: `--sampler hf --set sampler.max_completion_length=9`"


def test_a_model_against_itself(cli: Callable[..., Any], model: Callable[..., str]) -> None:
    found = measured(cli, "tiny-math", *LONGER, "--samples", "2", "--compare", model("m"))["comparison"]
    assert (found["a"], found["b"]) == ("tiny-math", "./m")
    assert (found["only_a_right"], found["only_b_right"], found["p_value"]) == (0, 0, 1.0)
    assert found["both_right"] + found["both_wrong"] == 6
    for one in found["differences"].values():
        assert one["a"] == one["b"] and one["a_minus_b"]["value"] == 0.0
    assert found["verdict"].startswith("Greedy, A and B are right on the same problems.")


@pytest.mark.slow
def test_another_model_live_and_from_its_file(
    cli: Callable[..., Any], refused: Callable[..., Any], run: str, tmp_path: Path
) -> None:
    # The run's model has seen two steps and differs; its configuration must not change that of the comparison.
    flags = (*LONGER, "--samples", "2")
    live = measured(cli, "tiny-math", *flags, "--compare", run)
    assert live["comparison"]["b"].endswith(("step-000001", "step-000002"))
    written = measured(cli, live["comparison"]["b"], *flags, "--output", "other.parquet")
    for name, one in live["comparison"]["differences"].items():
        assert one["a"] == pytest.approx(live["metrics"][name], abs=1e-15)
        assert one["b"] == pytest.approx(written["metrics"][name], abs=1e-15)
    stored = measured(cli, "tiny-math", *flags, "--compare", "other.parquet")["comparison"]
    assert stored["b"] == "other.parquet"
    assert {**stored, "b": ""} == {**live["comparison"], "b": ""}
    shorter = ("--set", "sampler.max_completion_length=9", "--temperature", "0.5")
    said = cli("eval", "tiny-math", *flags, *shorter, "--compare", "other.parquet")
    assert "warning: other.parquet was measured with `max_completion_length` 64, and this with 9\n" in said.err
    assert "warning: other.parquet was measured with `temperatures` [1.0], and this with [0.5]\n" in said.err
    assert refused("eval", "tiny-math", "--num-problems", "5", "--compare", "other.parquet") == (
        "other.parquet has other problems: 6 on one side, 5 on the other",
        "compare on the same problems: the same `--dataset`, `--num-problems` and `data.*`",
    )
    assert refused("eval", "tiny-math", *LONGER, "--set", "eval.reward=brevity", "--compare", "other.parquet") == (
        "other.parquet says what is right by `math`, and here `brevity` does",
        "compare by the same reward: `--set eval.reward=NAME`",
    )


def test_the_file_has_every_problem(cli: Callable[..., Any], tmp_path: Path) -> None:
    from pyarrow import parquet

    whole = measured(cli, "tiny-math", *LONGER, "--samples", "2", "--output", "r.parquet")
    rows = parquet.read_table(tmp_path / "r.parquet").to_pylist()
    assert [row["index"] for row in rows] == list(range(6))
    right = [row["greedy_verdict"] == "right" for row in rows]
    assert sum(right) / 6 == whole["metrics"]["eval_pass@1"]
    for row, is_right in zip(rows, right):
        assert row["origin"] == f"tiny-math/test:{row['index'] + 1}"
        assert row["question"] and len(row["problem"]) == 64
        assert row["gold"].endswith(f"#### {row['greedy_answer']}") == is_right
        assert f"#### {row['greedy_answer']}" in row["greedy_completion"]
        assert len(row["samples"]) == 2


def test_a_comparison_on_the_screen(cli: Callable[..., Any], model: Callable[..., str]) -> None:
    said = cli("eval", "tiny-math", *FEW, "--compare", model("m"))
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert "A  tiny-math" in lines and "B  ./m" in lines
    assert lines[-1] == "Greedy, A and B are right on the same problems."
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert ["eval_pass@1", "0.0000", "0.0000", "+0.0000 [-0.6024, +0.6024]"] in cells  # 1 - 0.025^(1/4)
    assert ["eval_pass@1", "0.0000 [0.0000, 0.6024] 0.0000"] in cells


def test_training_reports_the_figures_of_eval(cli: Callable[..., Any], small: Sequence[str]) -> None:
    flags = ("--set", "eval.samples=2", "--set", "sampler.max_completion_length=48", "--set", "data.num_eval=4")
    said = cli("train", *small, *flags, "--set", "checkpoint.every=1", "--output", "run")
    assert said.code == 0, said.err
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if line["kind"] == "eval" and line["step"] == 2]
    found = measured(cli, "run", "--checkpoint", "last")["metrics"]
    assert {"eval_pass@1", "eval_mean@2", "eval_pass@2", "eval_maj@2"} <= set(found)
    assert {name: value for name, value in last.items() if name.startswith("eval_")} == found
