"""Parts that cannot work together are refused before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from grpoforge.combinations import check_together
from grpoforge.config import Config
from grpoforge.declarations import declared, declares
from grpoforge.errors import ConfigError, PluginError
from grpoforge.layers import build


def advantage(rewards: Any, weights: Any) -> Any: ...


def kl(logprobs: Any, ref_logprobs: Any) -> Any: ...


def loss(inputs: Any) -> Any: ...


@declares(level="sequence")
def sequence_loss(inputs: Any) -> Any: ...


@declares(level="token")
def token_correction(sampling_logprobs: Any) -> Any: ...


def to_target(target_logprobs: Any) -> Any: ...


def also_to_target(target_logprobs: Any, old_logprobs: Any) -> Any: ...


@declares(target_temperature=0.5)
def to_half(target_logprobs: Any) -> Any: ...


class Picky:
    """A sampler that works with one size of batch."""

    def check_batch(self, num_prompts: int, group_size: int) -> None:
        if num_prompts * group_size != 12:
            raise ConfigError(f"sampler option `rows` is 12, not {num_prompts} x {group_size}", "make it so")


def config(**values: Any) -> Config:
    return build([("base", {"kl": {"name": "k3"}}), ("mine.yaml", values)])


def check(values: dict[str, Any], **parts: Any) -> None:
    chosen = {"advantage": advantage, "loss": loss, "kl": kl, "corrections": (), "sampler": None} | parts
    check_together(config(**values), **chosen)


def test_what_fits_together_passes() -> None:
    check({})
    check({}, loss=loss, corrections=(("tis", token_correction),))
    check({"batch": {"completions_per_prompt": 1}}, advantage=declares(min_group=1)(lambda rewards: rewards))


@pytest.mark.parametrize(
    ("values", "parts", "message", "hint"),
    [
        (
            {"batch": {"completions_per_prompt": 1}},
            {},
            "`batch.completions_per_prompt` is 1 (from mine.yaml): a group of one has no baseline",
            "use at least 2 (8 is common)",
        ),
        (
            {"batch": {"completions_per_prompt": 2}, "advantage": {"name": "pass_at_k"}},
            {"advantage": declares(min_group=4)(lambda rewards: rewards)},
            "`batch.completions_per_prompt` is 2 (from mine.yaml): advantage `pass_at_k` needs at least 4",
            "use at least 4 (8 is common)",
        ),
        (
            {"batch": {"completions_per_prompt": 5}, "advantage": {"name": "paired"}},
            {"advantage": declares(block=2)(lambda rewards: rewards)},
            "`batch.completions_per_prompt` is 5 (from mine.yaml), and advantage `paired` takes them 2 at a time",
            "use 4 or 6",
        ),
        (
            {"batch": {"completions_per_prompt": 2}, "sampler": {"name": "trios"}},
            {"sampler": declares(block=3)(lambda: None)},
            "`batch.completions_per_prompt` is 2 (from mine.yaml), and sampler `trios` takes them 3 at a time",
            "use 3",
        ),
        (
            {"eval": {"samples": 3}, "sampler": {"name": "paired"}},
            {"sampler": declares(block=2)(lambda: None)},
            "`eval.samples` is 3 (from mine.yaml), and sampler `paired` draws 2 completions at a time",
            "use 2 or 4",
        ),
        (
            {"corrections": [{"name": "one"}, {"name": "other", "target_temperature": 0.5}]},
            {"corrections": (("one", to_target), ("other", to_half))},
            "the corrections look at different temperatures (from mine.yaml): `one` at 1 and `other` at 0.5",
            "give all of them one `target_temperature`",
        ),
        (
            {"kl": {"target": 0.1, "beta": 0.0}},
            {},
            "`kl.target` is 0.1 (from mine.yaml), and `kl.beta` is 0 (from mine.yaml): there is nothing to steer",
            "give `kl.beta` the value to start from, or leave out `kl.target`",
        ),
        (
            {"kl": {"name": "full", "placement": "reward"}},
            {"kl": lambda distribution, ref_distribution: distribution},
            "`kl.placement` is `reward` (from mine.yaml), and KL estimator `full` reads the whole vocabulary at every "
            "token, which is not kept with the rollouts",
            "use `--set kl.placement=loss`, or an estimator of sampled tokens: `k1`",
        ),
        (
            {"corrections": [{"name": "tis"}, {"name": "tis", "cap": 3}]},
            {"corrections": (("tis", token_correction), ("tis", token_correction))},
            "the correction `tis` is given twice (from mine.yaml)",
            "give it once, with the options you want",
        ),
        (
            {"loss": {"name": "gspo"}, "corrections": [{"name": "tis"}]},
            {"loss": sequence_loss, "corrections": (("tis", token_correction),)},
            "loss `gspo` (from mine.yaml) has one ratio per completion, and correction `tis` (from mine.yaml) weighs "
            "single tokens",
            "use `sequence_mask`, `tis_sequence`, or `geometric_mask` with `kept: one`",
        ),
        (
            {
                "loss": {"name": "clip_cov"},
                "kl": {"name": "full"},
                "batch": {"prompts_per_step": 2, "completions_per_prompt": 8, "micro_batch_size": 4},
            },
            {
                "loss": declares(coupling="batch")(lambda inputs: inputs),
                "kl": lambda distribution, ref_distribution: distribution,
            },
            "loss `clip_cov` looks at all 16 completions of an optimizer step at once, and KL estimator `full` would "
            "keep the whole vocabulary at each of their tokens",
            "use an estimator of sampled tokens such as `k2`, or `--set batch.micro_batch_size=16`",
        ),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], parts: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(values, **parts)
    assert (refused.value.message, refused.value.hint) == (message, hint)


@pytest.mark.parametrize(
    ("part", "component"),
    [
        ("advantage", lambda reward: reward),
        ("kl", lambda logits: logits),
        ("corrections", (("mine", lambda ratio: ratio),)),
    ],
)
def test_data_that_does_not_exist_is_refused(part: str, component: Any) -> None:
    with pytest.raises(PluginError, match="which it cannot be given"):
        check({"kl": {"placement": "reward"}}, **{part: component})


def test_a_component_may_refuse_a_batch_and_the_option_says_where_it_came_from() -> None:
    batch = {"prompts_per_step": 3, "completions_per_prompt": 4}
    check({"batch": batch, "sampler": {"name": "picky", "rows": 12}}, sampler=Picky())
    with pytest.raises(ConfigError) as refused:
        check({"batch": batch | {"prompts_per_step": 2}, "sampler": {"name": "picky", "rows": 12}}, sampler=Picky())
    assert refused.value.message == "sampler option `rows` is 12, not 2 x 4 (from mine.yaml)"
    assert refused.value.hint == "make it so"


def test_corrections_may_share_a_target() -> None:
    check({}, corrections=(("one", to_target), ("other", also_to_target), ("tis", token_correction)))


def test_two_completions_and_a_spread_keep_only_a_sign(caplog: pytest.LogCaptureFixture) -> None:
    scaled: Callable[..., Any] = declares(scales_by_std=True)(lambda rewards: rewards)
    check({"batch": {"completions_per_prompt": 2, "minibatch_size": 2}}, advantage=scaled)
    assert caplog.messages == [
        "with 2 completions per prompt advantage `group` keeps only the sign of their gap in reward, not its size; "
        "`paired`, `group_mean`, `batch_std` and `leave_one_out` keep it"
    ]
    caplog.clear()
    check({"batch": {"completions_per_prompt": 4}}, advantage=scaled)
    assert not caplog.messages


def test_an_estimator_that_pulls_elsewhere_in_the_reward(caplog: pytest.LogCaptureFixture) -> None:
    check({"kl": {"placement": "reward"}})
    assert caplog.messages == [
        "KL estimator `k3` in the reward does not pull along the gradient of the KL (`grpoforge lab kl`); `k1` does"
    ]
    caplog.clear()
    check({"kl": {"name": "k1", "placement": "reward"}}, kl=declares(right_in_reward=True)(lambda logprobs: logprobs))
    check({"kl": {"placement": "loss"}})
    assert not caplog.messages


def test_a_function_states_facts_and_keeps_them_with_options_bound() -> None:
    import functools

    assert declared(functools.partial(token_correction, option=1), "level") == "token"
    assert declared(token_correction, "min_group", 2) == 2
