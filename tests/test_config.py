"""The keys of a run: strict, complete, frozen, documented; and the arithmetic of a batch."""

from __future__ import annotations

import re
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpoforge.config import BatchConfig, Config, DataConfig, OptimConfig, RewardPart, Section, check_batch
from grpoforge.errors import ConfigError
from grpoforge.layers import build
from grpoforge.yaml_source import parse_override


def batch(prompts: int, completions: int, **sizes: Any) -> Config:
    return Config(batch=BatchConfig(prompts_per_step=prompts, completions_per_prompt=completions, **sizes))


def refusal(config: Config) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        check_batch(config)
    return caught.value.message, caught.value.hint


def test_defaults_are_a_complete_run() -> None:
    config = Config()
    check_batch(config)
    assert (config.minibatch_size, config.updates_per_step) == (128, 1)


def test_the_numbers_of_a_step() -> None:
    config = batch(4, 6, minibatch_size=8, epochs=3)
    check_batch(config)
    assert (config.minibatch_size, config.updates_per_step) == (8, 9)


@pytest.mark.parametrize(
    ("size", "nearest"), [(5, "4 or 6"), (7, "6 or 8"), (23, "12 or 24"), (25, "24"), (10**15, "24")]
)
def test_a_minibatch_that_does_not_divide(size: int, nearest: str) -> None:
    assert refusal(batch(4, 6, minibatch_size=size)) == (
        f"`batch.minibatch_size` is {size}, which does not divide 4 prompts x 6 completions = 24",
        "use " + " or ".join(f"`--set batch.minibatch_size={n}`" for n in nearest.split(" or ")),
    )


@given(st.integers(1, 60), st.integers(2, 60), st.integers(1, 4000))
def test_the_nearest_sizes_are_legal_and_nothing_lies_between(prompts: int, group: int, size: int) -> None:
    config = batch(prompts, group, minibatch_size=size)
    rows = prompts * group
    if rows % size == 0:
        return check_batch(config)
    _, hint = refusal(config)
    nearest = [int(n) for n in re.findall(r"`--set batch\.minibatch_size=([0-9]+)`", hint)]
    assert all(rows % n == 0 for n in nearest)
    inside = range(nearest[0] + 1, nearest[1] if len(nearest) == 2 else size)
    assert not any(rows % n == 0 for n in inside)


def test_large_batches_are_answered_at_once() -> None:
    config = batch(999_983, 999_979, minibatch_size=7)
    assert refusal(config)[1] == "use `--set batch.minibatch_size=1` or `--set batch.minibatch_size=999979`"


def test_a_micro_batch_larger_than_a_minibatch() -> None:
    assert refusal(batch(4, 6, minibatch_size=8, micro_batch_size=9)) == (
        "`batch.micro_batch_size` is 9, more than the 8 completions of a minibatch",
        "use at most 8",
    )


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (Config, {"max_steps": 0}),
        (Config, {"max_steps": 1.5}),
        (Config, {"max_steps": True}),
        (Config, {"seed": -1}),
        (Config, {"seed": 2**63}),
        (Config, {"rewards": []}),
        (Config, {"reduction": "sum"}),
        (Config, {"unknown": 1}),
        (BatchConfig, {"prompts_per_step": 1_000_001}),
        (DataConfig, {"template": "no place for the problem"}),
        (DataConfig, {"rename": {"a": 1}}),
        (DataConfig, {"skip_bad_rows": "yes"}),
        (OptimConfig, {"learning_rate": float("inf")}),
        (OptimConfig, {"learning_rate": float("nan")}),
        (OptimConfig, {"betas": [0.9, 1.0]}),
        (OptimConfig, {"betas": [0.9]}),
        (RewardPart, {"name": "math", "weight": float("inf")}),
        (RewardPart, {"name": ""}),
    ],
)
def test_values_that_are_refused(section: type[pydantic.BaseModel], values: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        section.model_validate(values)


def test_values_that_are_taken() -> None:
    assert OptimConfig.model_validate({"betas": [0.9, 0.95], "learning_rate": 1}).betas == (0.9, 0.95)
    assert RewardPart.model_validate({"name": "math", "weight": -1}).weight == -1.0
    assert Config.model_validate({"seed": 2**63 - 1}).seed == 2**63 - 1


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(pydantic.ValidationError):
        Config().seed = 3


def test_a_configuration_survives_json() -> None:
    config = batch(4, 6, minibatch_size=8)
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert Config.model_validate(config.model_dump(mode="json")) == config


def sections(model: type[pydantic.BaseModel]) -> list[type[pydantic.BaseModel]]:
    inside = [
        kind
        for one in model.model_fields.values()
        for kind in (one.annotation, *getattr(one.annotation, "__args__", ()))
        if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)
    ]
    return [model, *(found for kind in inside for found in sections(kind))]


def test_every_key_is_documented() -> None:
    missing = [
        f"{section.__name__}.{name}"
        for section in sections(Config)
        for name, one in section.model_fields.items()
        if not one.description and not (isinstance(one.annotation, type) and issubclass(one.annotation, Section))
    ]
    assert missing == [
        "Config.rewards",
        "Config.sampler",
        "Config.advantage",
        "Config.loss",
        "Config.kl",
        "Config.trackers",
    ]


@pytest.mark.parametrize(("written", "meant"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'off'", "off")])
def test_on_and_off_are_words_whatever_yaml_makes_of_them(written: str, meant: str) -> None:
    config = build([("--set", parse_override(f"batch.shared_prefix={written}"))])
    assert config.batch.shared_prefix == meant
