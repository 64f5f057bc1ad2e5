"""Recipe < file < ``--set`` < flags: what wins, what stays, and what a mistake is told."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpoforge.config import Config
from grpoforge.errors import ConfigError
from grpoforge.layers import build
from grpoforge.yaml_source import as_mapping, parse_override, parse_yaml

TINY = (
    "recipe tiny-math",
    {
        "recipe": "tiny-math",
        "rewards": [{"name": "math", "weight": 1.0}, {"name": "brevity", "weight": 0.1}],
        "sampler": {"name": "hf", "temperature": 1.0, "max_completion_length": 64},
        "loss": {"name": "clip", "epsilon_low": 0.2},
        "kl": {"name": "k3", "beta": 0.01},
        "optim": {"warmup_steps": 2},
        "max_steps": 40,
    },
)


def refusal(*layers: tuple[str, Any]) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        build([TINY, *layers])
    return caught.value.message, caught.value.hint


def with_sets(*texts: str) -> Config:
    return build([TINY, *((f"--set {text}", parse_override(text)) for text in texts)])


def test_later_layers_win() -> None:
    config = build([TINY, ("mine.yaml", {"seed": 1, "epochs": 2}), ("--set seed=3", {"seed": 3})])
    assert (config.seed, config.epochs, config.max_steps) == (3, 2, 40)


def test_sections_merge_key_by_key() -> None:
    config = with_sets("optim.learning_rate=0.5")
    assert (config.optim.learning_rate, config.optim.warmup_steps) == (0.5, 2)


def test_null_takes_a_value_back() -> None:
    assert with_sets("max_steps=").max_steps is None


def test_options_of_a_kept_component_stay() -> None:
    assert with_sets("sampler.name=hf", "sampler.temperature=0.7").sampler.options == {
        "temperature": 0.7,
        "max_completion_length": 64,
    }


def test_another_component_starts_afresh() -> None:
    # All but the length of a completion, which belongs to the task.
    assert with_sets("sampler.name=paired").sampler.options == {"max_completion_length": 64}
    assert with_sets("loss={name: cispo, epsilon_high: 3}").loss.options == {"epsilon_high": 3}


def test_the_weight_of_the_kl_term_outlives_its_estimator() -> None:
    """It belongs to the run: comparing k1 with k3 must not change it from 0.01 to the default."""
    config = build([TINY, ("--kl", {"kl": {"name": "k1"}})])
    assert (config.kl.name, config.kl.beta, config.kl.options) == ("k1", 0.01, {})


def test_one_reward_is_changed_by_name() -> None:
    config = with_sets("rewards.brevity.weight=0.2", "rewards.math.extraction=lenient")
    assert [(part.name, part.weight, part.options) for part in config.rewards] == [
        ("math", 1.0, {"extraction": "lenient"}),
        ("brevity", 0.2, {}),
    ]


def test_a_list_chooses_rewards_and_keeps_what_was_said_about_them() -> None:
    config = build(
        [
            TINY,
            ("--set", parse_override("rewards.brevity.weight=0.2")),
            ("--reward", {"rewards": [{"name": "brevity"}]}),
        ]
    )
    assert [(part.name, part.weight) for part in config.rewards] == [("brevity", 0.2)]


def test_trackers_can_be_changed_by_name_in_a_recipe_that_names_none() -> None:
    config = with_sets("trackers.console.sample_every=3")
    assert [part.name for part in config.trackers] == ["console", "jsonl", "tensorboard", "rollouts"]
    assert config.trackers[0].options == {"sample_every": 3}


def test_a_reward_that_stands_twice_is_kept_for_the_error() -> None:
    twice = {"rewards": [{"name": "math"}, {"name": "math"}]}
    config = build([TINY, ("mine.yaml", twice), ("--set", {"rewards": {"math": {"weight": 2.0}}})])
    assert [part.weight for part in config.rewards] == [2.0, 2.0]


def test_lora_can_be_given_key_by_key() -> None:
    config = with_sets("model.lora.r=4")
    assert config.model.lora is not None
    assert (config.model.lora.r, config.model.lora.alpha) == (4, 32)


def test_origins() -> None:
    config = build(
        [TINY, ("mine.yaml", {"sampler": {"temperature": 2.0}}), ("--reward", {"rewards": [{"name": "math"}]})]
    )
    assert config.origins.of("sampler", "temperature") == " (from mine.yaml)"
    assert config.origins.of("sampler", "max_completion_length") == " (from recipe tiny-math)"
    assert config.origins.of("rewards", "math", "name") == " (from --reward)"
    assert config.origins.of("rewards", "math", "weight") == " (from recipe tiny-math)"
    assert config.origins.of("data", "rename") == ""


def test_origins_play_no_part_in_equality() -> None:
    assert build([("a", {"seed": 1})]) == build([("b", {"seed": 1})])


STEPS = "`max_steps`: Steps to take at most; by default those of `epochs`."
WEIGHT = "`weight`: Weight in the sum; the reward's registered weight when not given."
EVERY_KEY = "see `grpoforge recipes show tiny-math --json` for every key"
MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    ({"max_step": 3}, "unknown key `max_step`@", "did you mean `max_steps`?"),
    ({"model": {"lora": {"rank": 3}}}, "unknown key `model.lora.rank`@", "known: alpha, r, target_modules"),
    ({"max_steps": True}, "`max_steps` is `true`@: it must be a valid integer", STEPS),
    ({"max_steps": "3"}, '`max_steps` is `"3"`@: it must be a valid integer', STEPS),
    ({"sampler": "hf"}, '`sampler` is `"hf"`@: it holds keys and values', "set one of its keys, e.g., `sampler.name`"),
    ({"model": 3}, "`model` is `3`@: it holds keys and values", "set one of its keys, e.g., `model.KEY`"),
    (
        {"model": {"lora": {"target_modules": 3}}},
        "`model.lora.target_modules` is `3`@: it must be a valid string",
        "`target_modules`: Modules that get an adapter.",
    ),
    (
        {"rewards": {"brevity": {"weight": "x"}}},
        '`rewards.brevity.weight` is `"x"`@: it must be a valid number',
        WEIGHT,
    ),
    (
        {"rewards": {"brevity": {"weight": float("inf")}}},
        "`rewards.brevity.weight` is `Infinity`@: it must be a finite number",
        WEIGHT,
    ),
    (
        {"rewards": {"brevty": {"weight": 1}}},
        "`rewards.brevty`@ changes `brevty`, which is not among the rewards: math, brevity",
        "did you mean `brevity`?",
    ),
    ({"rewards": {"brevity": 2}}, "`rewards.brevity` is `2`@", "name a key, e.g., `rewards.brevity.weight`"),
    (
        {"rewards": {"brevity": {"name": "math"}}},
        "`rewards.brevity.name`@ would put another component in its place",
        "set the list `rewards`",
    ),
    ({"rewards": []}, "a run needs at least one reward@", "name one with `--reward NAME`"),
    (
        {"rewards": [{"weight": 1.0}]},
        "`rewards.0.name` is missing@",
        "`name`: `name`, or `plugin:name` where two plugins share a name.",
    ),
    ({"optim": {"betas": [0.9, 1.0]}}, "`optim.betas.1` is `1.0`@: it must be less than 1", EVERY_KEY),
    (
        {"optim": {"schedule": "cosin"}},
        "`optim.schedule` is `\"cosin\"`@: it must be 'cosine', 'linear' or 'constant'",
        "`schedule`: Shape of the learning rate after warm-up.",
    ),
    (
        {"seed": 2**63},
        "`seed` is `9223372036854775808`@: it must be less than or equal to 9223372036854775807",
        "`seed`: Fixes the order of the data and every sample.",
    ),
    (
        {"optim": {"learning_rate": float("nan")}},
        "`optim.learning_rate` is `NaN`@: it must be a finite number",
        "`learning_rate`: Peak learning rate.",
    ),
]


@pytest.mark.parametrize(("values", "message", "hint"), MISTAKES)
def test_mistakes(values: dict[str, Any], message: str, hint: str) -> None:
    assert refusal(("mine.yaml", values)) == (message.replace("@", " (from mine.yaml)"), hint)


def test_the_layer_that_is_named_is_the_one_that_won() -> None:
    message, _ = refusal(("mine.yaml", {"seed": 1}), ("--set seed=x", {"seed": "x"}))
    assert message == '`seed` is `"x"` (from --set seed=x): it must be a valid integer'


def test_a_long_value_is_shortened() -> None:
    message, _ = refusal(("mine.yaml", {"seed": "x" * 500}))
    assert message == f'`seed` is `"{"x" * 58}…` (from mine.yaml): it must be a valid integer'


FILE_REWARDS = ("--reward", {"rewards": [{"name": "/a/rewards.py:politeness"}, {"name": "math"}]})


def test_a_reward_of_a_file_answers_to_its_function() -> None:
    override = "rewards.politeness.weight=0.2"
    config = build([TINY, FILE_REWARDS, (f"--set {override}", parse_override(override)), FILE_REWARDS])
    assert next((part.name, part.weight) for part in config.rewards) == ("/a/rewards.py:politeness", 0.2)
    assert config.origins.of("rewards", "/a/rewards.py:politeness", "weight") == f" (from --set {override})"


def test_a_function_of_two_files_is_not_guessed() -> None:
    two = ("--reward", {"rewards": [{"name": "/a/rewards.py:score"}, {"name": "/b/rewards.py:score"}]})
    with pytest.raises(ConfigError) as error:
        build([TINY, two, ("--set rewards.score.x=1", parse_override("rewards.score.x=1"))])
    assert error.value.message == (
        "`rewards.score` (from --set rewards.score.x=1) changes `score`, which is not among the rewards: "
        "/a/rewards.py:score, /b/rewards.py:score"
    )


def test_an_unknown_section_says_where_it_came_from() -> None:
    with pytest.raises(ConfigError) as error:
        with_sets("optm.lr=1")
    assert (error.value.message, error.value.hint) == (
        "unknown key `optm` (from --set optm.lr=1)",
        "did you mean `optim`?",
    )


KEYS = st.sampled_from(
    ["rewards", "sampler", "name", "weight", "model", "lora", "math", "trackers", "data", "rename", "x"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["math", "", "k1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)


@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=3), max_size=3))
def test_only_config_errors_escape(layers: list[dict[str, Any]]) -> None:
    with contextlib.suppress(ConfigError):
        build([TINY, *((f"layer {number}", layer) for number, layer in enumerate(layers))])


@given(st.from_regex(r"\A(rewards|sampler|model|data|kl|batch)(\.[a-z_]{1,6}){0,3}=[\[\]{}:,a-z0-9. -]{0,12}\Z"))
def test_only_config_errors_escape_from_overrides(text: str) -> None:
    with contextlib.suppress(ConfigError):
        with_sets(text)


@given(st.text(alphabet="abnmeorwdskl:{}[]-, \n1.", max_size=60))
def test_only_config_errors_escape_from_files(text: str) -> None:
    with contextlib.suppress(ConfigError):
        build([TINY, ("mine.yaml", as_mapping(parse_yaml(text, "mine.yaml"), "mine.yaml"))])


def test_another_dataset_starts_without_the_options_of_the_old_one() -> None:
    below = {"data": {"dataset": "a/b", "options": {"config": "main"}, "num_eval": 9}}
    assert build([("x", below), ("y", {"data": {"dataset": "a/b"}})]).data.options == {"config": "main"}
    other = build([("x", below), ("y", {"data": {"dataset": "tiny-math"}})]).data
    assert (other.options, other.num_eval) == ({}, 9)
