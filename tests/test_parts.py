"""Names to parts: rewards, gates, options with their origin, rows, and what a reward is called with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grpoforge.config import Config, Origins, Part, RewardPart
from grpoforge.errors import ConfigError, GrpoforgeError, PluginError
from grpoforge.layers import build
from grpoforge.parts import (
    TRL_DATA,
    ChosenReward,
    bind_reward,
    choose,
    choose_measured,
    choose_rewards,
    resolve,
)
from grpoforge.plugins import PluginHost, load_plugins
from grpoforge.problems import load_rows

FIXTURES = Path(__file__).with_name("fixtures")
TRL_FILE = FIXTURES / "rewards" / "trl_style.py"


@pytest.fixture
def host() -> PluginHost:
    return load_plugins()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged, also after the command line has taken the logger over."""
    monkeypatch.setattr(logging.getLogger("grpoforge"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="grpoforge"):
        yield caplog


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)

    def write(count: int, name: str = "rows.jsonl", columns: str = "") -> str:
        lines = [f'{{"question": "q{n}", "answer": "{n}"{columns}}}' for n in range(count)]
        (tmp_path / name).write_text("\n".join(lines))
        return name

    return write


def config(**values: Any) -> Config:
    return build([("mine.yaml", values)])


def rewards(host: PluginHost, *parts: RewardPart) -> list[ChosenReward]:
    return list(choose_rewards(parts, host))


def refusal(function: Any, *arguments: Any, **options: Any) -> tuple[str, str]:
    with pytest.raises(GrpoforgeError) as caught:
        function(*arguments, **options)
    return caught.value.message, caught.value.hint


def test_a_run_resolves(host: PluginHost) -> None:
    parts = resolve(config(data={"num_eval": 7, "options": {"num_train": 30}}), host)
    assert [reward.describe() for reward in parts.rewards] == ["math x1"]
    assert (parts.sampler.component.id, parts.kl.component.id) == ("grpoforge:native", "grpoforge:k3")
    assert [name for name, _ in parts.trackers] == ["console", "jsonl", "tensorboard", "rollouts"]
    assert (len(parts.train_rows), len(parts.eval_rows)) == (30, 7)


def test_weights_and_gates_come_from_the_registration(host: PluginHost) -> None:
    both = rewards(host, RewardPart(name="math"), RewardPart(name="brevity"))
    assert [reward.describe() for reward in both] == ["math x1", "brevity x0.1 (only where math is right)"]
    alone = rewards(host, RewardPart(name="brevity", weight=2.0))
    assert [reward.describe() for reward in alone] == ["brevity x2 (not gated on math: it pays for wrong answers too)"]


def test_a_gate_can_be_set_and_taken_away(host: PluginHost) -> None:
    parts = [RewardPart(name="math"), RewardPart(name="format", gate="math"), RewardPart(name="brevity", gate=None)]
    assert [reward.gate for reward in rewards(host, *parts)] == [None, "math", None]


def test_a_gate_that_is_not_there(host: PluginHost) -> None:
    assert refusal(rewards, host, RewardPart(name="math"), RewardPart(name="format", gate="maths")) == (
        "reward `format` is gated on `maths`, which the run does not use",
        "did you mean `math`?",
    )


def test_a_reward_given_twice_by_two_names(host: PluginHost) -> None:
    assert refusal(rewards, host, RewardPart(name="math"), RewardPart(name="grpoforge:math")) == (
        "the reward `grpoforge:math` is given twice",
        "give it once, with the weight you want",
    )


def test_rewards_of_one_name_are_told_apart_by_their_plugin(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def math(completions):\n    return [0.0 for _ in completions]\n")
    chosen = rewards(load_plugins(), RewardPart(name="grpoforge:math"), RewardPart(name=f"{file}:math"))
    assert [reward.name for reward in chosen] == ["grpoforge:math", "mine:math"]


def test_a_file_is_loaded_once_however_often_it_is_named(host: PluginHost) -> None:
    part = RewardPart(name=f"{TRL_FILE}:my_func")
    first, second = rewards(host, part)[0], rewards(host, part)[0]
    assert first.chosen.component is second.chosen.component
    assert first.name == "my_func"


def test_options_of_a_rewards_file(tmp_path: Path, host: PluginHost) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(completions, *, scale: float = 1.0):\n    return [scale] * len(completions)\n"
    )
    name = f"{tmp_path}/mine.py:score"
    (chosen,) = rewards(host, RewardPart.model_validate({"name": name, "scale": 3.0}))
    assert bind_reward(chosen, ()).function(completions=["a"]) == [3.0]
    message, _ = refusal(rewards, host, RewardPart.model_validate({"name": name, "scale": "x"}))
    assert message == "option `scale` of reward `mine:score`: input should be a valid number, got `'x'`"


def test_the_origin_of_an_option_and_of_a_name(host: PluginHost) -> None:
    origins = Origins({("sampler",): "recipe x", ("sampler", "temperature"): "mine.yaml"})

    def choose_sampler(name: str, **options: Any) -> None:
        choose("sampler", Part.model_validate({"name": name, **options}), host, origins, ("sampler",))

    assert refusal(choose_sampler, "hff") == ("unknown sampler `hff` (from recipe x)", "did you mean `hf`?")
    assert refusal(choose_sampler, "hf", temperature="x")[0].endswith("got `'x'` (from mine.yaml)")
    assert refusal(choose_sampler, "hf", top_q=1)[0].endswith("batch_size (from recipe x)")


def test_errors_keep_their_class(host: PluginHost) -> None:
    with pytest.raises(PluginError):
        choose("loss", Part(name="nope"), host)
    with pytest.raises(ConfigError):
        choose("loss", Part.model_validate({"name": "clip", "nope": 1}), host)


def test_what_says_that_a_completion_is_right(host: PluginHost) -> None:
    measured, right = choose_measured(config(rewards=[{"name": "format"}, {"name": "math"}]), host)
    assert ([one.name for one in measured], right.name) == (["format", "math"], "format")
    measured, right = choose_measured(config(rewards=[{"name": "format"}], eval={"reward": "math"}), host)
    assert ([(one.name, one.weight) for one in measured], right.name) == ([("format", 0.2), ("math", 0.0)], "math")
    for name in ("math", "grpoforge:math"):
        measured, right = choose_measured(config(rewards=[{"name": "math"}], eval={"reward": name}), host)
        assert ([one.name for one in measured], right.name) == (["math"], "math")


def test_a_rewards_file_can_be_what_is_right(host: PluginHost) -> None:
    values = config(rewards=[{"name": "math"}, {"name": f"{TRL_FILE}:my_func"}], eval={"reward": "my_func"})
    measured, right = choose_measured(values, host)
    assert (len(measured), right.name) == (2, "my_func")


def test_rows_are_held_out_of_a_file(host: PluginHost, file: Callable[..., str], logged: Any) -> None:
    values = config(data={"dataset": file(40), "num_eval": 8})
    train, held = load_rows(values, host, ())
    assert (len(train), len(held)) == (32, 8)
    assert logged.messages == []


def test_at_most_half_is_held_out_and_it_is_said(host: PluginHost, file: Callable[..., str], logged: Any) -> None:
    train, held = load_rows(config(data={"dataset": file(50)}), host, ())
    assert (len(train), len(held)) == (25, 25)
    assert logged.messages == [
        "holding out 25 of the 50 problems of rows.jsonl for evaluation, at most half (`data.num_eval` is 512)"
    ]


def test_a_dataset_smaller_than_a_step_is_used_and_it_is_said(
    host: PluginHost, file: Callable[..., str], logged: Any
) -> None:
    load_rows(config(data={"dataset": file(4), "num_eval": 1}), host, ())
    assert logged.messages == [
        "rows.jsonl leaves 3 to train on, fewer than the 16 prompts of a step: problems repeat within a step"
    ]


def test_an_evaluation_file_of_its_own(host: PluginHost, file: Callable[..., str]) -> None:
    values = config(data={"dataset": file(20), "eval_dataset": file(9, "test.jsonl"), "num_eval": 5})
    train, held = load_rows(values, host, ())
    assert (len(train), [row.origin for row in held]) == (20, [f"test.jsonl:{n}" for n in range(1, 6)])


def test_a_column_under_a_name_of_the_runs_own_data(host: PluginHost, file: Callable[..., str], logged: Any) -> None:
    load_rows(config(data={"dataset": file(40, columns=', "completions": "x"'), "num_eval": 8}), host, ())
    assert logged.messages == [
        "rows.jsonl has a column `completions`, which rewards cannot read: under that name they get the run's own "
        "data; rename it with `--set data.rename.completions=NAME`"
    ]


def bound(host: PluginHost, function: str, *columns: str) -> tuple[str, ...]:
    return bind_reward(rewards(host, RewardPart(name=f"{TRL_FILE}:{function}"))[0], columns).data


def test_a_trl_reward_gets_every_column(host: PluginHost) -> None:
    assert bound(host, "my_func", "question", "answer") == (*TRL_DATA, "answer", "question")


def test_an_ordinary_reward_gets_what_it_asks_for(host: PluginHost, tmp_path: Path) -> None:
    assert bound(host, "without_kwargs", "question", "answer") == ("completions", "answer")
    (tmp_path / "mine.py").write_text("def score(completions, hint=None):\n    return [0.0] * len(completions)\n")
    (chosen,) = rewards(host, RewardPart(name=f"{tmp_path}/mine.py:score"))
    assert bind_reward(chosen, ("question",)).data == ("completions",)
    assert bind_reward(chosen, ("hint",)).data == ("completions", "hint")
