"""Algorithms that cannot work, refused by the real command line before any weight is loaded, and with a reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from grpoforge.yaml_source import parse_yaml

Refused = Callable[..., tuple[str, str]]

LEVELS = "use `sequence_mask`, `tis_sequence`, or `geometric_mask` with `kept: one`"
CORRECTIONS = "`corrections`: Off-policy corrections: their weights multiply the policy loss of each token."
CAP = "`cap` is `float`: largest weight"


def sets(*changes: str) -> tuple[str, ...]:
    """``--set`` of each."""
    return tuple(word for change in changes for word in ("--set", change))


COMBINATIONS = {
    "sequence loss, token correction by option": (
        ("--loss", "gspo", *sets("corrections.tis.cap=2")),
        "loss `gspo` (from --loss) has one ratio per completion, and correction `tis` (from --set "
        "corrections.tis.cap=2) weighs single tokens",
        LEVELS,
    ),
    "sequence loss, token correction in a list": (
        ("--loss", "luspo", *sets("corrections=[{name: sequence_mask}, {name: icepop}]")),
        "loss `luspo` (from --loss) has one ratio per completion, and correction `icepop` (from --set "
        "corrections=[{name: sequence_mask}, {name: icepop}]) weighs single tokens",
        LEVELS,
    ),
    "full KL in the reward": (
        ("--kl", "full", *sets("kl.placement=reward")),
        "`kl.placement` is `reward` (from --set kl.placement=reward), and KL estimator `full` reads the whole "
        "vocabulary at every token, which is not kept with the rollouts",
        "use `--set kl.placement=loss`, or an estimator of sampled tokens: `k1`",
    ),
    "the best of more than the group": (
        ("--advantage", "pass_at_k", *sets("advantage.k=9", "batch.completions_per_prompt=8")),
        "`batch.completions_per_prompt` is 8 (from --set batch.completions_per_prompt=8): advantage `pass_at_k` needs "
        "at least 9",
        "use at least 9",
    ),
    "the best of one": (
        ("--advantage", "pass_at_k", *sets("advantage.k=1")),
        "advantage option `k` is 1 (from --set advantage.k=1)",
        "choose it >= 2; `leave_one_out` is the case of 1",
    ),
    "groups of one": (
        sets("batch.completions_per_prompt=1", "batch.minibatch_size=24", "batch.micro_batch_size=24"),
        "`batch.completions_per_prompt` is 1 (from --set batch.completions_per_prompt=1): a group of one has no "
        "baseline",
        "use at least 2 (8 is common)",
    ),
    "pass@k in groups of one": (
        (
            *("--advantage", "pass_at_k"),
            *sets("batch.completions_per_prompt=1", "batch.minibatch_size=24", "batch.micro_batch_size=24"),
        ),
        "`batch.completions_per_prompt` is 1 (from --set batch.completions_per_prompt=1): a group of one has no "
        "baseline",
        "use at least 2 (8 is common)",
    ),
    "whole minibatch, whole vocabulary": (
        ("--loss", "clip_cov", "--kl", "full", *sets("batch.minibatch_size=96", "batch.micro_batch_size=4")),
        "loss `clip_cov` looks at all 96 completions of an optimizer step at once, and KL estimator `full` would keep "
        "the whole vocabulary at each of their tokens",
        "use an estimator of sampled tokens such as `k2`, or `--set batch.micro_batch_size=96`",
    ),
    "pairs of another number": (
        ("--sampler", "paired", *sets("sampler.num_sample_pairs=10")),
        "sampler option `num_sample_pairs` is 10, and a step of 24 prompts x 8 completions has 96 pairs (from --set "
        "sampler.num_sample_pairs=10)",
        "use `--set sampler.num_sample_pairs=96`, or change `batch.prompts_per_step` and "
        "`batch.completions_per_prompt`",
    ),
    "pairs in groups of three": (
        ("--sampler", "paired", *sets("batch.completions_per_prompt=3", "batch.minibatch_size=72")),
        "`batch.completions_per_prompt` is 3 (from --set batch.completions_per_prompt=3), and sampler `paired` takes "
        "them 2 at a time",
        "use 2 or 4",
    ),
    "the gap inside half a pair": (
        ("--advantage", "paired", *sets("batch.completions_per_prompt=3", "batch.minibatch_size=72")),
        "`batch.completions_per_prompt` is 3 (from --set batch.completions_per_prompt=3), and advantage `paired` takes "
        "them 2 at a time",
        "use 2 or 4",
    ),
    "evaluation of half a pair": (
        ("--sampler", "paired", *sets("sampler.num_sample_pairs=96", "eval.samples=3")),
        "`eval.samples` is 3 (from --set eval.samples=3), and sampler `paired` draws 2 completions at a time",
        "use 2 or 4",
    ),
    "two targets": (
        sets("corrections=[{name: target_tis}, {name: target_sequence_mask, target_temperature: 0.7}]"),
        "the corrections look at different temperatures (from --set corrections=[{name: target_tis}, {name: "
        "target_sequence_mask, target_temperature: 0.7}]): `target_tis` at 1 and `target_sequence_mask` at 0.7",
        "give all of them one `target_temperature`",
    ),
    "a sampler option out of range": (
        sets("sampler.temperature=-1.0"),
        "sampler option `temperature` is -1 (from --set sampler.temperature=-1.0)",
        "choose it above 0",
    ),
    "a target for a KL that is off": (
        sets("kl.target=0.1", "kl.beta=0"),
        "`kl.target` is 0.1 (from --set kl.target=0.1), and `kl.beta` is 0 (from --set kl.beta=0): there is nothing to "
        "steer",
        "give `kl.beta` the value to start from, or leave out `kl.target`",
    ),
}

OPTIONS = {
    "unknown option": (
        sets("loss.epsilon_hi=0.3"),
        "unknown option `epsilon_hi` of loss `grpoforge:clip`; it takes: epsilon_low, epsilon_high, delta, dual_clip "
        "(from --set loss.epsilon_hi=0.3)",
        "did you mean `epsilon_high`?",
    ),
    "delta inside the clip": (
        sets("loss.delta=1.1"),
        "loss option `delta` is 1.1 (from --set loss.delta=1.1)",
        "choose it > 1 + epsilon_high = 1.2",
    ),
    "two bounds for one thing": (
        sets("loss.delta=4", "loss.dual_clip=3"),
        "loss options `delta` (4) and `dual_clip` (3) are both given (from --set loss.delta=4)",
        "both bound the ratio where the advantage is negative: give one",
    ),
    "dual clip below 1": (
        sets("loss.dual_clip=0.9"),
        "loss option `dual_clip` is 0.9 (from --set loss.dual_clip=0.9)",
        "choose it > 1",
    ),
    "unknown KL": (
        ("--kl", "k3_corected"),
        "unknown kl `k3_corected` (from --kl)",
        "did you mean `k3_corrected`?",
    ),
    "KL elsewhere": (
        sets("kl.placement=rewards"),
        "`kl.placement` is `\"rewards\"` (from --set kl.placement=rewards): it must be 'loss' or 'reward'",
        "`placement`: `loss`: a term per token. `reward`: its sum over a completion is subtracted from the "
        "completion's reward.",
    ),
    "target below 0": (
        sets("kl.target=-0.1"),
        "`kl.target` is `-0.1` (from --set kl.target=-0.1): it must be greater than 0",
        "`target`: Mean KL per token that an adaptive `beta` is steered to; null keeps `beta` constant.",
    ),
    "local mean": (
        sets("reduction=bnpo"),
        "`reduction` is `\"bnpo\"` (from --set reduction=bnpo): it must be 'sequence', 'token', 'constant' or "
        "'sequence_sum'",
        "`reduction`: How per-token losses become one number.",
    ),
    "no token at all": (
        sets("batch.top_entropy_quantile=0"),
        "`batch.top_entropy_quantile` is `0` (from --set batch.top_entropy_quantile=0): it must be greater than 0",
        "`top_entropy_quantile`: Share of the tokens, those of highest entropy, that the policy loss is taken on.",
    ),
}

CORRECTION_OPTIONS = {
    "unknown, by option": (
        sets("corrections.tsi.cap=2"),
        "unknown correction `tsi` (from --set corrections.tsi.cap=2)",
        "did you mean `tis`?",
    ),
    "unknown, in a list": (
        sets("corrections=[{name: icepopp}]"),
        "unknown correction `icepopp` (from --set corrections=[{name: icepopp}])",
        "did you mean `icepop`?",
    ),
    "unknown option": (
        sets("corrections.tis.cpa=2"),
        "unknown option `cpa` of correction `grpoforge:tis`; it takes: cap (from --set corrections.tis.cpa=2)",
        "did you mean `cap`?",
    ),
    "option out of range": (
        sets("corrections.tis.cap=-1"),
        "option `cap` of correction `grpoforge:tis`: input should be greater than 0, got `-1` (from --set "
        "corrections.tis.cap=-1)",
        CAP,
    ),
    "option out of range, in a list": (
        sets("corrections=[{name: tis, cap: 0}]"),
        "option `cap` of correction `grpoforge:tis`: input should be greater than 0, got `0` (from --set "
        "corrections=[{name: tis, cap: 0}])",
        CAP,
    ),
    "option out of range, in a mapping": (
        sets("corrections={tis: {cap: two}}"),
        "option `cap` of correction `grpoforge:tis`: input should be a valid number, got `'two'` (from --set "
        "corrections={tis: {cap: two}})",
        CAP,
    ),
    "option that is no choice": (
        sets("corrections.sequence_mask.kept=two"),
        "option `kept` of correction `grpoforge:sequence_mask`: input should be 'ratio' or 'one', got `'two'` (from "
        "--set corrections.sequence_mask.kept=two)",
        "`kept` is `Literal['ratio', 'one']`: weight of what is kept: its ratio, or 1 (a pure mask)",
    ),
    "bounds that leave nothing": (
        sets("corrections.icepop.low=6"),
        "correction options `low` 6 and `high` 5 leave nothing between them (from --set corrections.icepop.low=6)",
        "choose `low` < `high`",
    ),
    "a number in place of options": (
        sets("corrections.tis=2"),
        '`corrections` is `{"tis": 2}` (from --set corrections.tis=2): `tis` holds options, such as '
        "`corrections.tis.OPTION=VALUE`",
        CORRECTIONS,
    ),
    "a name in place of the list": (
        sets("corrections=tis"),
        '`corrections` is `"tis"` (from --set corrections=tis): it must be a valid list',
        CORRECTIONS,
    ),
    "a list of names": (
        sets("corrections=[tis]"),
        '`corrections.0` is `"tis"` (from --set corrections=[tis]): it holds keys and values',
        "write `{name: tis}`",
    ),
}

CASES = COMBINATIONS | OPTIONS | {f"correction: {name}": case for name, case in CORRECTION_OPTIONS.items()}


@pytest.mark.parametrize(("arguments", "message", "hint"), CASES.values(), ids=CASES.keys())
def test_refused(refused: Refused, tmp_path: Path, arguments: Sequence[str], message: str, hint: str) -> None:
    assert refused("train", "--dry-run", *arguments) == (message, hint)
    assert refused("train", *arguments) == (message, hint)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_named_where_it_is_a_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("loss: {name: gspo}\ncorrections:\n  tis_two_sided: {low: 0.9}\n")
    assert refused("train", "mine.yaml") == (
        "loss `gspo` (from mine.yaml) has one ratio per completion, and correction `tis_two_sided` (from mine.yaml) "
        "weighs single tokens",
        LEVELS,
    )


@pytest.mark.parametrize(
    "change",
    ["corrections.tis.cap=3", "corrections={tis: {cap: 3}}", "corrections=[{name: tis, cap: 3}]"],
    ids=["by option", "as a mapping", "as a list"],
)
def test_three_ways_to_say_the_same(cli: Callable[..., Any], change: str) -> None:
    said = cli("train", "--dry-run", "--set", change)
    assert said.code == 0, said.err
    assert parse_yaml(said.out, "the plan")["corrections"] == [{"name": "tis", "cap": 3}]


def test_a_correction_without_options_and_a_second_one(cli: Callable[..., Any]) -> None:
    said = cli("train", "--dry-run", *sets("corrections={tis: null}", "corrections.icepop.low=0.2"))
    assert said.code == 0, said.err
    plan = parse_yaml(said.out, "the plan")
    assert plan["corrections"] == [{"name": "tis"}, {"name": "icepop", "low": 0.2}]


SIGN = (
    "warning: with 2 completions per prompt advantage `group` keeps only the sign of their gap in reward, not its "
    "size; `paired`, `group_mean`, `batch_std` and `leave_one_out` keep it\n"
)


def test_pairs_keep_only_a_sign_and_that_is_said_once(cli: Callable[..., Any], small: Sequence[str]) -> None:
    said = cli("train", *small)
    assert said.code == 0, said.err
    assert said.err.count(SIGN) == 1
    quiet = cli("train", "--dry-run", "--advantage", "group_mean", *small)
    assert quiet.code == 0 and "keeps only the sign" not in quiet.err
