"""Rollouts to rewards: call every reward, survive every reward, keep the ledger.

A reward is a plain function of data bound by name. Whatever it does wrong (raise, hang, wrong length, wrong type,
NaN, inf) is attributed to it by name, row and value. ``None`` means *not scored*, which is never the same as 0.
"""

from __future__ import annotations

import logging
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from grpoforge.errors import RewardError
from grpoforge.reward_calls import RewardCall, raised
from grpoforge.types import Rollouts, Scores, rounding, weighted_total

logger = logging.getLogger(__name__)

ErrorPolicy = Literal["stop", "skip"]

BUILTIN_DATA = (
    "completions",
    "prompts",
    "completion_ids",
    "finish_reasons",
    "temperatures",
    "max_completion_length",
    "rollouts",
)
"""What a reward may ask for by name besides the dataset's columns. All but the last two are lists of length ``B``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundReward:
    """A reward with its options bound and its data named, ready to be called."""

    name: str
    """Its name in metrics and in the ledger."""
    function: Callable[..., Any]
    data: tuple[str, ...]
    """Names of the data it is called with, by keyword."""
    weight: float
    gate: str | None = None
    """Name of another reward: this one pays only on rows where that one reached 1."""


def bind_data(rollouts: Rollouts) -> dict[str, Any]:
    """Everything a reward may ask for, by name: dataset columns first, so that none can shadow a built-in name."""
    completions = rollouts.flat()
    columns = {name: rollouts.column(name) for name in rollouts.prompts[0].columns}
    return columns | {
        "completions": [completion.text for completion in completions],
        "prompts": [prompt.text for prompt in rollouts.flat_prompts()],
        "completion_ids": [completion.token_ids for completion in completions],
        "finish_reasons": [completion.finish_reason for completion in completions],
        "temperatures": [completion.temperature for completion in completions],
        "max_completion_length": rollouts.max_completion_length,
        "rollouts": rollouts,
    }


def score(
    rollouts: Rollouts, rewards: Sequence[BoundReward], *, on_error: ErrorPolicy = "stop", time_limit: float = 60.0
) -> Scores:
    """Rewards of every completion, gates applied.

    All rewards run at once, each in a thread of its own, so rewards that wait for I/O overlap. What they return to be
    awaited runs on one event loop that lives as long as the process; it is cancelled when its time is over.

    Args:
        rollouts: ``P`` groups of ``G`` completions.
        rewards: ``K`` rewards with distinct names.
        on_error: what a broken contract does: ``stop`` raises, ``skip`` warns and leaves the rows unscored.
        time_limit: seconds each reward may take for the whole batch.

    Raises:
        RewardError: a reward broke its contract and ``on_error`` is ``stop``.
    """
    data = bind_data(rollouts)
    calls = [RewardCall(reward.name, reward.function, {name: data[name] for name in reward.data}) for reward in rewards]
    deadline = time.monotonic() + time_limit
    origins = [prompt.origin for prompt in rollouts.flat_prompts()]
    try:
        for call in calls:
            call.start()
        columns = [_collect(call, origins, deadline, time_limit, on_error) for call in calls]
    finally:
        for call in calls:
            call.cancel()
    shape = (rollouts.num_prompts, rollouts.group_size, len(rewards))
    raw = torch.tensor(columns, dtype=torch.float64).T.reshape(shape)
    return Scores(
        names=tuple(reward.name for reward in rewards),
        rewards=apply_gates(raw, rewards),
        raw=raw,
        weights=torch.tensor([reward.weight for reward in rewards], dtype=torch.float64),
        seconds=tuple(call.seconds for call in calls),
    )


def _collect(
    call: RewardCall, origins: Sequence[str], deadline: float, time_limit: float, on_error: ErrorPolicy
) -> list[float]:
    """The rewards of all rows, NaN where not scored; ``origins`` says where each row's prompt stands."""
    num_rows = len(origins)
    try:
        if not call.wait(deadline - time.monotonic()):
            raise RewardError(
                f"reward `{call.name}` did not return within {time_limit:g} s for {num_rows} completions",
                "make it faster, or raise `scoring.time_limit`",
            )
        if call.failure is not None:
            raise raised(call, call.failure)
        return check_values(call.name, call.values, num_rows, on_error, origins)
    except RewardError as error:
        if on_error == "stop":
            raise
        logger.warning("%s; its rows stay unscored", error.message)
        return [float("nan")] * num_rows


def check_values(
    name: str, values: Any, num_rows: int, on_error: ErrorPolicy, origins: Sequence[str] = ()
) -> list[float]:
    """``values`` as floats, NaN where not scored; ``origins`` names the rows in messages.

    A wrong length or container is always an error of the whole reward; a bad value is an error of its row, which
    ``skip`` leaves unscored with a warning.
    """
    if hasattr(values, "tolist"):  # torch, numpy, pandas, array
        values = values.tolist()
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence):
        raise RewardError(
            f"reward `{name}` returned {_show(values)}, not a list of {num_rows} numbers",
            "return one float, or None for 'not scored', per completion",
        )
    if len(values) != num_rows:
        raise RewardError(
            f"reward `{name}` returned {len(values)} values for {num_rows} completions",
            "return one float, or None for 'not scored', per completion",
        )
    return [
        _check_value(name, f"row {row}" + (f" ({origins[row]})" if origins and origins[row] else ""), value, on_error)
        for row, value in enumerate(values)
    ]


def _check_value(name: str, row: str, value: Any, on_error: ErrorPolicy) -> float:
    if value is None:
        return float("nan")
    number = _as_float(value)
    # A loss sees advantages in the dtype of the log-probs: a larger value would silently become inf there.
    if number is not None and math.isfinite(number) and abs(number) <= torch.finfo(torch.float32).max:
        return number
    message = f"reward `{name}` returned {_show(value)} for {row}"
    if on_error == "stop":
        raise RewardError(message, "return a finite number, or None for 'not scored'")
    logger.warning("%s; the row stays unscored", message)
    return float("nan")


def _as_float(value: Any) -> float | None:
    """Real numbers, booleans and one-element arrays; None for everything else (a numeric string included)."""
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (TypeError, ValueError, RuntimeError):
            return None
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _show(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # the boundary: a foreign object
        text = "an object without a repr"
    return f"{text if len(text) <= 60 else text[:59] + '…'} ({type(value).__name__})"


def apply_gates(raw: Tensor, rewards: Sequence[BoundReward]) -> Tensor:
    """``[P, G, K]`` rewards where a gated reward is 0 unless its gate reached 1, and unscored where its gate is."""
    names = [reward.name for reward in rewards]
    gated = raw.clone()
    for index, reward in enumerate(rewards):
        if reward.gate is None:
            continue
        gate = raw[:, :, names.index(reward.gate)]
        column = torch.where(gate >= 1.0, raw[:, :, index], torch.zeros_like(gate))
        gated[:, :, index] = torch.where(
            gate.isnan() | raw[:, :, index].isnan(), torch.full_like(gate, torch.nan), column
        )
    return gated


def ledger(scores: Scores, advantages: Tensor, block: int | None = None) -> Tensor:
    """Each reward's share of the applied advantage, ``[P, G, K]`` float64.

    ``c_k = w_k (R_k - mean(R_k))`` over the scored rows of the group, or of each ``block`` of its rows for an advantage
    that compares those (see `grpoforge.declarations`), a missing reward counting as 0; the share is
    ``A c_k / sum_k c_k``. For normalizers that are linear in the weighted sum up to a scale per group (mean, mean/std,
    leave-one-out) the shares sum to the advantage; where ``sum_k c_k`` is 0 within `rounding` there is nothing to
    share and an advantage that is not 0 stays unattributed.
    """
    shape, weights = scores.rewards.shape, scores.weights
    rewards = scores.rewards.reshape(-1, block or shape[1], shape[2])
    scored = ~weighted_total(rewards, weights).isnan()
    values = rewards.nan_to_num(nan=0.0) * weights
    count = scored.sum(dim=1, keepdim=True).clamp(min=1)[:, :, None]
    mean = (values * scored[:, :, None]).sum(dim=1, keepdim=True) / count
    centered = (values - mean) * scored[:, :, None]
    whole = centered.sum(dim=2, keepdim=True)
    known = whole.abs() > rounding(rewards, weights)[:, :, None]
    share = torch.where(known, centered / torch.where(known, whole, torch.ones_like(whole)), torch.zeros_like(centered))
    return share.reshape(shape) * advantages.double()[:, :, None]
