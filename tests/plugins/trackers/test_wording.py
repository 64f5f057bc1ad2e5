"""Numbers and texts as people read them."""

from __future__ import annotations

import dataclasses

import pytest

from grpoforge.tracking import RunInfo
from grpoforge_plugins.trackers.wording import (
    ASCII,
    UNICODE,
    Glyphs,
    advantage_line,
    choose_glyphs,
    duration,
    eval_line,
    excerpt,
    header_rows,
    rewards_line,
    sample_title,
    short_count,
    sparkline,
    step_numbers,
    teaches_nothing,
)

NAN = float("nan")


def test_header_says_what_is_trained_on_what(run: RunInfo) -> None:
    assert header_rows(run) == [
        ("model", "tiny (812K parameters) on cpu, float32"),
        ("data", "tiny-math: 4,096 prompts to train on, 256 to evaluate"),
        ("rewards", "math x1"),
        ("", "brevity x0.1 (only where math is right)"),
        ("steps", "40 in all, each 2 prompts x 2 completions"),
        ("output", str(run.run_dir)),
        ("note", "no chat template: plain prompt template"),
    ]


def test_header_of_a_resumed_run_without_evaluation(run: RunInfo) -> None:
    rows = dict(header_rows(dataclasses.replace(run, num_eval=0, first_step=12, notes=())))
    assert rows["data"] == "tiny-math: 4,096 prompts to train on, no evaluation"
    assert rows["steps"] == "12 done, resumed; 40 in all, each 2 prompts x 2 completions"
    assert "note" not in rows


def test_step_numbers_are_the_ones_that_matter() -> None:
    metrics = {
        "loss": 3.0,
        "reward": 0.75,
        "rewards/math/mean": 0.5,
        "rewards/math/std": 0.1,
        "completions/mean_length": 34.125,
        "kl": 0.0131,
        "tokens_per_second": 4123.4,
    }
    assert step_numbers(metrics) == [
        ("reward", "0.750"),
        ("math", "0.500"),
        ("length", "34.1"),
        ("kl", "0.0131"),
        ("tokens/s", "4.12K"),
    ]


def test_step_numbers_show_nan_and_leave_out_what_is_missing() -> None:
    assert step_numbers({"reward": NAN, "kl": NAN}) == [("reward", "nan"), ("kl", "nan")]
    assert step_numbers({"rewards/preference/mean": NAN}) == [("preference", "-")], "it abstained"
    assert step_numbers({"kl": 0.00001, "tokens_per_second": NAN}) == [("kl", "1.0e-05"), ("tokens/s", "nan")]
    assert step_numbers({}) == []


def test_eval_line() -> None:
    metrics = {"eval_pass@1": 0.712, "eval_completions/mean_length": 34.12}
    assert eval_line(40, metrics) == "eval at step 40: pass@1 71.2%  length 34.1"
    metrics = {"eval_mean@4": NAN, "eval_reward": 0.01234, "eval_rewards/math/mean": 0.5, "time/eval": 3.0}
    assert eval_line(0, metrics) == "eval at step 0: mean@4 nan  reward 0.01234"


ROW = {
    "step": 20,
    "num_tokens": 9,
    "temperature": 0.7,
    "finish_reason": "stop",
    "advantage": 0.71,
    "math/raw": 1.0,
    "math/reward": 1.0,
    "math/weighted": 1.0,
    "math/share": 0.62,
    "brevity/raw": 0.9,
    "brevity/reward": 0.0,
    "brevity/weighted": 0.0,
    "brevity/share": 0.09,
}


def test_sample_lines() -> None:
    names = ("math", "brevity")
    assert sample_title(ROW) == "sample at step 20: 9 tokens, temperature 0.7"
    assert rewards_line(ROW, names) == "math 1, brevity 0 (0.9 before its gate), total 1"
    assert advantage_line(ROW, names) == "+0.71 = math +0.62, brevity +0.09"


def test_sample_lines_of_an_unscored_row_cut_at_the_limit() -> None:
    unscored = {f"math/{part}": NAN for part in ("raw", "reward", "weighted")}
    row = {**ROW, **unscored, "num_tokens": 1, "finish_reason": "length", "temperature": 1.0}
    assert sample_title(row) == "sample at step 20: 1 token, temperature 1, cut at the token limit"
    assert rewards_line(row, ("math",)) == "math not scored, total nan"


def test_excerpt_cuts_the_middle() -> None:
    assert excerpt("short\ntext", max_lines=5, max_chars=100) == "short\ntext"
    lines = "\n".join("abcdefgh")
    assert excerpt(lines, max_lines=5, max_chars=100) == "a\nb\n[... 4 lines ...]\ng\nh"
    cut = excerpt("a" * 1500 + "b" * 1500, max_lines=5, max_chars=36)
    assert cut == "aaaa [... 2,992 characters ...] bbbb"
    assert len(cut) == 36
    assert excerpt("", max_lines=5, max_chars=100) == "(empty)"
    assert excerpt(" \n\t", max_lines=5, max_chars=100) == "(only white space)"


@pytest.mark.parametrize("length", range(60, 140))
def test_an_excerpt_never_hides_less_than_its_mark(length: int) -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(length))
    cut = excerpt(text, max_lines=5, max_chars=60)
    assert len(cut) <= 60
    assert (cut == text) is (length == 60)


def test_a_step_without_differences_teaches_nothing() -> None:
    message = "warning: step 3: no group has rewards that differ: this step teaches nothing"
    assert teaches_nothing(3, {"frac_reward_zero_std": 1.0}) == message
    assert teaches_nothing(3, {"frac_reward_zero_std": 0.99}) == teaches_nothing(3, {}) == ""


def test_sparkline_follows_the_values() -> None:
    assert sparkline([0.0, 1.0], 8, UNICODE.sparks) == "▁█"
    assert sparkline([0.0, 0.0, 0.5, 0.5, 1.0, 1.0], 3, "abc") == "abc"
    assert sparkline([2.0, 2.0, 2.0], 3, "abc") == "aaa"
    assert sparkline([0.0, NAN, 1.0], 8, "ab") == "ab"
    assert sparkline([1.0], 8, "ab") == sparkline([0.0, 1.0], 8, ASCII.sparks) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (62.9, "1:02"), (3599, "59:59"), (10862, "3:01:02"), (360000, "100:00:00")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (12.34, "12.3"),
        (999.4, "999"),
        (999.6, "1K"),
        (812_032, "812K"),
        (3_085_938_688, "3.09B"),
        (2e12, "2T"),
        (NAN, "nan"),
    ],
)
def test_short_count(number: float, text: str) -> None:
    assert short_count(number) == text


@pytest.mark.parametrize(
    ("encoding", "environment", "glyphs"),
    [
        ("utf-8", {}, UNICODE),
        ("utf-8", {"LANG": "en_US.UTF-8"}, UNICODE),
        ("UTF8", {"LANG": "C", "LC_ALL": "de_DE.UTF-8"}, UNICODE),
        ("utf-8", {"LANG": "C.UTF-8"}, UNICODE),
        ("utf-8", {"LANG": "C"}, ASCII),
        ("utf-8", {"LANG": "C", "LC_CTYPE": "C.UTF-8"}, ASCII),
        ("utf-8", {"LANG": "en_US.UTF-8", "LC_ALL": "POSIX"}, ASCII),
        ("iso-8859-1", {"LANG": "en_US.UTF-8"}, ASCII),
        ("ascii", {}, ASCII),
    ],
)
def test_glyphs_follow_the_stream_and_the_locale(encoding: str, environment: dict[str, str], glyphs: Glyphs) -> None:
    assert choose_glyphs(encoding, environment) is glyphs


def test_text_fits_the_encoding() -> None:
    assert ASCII.fit("é…日") == "\\xe9...\\u65e5"
    assert UNICODE.fit("é…\ud800") == "é…\\ud800"
