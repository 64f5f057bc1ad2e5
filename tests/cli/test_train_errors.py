"""Flags, files, plugins, rewards and output folders that a user gets wrong in ``grpoforge train``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from grpoforge.yaml_source import recipe_names

Refused = Callable[..., tuple[str, str]]

FLAGS = {
    "unknown reward": (
        ("--reward", "mth"),
        "unknown reward `mth` (from --reward)",
        "did you mean `math`?",
    ),
    "weight that is no number": (
        ("--reward", "math:heavy"),
        "the weight in `math:heavy` is `heavy`, which is no number (from --reward)",
        "write for instance `--reward math:0.5`",
    ),
    "weight that is empty": (
        ("--reward", "math:"),
        "the weight in `math:` is ``, which is no number (from --reward)",
        "write for instance `--reward math:0.5`",
    ),
    "weight that is infinite": (
        ("--reward", "math:-inf"),
        "the weight in `--reward math:-inf` is `-inf`",
        "a weight is a finite number, e.g., 0.5",
    ),
    "weight that is not a number at all": (
        ("--reward", "math:nan"),
        "the weight in `--reward math:nan` is `nan`",
        "a weight is a finite number, e.g., 0.5",
    ),
    "weight without a reward": (
        ("--reward", ":0.5"),
        "`--reward :0.5` is not NAME or NAME:WEIGHT",
        "write for instance `--reward brevity:0.1`",
    ),
    "reward twice": (
        ("--reward", "math", "--reward", "grpoforge:math:2"),
        "the reward `grpoforge:math` is given twice (from --reward)",
        "give it once, with the weight you want",
    ),
    "reward file that is missing": (
        ("--reward", "./rewards.py:score"),
        "the plugin file `./rewards.py` does not exist (from --reward)",
        "check the path",
    ),
    "reward file without a function": (
        ("--reward", "./rewards.py"),
        "`--reward ./rewards.py` names no function of the file",
        "write for instance `--reward ./rewards.py:my_func`",
    ),
    "reward file with a weight in place of a function": (
        ("--reward", "./rewards.py:0.5"),
        "`--reward ./rewards.py:0.5` names no function of the file",
        "write for instance `--reward ./rewards.py:my_func`",
    ),
    "weight of a file's function": (
        ("--reward", "./rewards.py:score:heavy"),
        "the weight in `--reward ./rewards.py:score:heavy` is `heavy`, which is no number",
        "write for instance `--reward ./rewards.py:my_func:0.5`",
    ),
    "unknown sampler": (("--sampler", "hff"), "unknown sampler `hff` (from --sampler)", "did you mean `hf`?"),
    "unknown advantage": (
        ("--advantage", "groups"),
        "unknown advantage `groups` (from --advantage)",
        "did you mean `group`?",
    ),
    "unknown loss": (("--loss", "clap"), "unknown loss `clap` (from --loss)", "did you mean `clip`?"),
    "unknown tracker": (
        ("--set", "trackers=[{name: jsonll}]"),
        "unknown tracker `jsonll` (from --set trackers=[{name: jsonll}])",
        "did you mean `jsonl`?",
    ),
    "unknown evaluation reward": (
        ("--set", "eval.reward=maths"),
        "unknown reward `maths` (from --set eval.reward=maths)",
        "did you mean `math`?",
    ),
    "unknown recipe": (("tiny-maths",), "unknown recipe `tiny-maths`", "did you mean `tiny-math`?"),
    "file without .yaml": (
        ("conf/mine.json",),
        "unknown recipe `conf/mine.json`",
        f"a configuration file ends in .yaml; recipes are {', '.join(recipe_names())}",
    ),
    "missing file": (("mine.yaml",), "there is no file mine.yaml", "check the path, or name a recipe"),
    "unknown dataset": (
        ("--dataset", "tiny-maths"),
        "unknown dataset `tiny-maths` (from --dataset)",
        "did you mean `tiny-math`?",
    ),
    "missing dataset file": (
        ("--dataset", "trian.jsonl"),
        "there is no dataset at trian.jsonl (from --dataset)",
        "check the path (`--dataset FILE`)",
    ),
    "unknown option": (
        ("--set", "sampler.temprature=1"),
        "unknown option `temprature` of sampler `grpoforge:native`; it takes: temperature, max_completion_length, "
        "top_p, top_k, min_p, batch_size, stop, decoder (from --set sampler.temprature=1)",
        "did you mean `temperature`?",
    ),
    "option of the wrong type": (
        ("--set", "sampler.temperature=hot"),
        "option `temperature` of sampler `grpoforge:native`: input should be a valid number, got `'hot'` "
        "(from --set sampler.temperature=hot)",
        "`temperature` is `float`: logits are divided by it before softmax",
    ),
    "option of a reward": (
        ("--set", "rewards.math.extraction=loose"),
        "option `extraction` of reward `grpoforge:math`: input should be 'strict' or 'lenient', got `'loose'` "
        "(from --set rewards.math.extraction=loose)",
        "`extraction` is `Literal['strict', 'lenient']`: strict: the answer must be stated; lenient: else the last "
        "number",
    ),
    "option of a dataset": (
        ("--set", "data.options.num_rows=5"),
        "unknown option `num_rows` of dataset `grpoforge:tiny-math`; it takes: num_train, num_test, seed "
        "(from --set data.options.num_rows=5)",
        "did you mean `num_test`?",
    ),
    "gate that is not used": (
        ("--set", "rewards.brevity.gate=format"),
        "reward `brevity` is gated on `format`, which the run does not use (from --set rewards.brevity.gate=format)",
        "did you mean `math`?",
    ),
    "unknown key": (
        ("--set", "optim.learning_rat=1"),
        "unknown key `optim.learning_rat` (from --set optim.learning_rat=1)",
        "did you mean `learning_rate`?",
    ),
    "override without =": (
        ("--set", "max_steps"),
        "`--set max_steps` is not KEY=VALUE",
        "write for instance `--set optim.learning_rate=1e-5`",
    ),
    "override that comes too late": (
        ("--set", "recipe=other"),
        "`--set recipe=other` would come too late",
        "name the recipe first: `grpoforge train other`",
    ),
    "override that is no YAML": (
        ("--set", "rewards=["),
        "--set rewards:1: expected the node content, but found '<stream end>'",
        "correct the YAML",
    ),
    "group of one": (
        ("--set", "batch.minibatch_size=24", "--set", "batch.completions_per_prompt=1"),
        "`batch.completions_per_prompt` is 1 (from --set batch.completions_per_prompt=1): "
        "a group of one has no baseline",
        "use at least 2 (8 is common)",
    ),
    "minibatch that does not divide": (
        ("--set", "batch={prompts_per_step: 32, completions_per_prompt: 8}", "--set", "batch.minibatch_size=100"),
        "`batch.minibatch_size` is 100 (from --set batch.minibatch_size=100), which does not divide "
        "32 prompts x 8 completions = 256",
        "use `--set batch.minibatch_size=64` or `--set batch.minibatch_size=128`",
    ),
    "micro-batch larger than a minibatch": (
        ("--set", "batch={prompts_per_step: 32, minibatch_size: 128}", "--set", "batch.micro_batch_size=129"),
        "`batch.micro_batch_size` is 129 (from --set batch.micro_batch_size=129), more than the 128 completions of a "
        "minibatch",
        "use at most 128",
    ),
    "steps": (
        ("--max-steps", "0"),
        "`max_steps` is `0` (from --max-steps): it must be greater than or equal to 1",
        "`max_steps`: Steps to take at most; by default those of `epochs`.",
    ),
    "unknown flag": (
        ("--rewrd", "math"),
        "no such option: --rewrd (Possible options: --reward, --seed)",
        "see `grpoforge train --help`",
    ),
    "flag of the wrong type": (
        ("--seed", "x"),
        "invalid value for '--seed': Input should be a valid integer, unable to parse string as an integer",
        "see `grpoforge train --help`",
    ),
    "missing plugin file": (("--plugin", "mine.py"), "the plugin file `./mine.py` does not exist", "check the path"),
    "missing model folder": (
        ("--model", "./nowhere"),
        "there is no model folder ./nowhere",
        "give a folder with config.json and *.safetensors, or a hub id",
    ),
    "completion as long as the context": (
        ("--set", "sampler.max_completion_length=256"),
        "`sampler.max_completion_length` is 256, and the context of tiny-math has 256 tokens",
        "use less than 256",
    ),
    "resume without a run": (("--resume",), "there is no run in runs/ to resume", "name one: `--resume DIR`"),
    "resume of a folder that is no run": (
        ("--resume", "nowhere"),
        "nowhere holds no run (there is no run.json)",
        "name a folder with a run.json; . has none below it",
    ),
    "resume with an output": (
        ("--resume", "--output", "elsewhere"),
        "`--output elsewhere` does not go with `--resume`: a run goes on where it is, as it was configured",
        "leave it out; single keys change with `--set`",
    ),
    "resume with a recipe": (
        ("tiny-math", "--resume"),
        "`tiny-math` does not go with `--resume`: a run goes on where it is, as it was configured",
        "leave it out; single keys change with `--set`",
    ),
    "resume with a dry run": (
        ("--resume", "--dry-run"),
        "`--dry-run` does not go with `--resume`: a run goes on where it is, as it was configured",
        "leave it out; single keys change with `--set`",
    ),
}


@pytest.mark.parametrize(("arguments", "message", "hint"), FLAGS.values(), ids=FLAGS.keys())
def test_flags(refused: Refused, arguments: Sequence[str], message: str, hint: str) -> None:
    assert refused("train", *arguments) == (message, hint)


@pytest.mark.parametrize("name", ["./nowhere", "rewards/first"])
def test_a_reward_of_a_file_in_a_missing_folder(refused: Refused, name: str) -> None:
    message, _ = refused("train", "--reward", f"{name}.py:score")
    assert message == f"the plugin file `./{name.removeprefix('./')}.py` does not exist (from --reward)"


FILES = {
    "bad syntax": (
        b"a: 1\nb: [",
        "mine.yaml:2: expected the node content, but found '<stream end>'",
        "correct the YAML",
    ),
    "alias": (b"a: &x [1]\nb: *x", "mine.yaml:2: aliases (`*x`) are not allowed", "write the value out"),
    "tag": (
        b"a: !!python/object/apply:os.system [ls]",
        "mine.yaml:1: tags (`tag:yaml.org,2002:python/object/apply:os.system`) are not allowed",
        "leave the tag out",
    ),
    "key twice": (b"seed: 1\n\nseed: 2", "mine.yaml:3: key `seed` stands twice", "correct the YAML"),
    "key that is no text": (b"1: 2", "mine.yaml:1: key 1 is not text", "correct the YAML"),
    "deep": (b"a: " + b"[" * 200 + b"]" * 200, "mine.yaml:1: nested deeper than 20 levels", "flatten it"),
    "list": (b"- a\n- b", "mine.yaml holds a list, not keys and values", "write lines such as `max_steps: 40`"),
    "text": (b"hello", "mine.yaml holds a str, not keys and values", "write lines such as `max_steps: 40`"),
    "binary": (b"\x80\x81", "mine.yaml is not text: invalid start byte at byte 0", "give a YAML file in UTF-8"),
    "NUL": (b"a: 1\nb: \0", "mine.yaml:2: character U+0000 cannot stand in YAML", "remove it"),
    "large": (b"a" * 1_000_001, "mine.yaml has 1000001 characters", "a configuration has at most 1000000"),
    "recipe": (b"recipe: tiny", "unknown recipe `tiny` (from mine.yaml)", "did you mean `tiny-math`?"),
    "unknown key": (b"max_step: 3", "unknown key `max_step` (from mine.yaml)", "did you mean `max_steps`?"),
    "component as text": (
        b"sampler: hf",
        '`sampler` is `"hf"` (from mine.yaml): it holds keys and values',
        "set one of its keys, e.g., `sampler.name`",
    ),
    "reward of a file": (b"rewards: [{name: mth}]", "unknown reward `mth` (from mine.yaml)", "did you mean `math`?"),
    "option": (
        b"loss: {epsilon: 0.1}",
        "unknown option `epsilon` of loss `grpoforge:clip`; it takes: epsilon_low, epsilon_high, delta, dual_clip "
        "(from mine.yaml)",
        "did you mean `epsilon_low`?",
    ),
    "number as text": (
        b"optim: {learning_rate: '1e-3'}",
        '`optim.learning_rate` is `"1e-3"` (from mine.yaml): it must be a valid number',
        "`learning_rate`: Peak learning rate.",
    ),
    "no rewards": (b"rewards: []", "a run needs at least one reward (from mine.yaml)", "name one with `--reward NAME`"),
}


@pytest.mark.parametrize(("content", "message", "hint"), FILES.values(), ids=FILES.keys())
def test_files(refused: Refused, tmp_path: Path, content: bytes, message: str, hint: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    assert refused("train", "mine.yaml") == (message, hint)


def test_the_nearest_file_is_suggested(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 1")
    assert refused("train", "mien.yaml") == ("there is no file mien.yaml", "its folder: did you mean `mine.yaml`?")


def test_a_folder_is_no_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").mkdir()
    assert refused("train", "mine.yaml") == (
        "cannot read mine.yaml: Is a directory",
        "give a YAML file that you may read",
    )


def test_an_output_that_holds_a_run(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "run.json").write_text("{}")
    assert refused("train", "--output", "first") == (
        "output directory first already holds a run (step 0)",
        "continue it with `grpoforge train --resume first`, or choose another --output",
    )
    assert [path.name for path in (tmp_path / "first").iterdir()] == ["run.json"]


def test_an_output_that_holds_something_else(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    assert refused("train", "--output", "thesis") == (
        "output directory thesis is not empty and holds no run (it has 'thesis.tex')",
        "choose another --output, or empty the folder",
    )


def test_an_output_that_fails_later_is_left_as_it_was(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused("train", "--output", "empty", "--model", "./nowhere")
    refused("train", "--output", "new", "--model", "./nowhere")
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "empty").iterdir()] == []


def test_a_plugin_that_does_not_import(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import grpoforge\nimport not_there_at_all\n")
    assert refused("train", "--plugin", "mine.py") == (
        "cannot import the plugin `./mine.py`: line 2: ModuleNotFoundError: No module named 'not_there_at_all'",
        "install `not_there_at_all` in this environment, or correct the import",
    )


def test_two_plugins_with_one_name(refused: Refused, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            "from grpoforge import hookimpl\n@hookimpl\ndef register_rewards(register): pass\n"
        )
    assert refused("train", "--plugin", "a/mine.py", "--plugin", "b/mine.py") == (
        "two plugins have the name `mine`: `./a/mine.py` and `./b/mine.py`",
        "leave one out, or rename the file of a local plugin",
    )


def test_two_plugins_with_one_reward(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from grpoforge import hookimpl\n"
        "def math(completions):\n    return [0.0 for _ in completions]\n"
        "@hookimpl\ndef register_rewards(register):\n    register('math', math)\n"
    )
    message, hint = refused("train", "--plugin", "mine.py", "--set", "eval.reward=mine:math")
    assert message.splitlines()[0] == "two plugins register the reward `math` (from recipe tiny-math):"
    assert [line.split()[0] for line in message.splitlines()[1:]] == ["grpoforge:math", "mine:math"]
    assert hint == "write one of them in full, e.g., `grpoforge:math`"


def test_what_a_plugin_raises_while_registering(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from grpoforge import hookimpl\n@hookimpl\ndef register_rewards(register):\n    raise OSError('\x1b[2Jgone')\n"
    )
    message, _ = refused("train", "--plugin", "mine.py")
    assert message == "plugin `mine` (./mine.py) failed to register: line 4: OSError: \\x1b[2Jgone"


REWARD = "def score(completions):\n    {}\n"
BROKEN_REWARDS = {
    "raises": (
        "raise ValueError('bad \x1b[31m\u202e\\nrow')",
        "reward `score` raised ValueError: bad \\x1b[31m\\u202e (FILE:2)",
        "fix the reward, or pass `--set scoring.on_error=skip` to leave its rows unscored",
    ),
    "exits": (
        "raise SystemExit(3)",
        "reward `score` raised SystemExit: 3 (FILE:2)",
        "fix the reward, or pass `--set scoring.on_error=skip` to leave its rows unscored",
    ),
    "wrong length": (
        "return [1.0]",
        "reward `score` returned 1 values for 2 completions",
        "return one float, or None for 'not scored', per completion",
    ),
    "wrong value": (
        "return ['\x1b[2J' for _ in completions]",
        "reward `score` returned '\\x1b[2J' (str) for row 0 (tiny-math/test:1)",
        "return a finite number, or None for 'not scored'",
    ),
}


@pytest.mark.parametrize(("body", "message", "hint"), BROKEN_REWARDS.values(), ids=BROKEN_REWARDS.keys())
def test_a_reward_that_breaks_at_once_leaves_no_run(
    refused: Refused, tmp_path: Path, small: Sequence[str], body: str, message: str, hint: str
) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(REWARD.format(body))
    said = refused("train", "--reward", "./rewards.py:score", *small)
    assert said == (message.replace("FILE", str(file)), hint)


def test_settings_quoted_in_messages_are_made_safe(refused: Refused) -> None:
    message, _ = refused("train", "--reward", "a\x1b[31m\u202eb")
    assert message == "unknown reward `a\\x1b[31m\\u202eb` (from --reward)"


def test_skipping_a_broken_reward_is_said_each_time(
    cli: Callable[..., Any], tmp_path: Path, small: Sequence[str]
) -> None:
    (tmp_path / "rewards.py").write_text(REWARD.format("return ['x' for _ in completions]"))
    said = cli("train", "--reward", "./rewards.py:score", *small, "--set", "scoring.on_error=skip")
    assert said.code == 0, said.err
    assert (
        "warning: reward `score` returned 'x' (str) for row 0 (tiny-math/test:1); the row stays unscored\n" in said.err
    )
