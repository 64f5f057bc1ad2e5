"""``--dry-run``: the plan as a configuration file, without touching a weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpoforge.yaml_source import parse_yaml


def test_what_it_prints_is_a_configuration_that_prints_the_same(cli: Callable[..., Any], tmp_path: Path) -> None:
    first = cli(
        "train",
        "--dry-run",
        "--reward",
        "math",
        "--reward",
        "brevity:0.3",
        "--set",
        "optim.learning_rate=1e-5",
        "--kl",
        "k1",
        "--set",
        'data.system_prompt="1e-5 \\e[31m\\u202e问"',
        "--set",
        "data.num_eval=16",
    )
    assert first.code == 0, first.err
    assert not {"\x1b", "\u202e"} & set(first.out)
    (tmp_path / "x.yaml").write_text(first.out)
    second = cli("train", "x.yaml", "--dry-run")
    assert (second.code, second.out) == (0, first.out)
    values = parse_yaml(first.out, "x.yaml")
    assert values["optim"]["learning_rate"] == 1e-5
    assert values["data"]["system_prompt"] == "1e-5 \x1b[31m\u202e问"
    assert [(part["name"], part["weight"]) for part in values["rewards"]] == [("math", 1.0), ("brevity", 0.3)]
    assert list(tmp_path.iterdir()) == [tmp_path / "x.yaml"]


def test_the_plan_of_a_step(cli: Callable[..., Any]) -> None:
    said = cli(
        "train",
        "--dry-run",
        "--max-steps",
        "3",
        "--set",
        "batch={prompts_per_step: 4, completions_per_prompt: 6, minibatch_size: 8, micro_batch_size: 4, epochs: 2}",
        "--set",
        "sampler.max_completion_length=16",
        "--set",
        "kl.beta=0",
    )
    plan = [line for line in said.out.splitlines() if line.startswith("# ")]
    assert plan[:4] == [
        "# steps         3, 6 optimizer steps each: 18",
        "# rollouts      4 prompts x 6 completions = 24 rows of at most 16 tokens",
        "# update        2 passes, minibatch 8, micro-batch 4",
        "# rewards       math x1, brevity x0.1 (only where math is right)",
    ]
    assert "# KL            none (beta is 0)" in plan


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "one kernel (grpo_loss)"),
        (("--kl", "k1", "--set", "loss.epsilon_high=0.28"), "one kernel (grpo_loss)"),
        (("--loss", "cispo"), "composed of its parts: its loss has no fused kernel"),
        (("--kl", "full"), "composed of its parts: its KL estimator has no fused kernel"),
        (("--set", "entropy.coef=0.01"), "composed of its parts: it has an entropy bonus"),
    ],
)
def test_the_path_of_the_objective(cli: Callable[..., Any], flags: tuple[str, ...], said: str) -> None:
    plan = cli("train", "--dry-run", *flags)
    assert plan.code == 0, plan.err
    assert [line for line in plan.out.splitlines() if line.startswith("# objective")] == [f"# objective     {said}"]


def test_no_weight_is_read(
    cli: Callable[..., Any], model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = model("m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"not weights")
    import transformers

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    said = cli("train", "--dry-run", "--model", name)
    assert said.code == 0, said.err
    assert parse_yaml(said.out, "plan")["model"]["name"] == "./m"


def test_what_a_plugin_prints_is_not_part_of_the_plan(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "print('hello')\ndef score(completions):\n    return [0.0 for _ in completions]\n"
    )
    said = cli("train", "--dry-run", "--reward", "./mine.py:score")
    assert said.code == 0, said.err
    assert "hello" not in said.out
    assert "hello" in said.err


def test_one_is_singular(cli: Callable[..., Any]) -> None:
    one_update = "batch={prompts_per_step: 4, completions_per_prompt: 2, minibatch_size: 8, micro_batch_size: 8}"
    said = cli("train", "--dry-run", "--max-steps", "3", "--set", one_update)
    assert "# steps         3, 1 optimizer step each: 3\n" in said.out
    assert "# update        1 pass, minibatch 8, micro-batch 8\n" in said.out


def test_parts_are_built(refused: Callable[..., Any]) -> None:
    message, hint = refused("train", "--dry-run", "--set", "sampler.temperature=-1")
    assert "temperature" in message
    assert hint


def test_a_model_path_to_nothing(refused: Callable[..., Any]) -> None:
    for path in ("./nowhere", "/nowhere/at/all", "~nobody/model"):
        assert refused("train", "--dry-run", "--model", path) == (
            f"there is no model folder {path} (from --model)",
            "give a folder with config.json and *.safetensors, or a hub id",
        )


@pytest.mark.parametrize("flag", [("--reward", "mth"), ("--dataset", "nope.jsonl"), ("--set", "sampler.x=1")])
def test_mistakes_are_found(refused: Callable[..., Any], flag: tuple[str, str]) -> None:
    message, hint = refused("train", "--dry-run", *flag)
    assert message
    assert hint


def test_plugin_flags_come_on_top_of_the_files_of_the_configuration(cli: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / f"{name}.py").write_text(
            "from grpoforge import hookimpl\n\n\n@hookimpl\ndef register_rewards(register):\n"
            f"    register({name!r}, lambda completions: [1.0] * len(completions))\n"
        )
    (tmp_path / "mine.yaml").write_text("plugins: [first.py]\nrewards: [{name: first}, {name: second}]\n")
    said = cli("train", "mine.yaml", "--plugin", "second.py", "--plugin", "second.py", "--dry-run")
    assert said.code == 0, said.err
    plan = parse_yaml(said.out, "the plan")
    assert [Path(file).name for file in plan["plugins"]] == ["first.py", "second.py"]


def test_options_of_a_reward_of_a_file(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "def politeness(completions, *, word: str = 'please'):\n    return [float(word in t) for t in completions]\n"
    )
    said = cli("train", "--dry-run", "--reward", "./rewards.py:politeness", "--set", "rewards.politeness.word=let")
    assert said.code == 0, said.err
    (reward,) = parse_yaml(said.out, "the plan")["rewards"]
    assert (Path(reward["name"]).name, reward["word"]) == ("rewards.py:politeness", "let")


def test_a_stream_takes_all_of_its_steps_whatever_epochs_say(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' * 40)
    said = cli(
        "train", "--dry-run", "--dataset", "rows.jsonl", "--max-steps", "100", "--set", "data.streaming=true",
        "data.num_eval=4", "epochs=3",
    )  # fmt: skip
    assert "# steps         100, 2 optimizer steps each: 200" in said.out.splitlines()
    assert "`epochs` is 3, and nobody counts the rows of a stream: the run takes all of its 100 steps" in said.err
