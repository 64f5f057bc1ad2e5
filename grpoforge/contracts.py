"""What plugins compute, checked where it enters the step: broadcasting would make a wrong gradient of a wrong shape.

Shapes only inside a micro-batch, never values, so no device is ever synchronised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from grpoforge.binding import Bound
from grpoforge.declarations import unbound
from grpoforge.errors import PluginError
from grpoforge.metrics import Totals
from grpoforge.types import Loss, LossInputs

PER_TOKEN = "a loss returns per-token values and normalizes nothing"
PAIR = f"return `(per_token_loss, metrics)`: {PER_TOKEN}"


def advantages_of(advantage: Bound, data: Mapping[str, Tensor]) -> tuple[Tensor, Totals]:
    """What ``advantage`` makes of the rewards: ``[P, G]``, finite and without gradient, and metrics as totals.

    Args:
        data: by the names of `grpoforge.binding.ADVANTAGE_DATA`.

    Raises:
        PluginError: it returned anything else.
    """
    output: Any = advantage(data)
    source = f"advantage `{_name(advantage.function)}` returned"
    advantages, totals = output if _is_pair(output) else (output, {})
    _check_shape(source, advantages, data["rewards"].shape[:2], "return one number per completion")
    _check_totals(source, totals)
    if advantages.requires_grad:
        raise PluginError(f"{source} a tensor with a gradient", "detach it: a loss treats advantages as constants")
    wrong = (~advantages.isfinite()).nonzero().tolist()
    if wrong:
        prompt, completion = wrong[0]
        value = float(advantages[prompt, completion])
        raise PluginError(
            f"{source} {value} for completion {completion} of prompt {prompt}",
            "return finite numbers, and 0 where no reward scored the row",
        )
    return advantages, dict(totals)


def _is_pair(output: object) -> bool:
    return isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Mapping)


def _check_totals(source: str, totals: Mapping[object, object]) -> None:
    """Two finite numbers for each name: what is not finite would spoil the average of every rank."""
    for name, pair in totals.items():
        numbers = pair if isinstance(pair, tuple) and len(pair) == 2 else (None,)
        if not all(isinstance(number, float | int) and math.isfinite(number) for number in numbers):
            raise PluginError(f"{source} as metric `{name}` {pair!r}", "a metric is `(sum, count)`, two numbers")


def loss_of(loss: Loss, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
    """What ``loss`` makes of a micro-batch: per-token loss and metrics, ``[b, T]`` each.

    Raises:
        PluginError: it returned anything else.
    """
    output: Any = loss(inputs)
    source = f"loss `{_name(loss)}` returned"
    if not _is_pair(output):
        raise PluginError(f"{source} {_describe(output)}", PAIR)
    per_token_loss, metrics = output
    shape = inputs.completion_mask.shape
    _check_shape(f"{source} as per-token loss", per_token_loss, shape, PER_TOKEN)
    for name, values in metrics.items():
        _check_shape(f"{source} as metric `{name}`", values, shape, "metrics are per-token values too")
    return per_token_loss, metrics


def kl_of(kl: Bound, data: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """What ``kl`` makes of the log-probs, a tensor of ``shape``.

    Raises:
        PluginError: it returned anything else.
    """
    estimate: Tensor = kl(data)
    hint = "a KL estimator returns per-token values and normalizes nothing"
    _check_shape(f"KL estimator `{_name(kl.function)}` returned", estimate, shape, hint)
    return estimate


def correction_of(correction: Bound, data: Mapping[str, Tensor]) -> Tensor:
    """What ``correction`` makes of the log-probs: a weight per token, ``[b, T]`` without gradient.

    Raises:
        PluginError: it returned anything else.
    """
    weights: Tensor = correction(data)
    source = f"correction `{_name(correction.function)}` returned"
    hint = "a correction returns one weight per token"
    _check_shape(source, weights, data["completion_mask"].shape, hint)
    if weights.requires_grad:
        raise PluginError(f"{source} a tensor with a gradient", "detach it: its weights are constants")
    return weights


def _check_shape(source: str, value: object, shape: Sequence[int], hint: str) -> None:
    if not isinstance(value, Tensor) or value.shape != shape:
        raise PluginError(f"{source} {_describe(value)}, not a tensor of shape {list(shape)}", hint)


def _describe(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _name(component: object) -> str:
    """Of a function, also with options bound, its name; of an object that of its class."""
    function = unbound(component)
    return str(getattr(function, "__name__", type(function).__name__))
