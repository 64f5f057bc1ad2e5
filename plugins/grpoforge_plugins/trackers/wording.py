"""Numbers and texts as a person reads them on a screen: pure functions from values to strings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box

from grpoforge.sanitize import one_line
from grpoforge.tracking import RunInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyphs:
    """The marks a terminal can show, and the encoding its text must fit."""

    done: str
    left: str
    sparks: str
    """From low to high; empty: no sparkline."""
    border: box.Box
    encoding: str

    def fit(self, text: str) -> str:
        """``text`` with what the terminal cannot show written as escapes: never an encoding error."""
        if self.encoding == "ascii":
            text = text.replace("…", "...")
        return text.encode(self.encoding, "backslashreplace").decode(self.encoding)


UNICODE = Glyphs(done="━", left="─", sparks="▁▂▃▄▅▆▇█", border=box.ROUNDED, encoding="utf-8")
ASCII = Glyphs(done="#", left="-", sparks="", border=box.ASCII, encoding="ascii")


def choose_glyphs(encoding: str, environment: Mapping[str, str]) -> Glyphs:
    """UNICODE when the stream and the user's locale both speak UTF-8, else ASCII."""
    if not encoding.lower().replace("-", "").startswith("utf8"):
        return ASCII
    # Under LANG=C Python switches its streams to UTF-8 and sets LC_CTYPE=C.UTF-8 by itself (PEP 538): neither
    # the stream's encoding nor that value of LC_CTYPE tells what the user asked for.
    names = ("LC_ALL", "LC_CTYPE", "LANG")
    wishes = [environment.get(name, "") for name in names]
    wish = next((wish for wish in wishes if wish and wish != "C.UTF-8"), "")
    return ASCII if wish in ("C", "POSIX") else UNICODE


def header_rows(run: RunInfo) -> list[tuple[str, str]]:
    """What is being trained on what, as (label, text); a continued label is empty."""
    rows = [
        ("model", f"{run.model} ({short_count(run.num_parameters)} parameters) on {run.device}, {run.dtype}"),
        ("data", f"{run.dataset}: {_sizes(run)}"),
        *_labelled("rewards", run.rewards),
        ("steps", _steps(run)),
        ("output", str(run.run_dir)),
        *_labelled("note", run.notes),
    ]
    return [(label, one_line(text, 1000)) for label, text in rows]


def _sizes(run: RunInfo) -> str:
    evaluated = f"{run.num_eval:,} to evaluate" if run.num_eval else "no evaluation"
    train = "a stream of" if run.num_train is None else f"{run.num_train:,}"
    return f"{train} prompts to train on, {evaluated}"


def _steps(run: RunInfo) -> str:
    resumed = f"{run.first_step:,} done, resumed; " if run.first_step else ""
    size = f"{run.prompts_per_step} prompts x {run.completions_per_prompt} completions"
    return f"{resumed}{run.max_steps:,} in all, each {size}"


def _labelled(label: str, lines: Iterable[str]) -> list[tuple[str, str]]:
    return [("" if number else label, line) for number, line in enumerate(lines)]


def step_numbers(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """The numbers that matter after a step, as (label, value); what the step did not measure is left out."""
    numbers = [("reward", f"{metrics['reward']:.3f}")] if "reward" in metrics else []
    for name, value in metrics.items():
        if name.startswith("rewards/") and name.endswith("/mean"):
            shown = "-" if math.isnan(value) else f"{value:.3f}"  # nothing was scored
            numbers.append((one_line(name[len("rewards/") : -len("/mean")], 40), shown))
    if "completions/mean_length" in metrics:
        numbers.append(("length", f"{metrics['completions/mean_length']:.1f}"))
    if "kl" in metrics:
        numbers.append(("kl", _small(metrics["kl"])))
    if "tokens_per_second" in metrics:
        numbers.append(("tokens/s", short_count(metrics["tokens_per_second"])))
    return numbers


def _small(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 0.00005 else f"{value:.4f}"


EVAL_HEADLINES = ("eval_completions/mean_length", "eval_reward")


def eval_line(step: int, metrics: Mapping[str, float]) -> str:
    """``eval at step 40: pass@1 71.2%  length 34.1  reward 0.61``: the headlines; files hold the rest."""
    headlines = {name: value for name, value in metrics.items() if "@" in name or name in EVAL_HEADLINES}
    return f"eval at step {step}: " + "  ".join(_eval_number(name, value) for name, value in headlines.items())


def _eval_number(name: str, value: float) -> str:
    label = one_line(name.removeprefix("eval_"), 40)
    if "@" in label:
        return f"{label} {100 * value:.1f}%" if math.isfinite(value) else f"{label} {value}"
    if label == "completions/mean_length":
        return f"length {value:.1f}"
    return f"{label} {value:.4g}"


def sample_title(row: Mapping[str, Any]) -> str:
    """``sample at step 20: 9 tokens, temperature 0.7``, and whether it was cut at the token limit."""
    tokens = f"{row['num_tokens']} token" + ("" if row["num_tokens"] == 1 else "s")
    cut = ", cut at the token limit" if row["finish_reason"] == "length" else ""
    return f"sample at step {row['step']}: {tokens}, temperature {row['temperature']:g}{cut}"


def rewards_line(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """``math 1, brevity 0 (0.9 before its gate), total 1``: what each reward gave, and their weighted sum."""
    weighted = [row[f"{name}/weighted"] for name in names]
    scored = [value for value in weighted if not math.isnan(value)]
    total = f"total {sum(scored):.3g}" if scored else "total nan"
    return ", ".join([*(_reward(row, name) for name in names), total])


def _reward(row: Mapping[str, Any], name: str) -> str:
    raw, reward = row[f"{name}/raw"], row[f"{name}/reward"]
    label = one_line(name, 40)
    if math.isnan(reward):
        return f"{label} not scored"
    gated = f" ({raw:.3g} before its gate)" if raw != reward and not math.isnan(raw) else ""
    return f"{label} {reward:.3g}{gated}"


def advantage_line(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """``+0.71 = math +0.62, brevity +0.09``: the advantage and each reward's share of it."""
    shares = ", ".join(f"{one_line(name, 40)} {row[f'{name}/share']:+.2f}" for name in names)
    return f"{row['advantage']:+.2f} = {shares}"


def teaches_nothing(step: int, metrics: Mapping[str, float]) -> str:
    """A warning when the completions of every prompt earned the same: no advantage, no gradient. Else empty."""
    if metrics.get("frac_reward_zero_std") != 1.0:
        return ""
    return f"warning: step {step}: no group has rewards that differ: this step teaches nothing"


def excerpt(text: str, *, max_lines: int, max_chars: int) -> str:
    """``text`` with its middle cut out when it is too long: beginning and end say most.

    The marks count as lines and characters of the result, so that a mark never takes the place of less than itself.
    """
    if not text.strip():
        return "(only white space)" if text else "(empty)"
    lines = text.strip("\n").split("\n")
    if len(lines) > max_lines:
        head = max_lines // 2
        tail = max_lines - 1 - head
        lines = [*lines[:head], f"[... {len(lines) - head - tail} lines ...]", *lines[len(lines) - tail :]]
    shown = "\n".join(lines)
    if len(shown) <= max_chars:
        return shown
    half = max((max_chars - len(_cut_mark(len(shown)))) // 2, 1)
    return shown[:half] + _cut_mark(len(shown) - 2 * half) + shown[-half:]


def _cut_mark(num_chars: int) -> str:
    return f" [... {num_chars:,} characters ...] "


def sparkline(values: Sequence[float], width: int, sparks: str) -> str:
    """The course of ``values`` in at most ``width`` marks, each the mean of its stretch; NaN is left out."""
    finite = [value for value in values if math.isfinite(value)]
    if not sparks or len(finite) < 2:
        return ""
    width = min(width, len(finite))
    cuts = [len(finite) * i // width for i in range(width + 1)]
    means = [sum(finite[start:end]) / (end - start) for start, end in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(sparks) - 1) / (high - low) if high > low else 0.0
    return "".join(sparks[round((mean - low) * scale)] for mean in means)


def duration(seconds: float) -> str:
    """``1:02`` or ``3:01:02``."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def short_count(number: float) -> str:
    """Three digits and a unit: ``812K``, ``3.09B``."""
    if not math.isfinite(number):
        return str(number)
    for unit in ("", "K", "M", "B"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"
