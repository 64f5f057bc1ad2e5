"""What must hold on inputs chosen to break kernels: the content of a certificate.

Everything runs through the public operations, so what is certified is what training calls: checks, autograd and kernel.
The oracle is the same operation in float64, which is the plain PyTorch definition.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpoforge_kernels import dispatch, ops
from grpoforge_kernels.bench.accuracy import BOUNDS, Bound
from grpoforge_kernels.bench.adversarial_inputs import (
    DTYPES,
    LOSSES,
    ROWS,
    HeadRows,
    Rows,
    head_inputs,
    row_inputs,
    rows_of_losses,
)
from grpoforge_kernels.bench.adversarial_layers import layer_checks
from grpoforge_kernels.bench.adversarial_trees import tree_checks
from grpoforge_kernels.bench.forcing import forced
from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.reference.linear_logprobs import linear_logprobs as defined_logprobs


@dataclass(frozen=True)
class Check:
    """One thing that must hold. ``run`` gives the errors of value and gradient, or raises `Broken`."""

    op: str
    dtype: str
    name: str
    run: Callable[[], tuple[float, float]]

    @property
    def bound(self) -> Bound:
        """What the errors may be."""
        return BOUNDS[self.op, self.dtype]


class Broken(Exception):
    """Something that must hold does not."""


def checks(device: str) -> Iterator[Check]:
    """Every check of the fused backend that is active on ``device``, the quick ones first."""
    for dtype_name, dtype in DTYPES.items():
        for name, rows in row_inputs(dtype):
            yield Check("selective_log_softmax", dtype_name, name, partial(_compare, rows, device))
        for name, law in LAWS.items():
            yield Check("selective_log_softmax", dtype_name, name, partial(law, dtype, device))
        for name, head in head_inputs(dtype):
            for op, run in HEAD_OPS.items():
                yield Check(op, dtype_name, name, partial(_compare_head, head, run, device))
        yield from _loss_checks(dtype_name, device)
    # Triton has neither: elsewhere it is the reference that runs.
    if device == "cpu" and os.environ.get(dispatch.VARIABLE) != "triton":
        yield from _layer_checks()
    for name, options in LOSSES.items():
        yield Check("grpo_loss", "fp32", name, partial(_loss, options, device))


def _layer_checks() -> Iterator[Check]:
    for dtype_name, dtype in DTYPES.items():
        yield from (Check("tree_attention", dtype_name, name, run) for name, run in tree_checks(dtype))
    yield from (Check(op, "fp32", name, run) for op, name, run in layer_checks())


def _loss_checks(dtype_name: str, device: str) -> Iterator[Check]:
    for name, rows in rows_of_losses(DTYPES[dtype_name]):
        for kind in ("clip-higher with k3", "dual clip with k2"):
            run = partial(_loss_from_logits, rows, LOSSES[kind], device)
            yield Check("grpo_loss_from_logits", dtype_name, f"{name}, {kind}", run)


# --- log-probs from logits -------------------------------------------------------------------------------------------


def _evaluated(rows: Rows, upstream: Tensor, **more: Any) -> tuple[list[Tensor], Tensor]:
    """Log-probs, entropy and logsumexp, and the gradient of their sum weighed by ``upstream [3, N]``."""
    leaf = rows.logits.detach().requires_grad_()
    # A leaf is never overwritten, so the operation gets a view.
    stats = ops.selective_log_softmax(leaf.view_as(leaf), rows.ids, rows.temperature, **rows.options, **more)
    total = sum(
        ((value * up.to(value)).sum() for value, up in zip(stats, upstream, strict=True)), start=leaf.new_zeros(())
    )
    (gradient,) = torch.autograd.grad(total, leaf)
    return [value.detach() for value in stats], gradient


def _upstream(num_rows: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, num_rows, generator=generator).to(device)


def _compare(rows: Rows, device: str) -> tuple[float, float]:
    here = rows.at(device)
    upstream = _upstream(len(rows.ids), device)
    values, gradient = _evaluated(here, upstream)
    with forced("reference"):
        exact, exact_gradient = _evaluated(rows.at(device, torch.float64), upstream)
    if gradient.dtype != rows.logits.dtype or any(value.dtype != torch.float32 for value in values):
        raise Broken("the result has another number format than promised")
    if not len(rows.ids):
        return 0.0, 0.0
    value = max(_worst((given - right).abs() / (1 + right.abs())) for given, right in zip(values, exact, strict=True))
    largest = exact_gradient.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    # Half precision cannot show what is below its smallest number, however small a row's gradient is.
    least = torch.finfo(rows.logits.dtype).smallest_normal * torch.finfo(rows.logits.dtype).eps
    error = ((gradient.double() - exact_gradient).abs() - least).clamp(min=0).amax(dim=1)
    # In a row whose token is sure the gradient is 0 but for rounding: measured against what drives it.
    driven = upstream.double().abs().sum(dim=0) * _inverse(here.temperature, len(rows.ids), device)
    return value, _worst(error / torch.maximum(largest, 1e-7 * driven))


def _inverse(temperature: Tensor | float, num_rows: int, device: str) -> Tensor:
    return 1 / torch.as_tensor(temperature, dtype=torch.float64, device=device).expand(num_rows)


def _worst(error: Tensor) -> float:
    worst = float(error.amax())
    return worst if math.isfinite(worst) else math.inf


def _drawn(dtype: torch.dtype, device: str) -> Rows:
    return next(rows for name, rows in row_inputs(dtype) if name == "a temperature for each row").at(device)


def _rows_are_independent(dtype: torch.dtype, device: str) -> tuple[float, float]:
    rows, upstream = _drawn(dtype, device), _upstream(ROWS, device)
    assert isinstance(rows.temperature, Tensor)
    _, together = _evaluated(rows, upstream)
    for row in range(ROWS):
        one = slice(row, row + 1)
        alone = Rows(rows.logits[one].clone(), rows.ids[one], rows.temperature[one])
        _, gradient = _evaluated(alone, upstream[:, one])
        if not torch.equal(gradient, together[one]):
            raise Broken("a row alone has another gradient than in its batch")
    return 0.0, 0.0


def _in_place_changes_nothing(dtype: torch.dtype, device: str) -> tuple[float, float]:
    rows, upstream = _drawn(dtype, device), _upstream(ROWS, device)
    _, apart = _evaluated(rows, upstream)
    spent = Rows(rows.logits.clone(), rows.ids, rows.temperature)
    _, over = _evaluated(spent, upstream, overwrite_logits=True)
    if not torch.equal(apart, over):
        raise Broken("the gradient written over the logits is another one")
    return 0.0, 0.0


def _masked_rows_are_not_read(dtype: torch.dtype, device: str) -> tuple[float, float]:
    rows, upstream = _drawn(dtype, device), _upstream(ROWS, device)
    mask = torch.arange(ROWS, device=device) % 2 == 0
    logits = rows.logits.clone()
    logits[~mask] = math.nan
    values, gradient = _evaluated(Rows(logits, rows.ids, rows.temperature, {"mask": mask}), upstream)
    whole, right = _evaluated(rows, upstream)
    if any(bool(value[~mask].any()) for value in values) or bool(gradient[~mask].any()):
        raise Broken("a masked row is not 0")
    if not all(torch.equal(value[mask], one[mask]) for value, one in zip(values, whole, strict=True)):
        raise Broken("a mask changes the rows that it leaves")
    if not torch.equal(gradient[mask], right[mask]):
        raise Broken("a mask changes the gradient of the rows that it leaves")
    return 0.0, 0.0


def _nan_stays_in_its_row(dtype: torch.dtype, device: str) -> tuple[float, float]:
    rows, upstream = _drawn(dtype, device), _upstream(ROWS, device)
    logits = rows.logits.clone()
    logits[2, 100] = math.nan
    values, gradient = _evaluated(Rows(logits, rows.ids, rows.temperature), upstream)
    others = torch.arange(ROWS, device=device) != 2
    if not all(bool(value[others].isfinite().all()) and bool(value[2].isnan()) for value in values):
        raise Broken("a NaN in one row does not stay in it")
    if not bool(gradient[others].isfinite().all()):
        raise Broken("a NaN in one row reaches the gradient of another")
    return 0.0, 0.0


def _ids_outside_are_refused(dtype: torch.dtype, device: str) -> tuple[float, float]:
    # On an accelerator the assertion stops the stream for good, which is no way to test it.
    for bad in (-1, 1500) if device == "cpu" else ():
        rows = _drawn(dtype, device)
        ids = rows.ids.clone()
        ids[1] = bad
        try:
            ops.selective_log_softmax(rows.logits, ids, 1.0)
        except KernelError:
            continue
        raise Broken(f"the id {bad} is read, not refused")
    return 0.0, 0.0


LAWS: Mapping[str, Callable[[torch.dtype, str], tuple[float, float]]] = {
    "a row alone and in its batch": _rows_are_independent,
    "in place and out of place": _in_place_changes_nothing,
    "masked rows that hold NaN": _masked_rows_are_not_read,
    "NaN in one row": _nan_stays_in_its_row,
    "ids outside the vocabulary": _ids_outside_are_refused,
}


# --- the head and the loss -------------------------------------------------------------------------------------------


def _by_panels(head: HeadRows, upstream: Tensor) -> tuple[list[Tensor], Tensor]:
    stats = ops.linear_logprobs(head.hidden, head.weight, head.ids, 0.9, bias=head.bias, **head.options)
    return [value.detach() for value in stats], _driven_sum(stats, upstream)


def _by_row_chunks(head: HeadRows, upstream: Tensor) -> tuple[list[Tensor], Tensor]:
    seen: list[tuple[Tensor, ...]] = [tuple(upstream.new_zeros(3, 0))]

    def loss(rows: slice, stats: ops.TokenStats) -> Tensor:
        seen.append(tuple(value.detach() for value in stats))
        return _driven_sum(stats, upstream[:, rows])

    num_rows = len(head.ids)
    chunks = [slice(0, num_rows // 3), slice(num_rows // 3, num_rows)]
    total = ops.linear_loss(
        head.hidden, head.weight, head.ids, 0.9, loss, chunks=chunks, bias=head.bias, **head.options
    )  # fmt: skip
    return [torch.cat(values) for values in zip(*seen, strict=True)], total


HEAD_OPS: Mapping[str, Callable[[HeadRows, Tensor], tuple[list[Tensor], Tensor]]] = {
    "linear_logprobs": _by_panels,
    "linear_loss": _by_row_chunks,
}
"""Log-probs, entropy and logsumexp, and their sum weighed by ``upstream [3, N]``."""


def _driven_sum(stats: ops.TokenStats, upstream: Tensor) -> Tensor:
    return torch.stack([(value * up.to(value)).sum() for value, up in zip(stats, upstream, strict=True)]).sum()


def _compare_head(
    head: HeadRows, run: Callable[[HeadRows, Tensor], tuple[list[Tensor], Tensor]], device: str
) -> tuple[float, float]:
    upstream = _upstream(len(head.ids), device)
    upstream[:, ::4] = 0
    results = []
    for dtype in (head.hidden.dtype, torch.float64):
        here = head.at(device, dtype)
        leaves = [one.detach().requires_grad_() for one in here.leaves]
        here = replace(here, weight=leaves[-1], hidden=here.hidden if here.exact else leaves[0])
        with forced("reference") if dtype == torch.float64 else nullcontext():
            values, total = run(here, upstream) if dtype != torch.float64 else _defined(here, upstream)
            results.append((values, torch.autograd.grad(total, leaves)))
    (values, gradients), (exact, exact_gradients) = results
    if not len(head.ids):
        return 0.0, _worst(torch.stack([one.abs().amax() for one in gradients if one.numel()]))
    value = max(_worst((given - right).abs() / (1 + right.abs())) for given, right in zip(values, exact, strict=True))
    return value, max(
        _worst((given.double() - right).norm() / right.norm())
        for given, right in zip(gradients, exact_gradients, strict=True)
    )


def _defined(head: HeadRows, upstream: Tensor) -> tuple[list[Tensor], Tensor]:
    stats = defined_logprobs(head.hidden, head.weight, head.ids, 0.9, bias=head.bias, **head.options)
    return [value.detach() for value in stats], _driven_sum(stats, upstream)


def _loss(options: Mapping[str, Any], device: str) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(3)
    shape = (5, 37)
    logprobs = -torch.rand(shape, generator=generator) * 5
    old, ref = (logprobs + spread * torch.randn(shape, generator=generator) for spread in (0.6, 0.3))
    mask = torch.rand(shape, generator=generator) < 0.8
    mask[3] = False
    advantages = torch.randn(shape, generator=generator)
    weights = mask.double() / mask.sum()
    inputs = [one.to(device) for one in (logprobs, old, ref if options["kl"] else logprobs, advantages)]
    mask, weights = mask.to(device), weights.to(device)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf, *fixed = (one.to(dtype) for one in inputs)
        leaf = leaf.detach().requires_grad_()
        ref_ = fixed[1] if options["kl"] else None
        with forced("reference") if dtype == torch.float64 else nullcontext():
            loss = ops.grpo_loss(leaf, fixed[0], ref_, fixed[2], mask, weights, **options).loss
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    (loss, gradient), (right, right_gradient) = results
    if bool(gradient[~mask].any()):
        raise Broken("a masked token has a gradient")
    value = _worst((loss.double() - right.double()).abs() / (1 + right.abs()))
    return value, _worst((gradient.double() - right_gradient).abs()) / float(right_gradient.abs().amax())


def _loss_from_logits(rows: Rows, options: Mapping[str, Any], device: str) -> tuple[float, float]:
    """Errors of a row are relative to 1 + |log-prob| too: that is how exact the log-prob that drives it can be."""
    num_rows = len(rows.ids)
    exact_rows = rows.at(device, torch.float64)
    with forced("reference"):
        logprobs = ops.selective_log_softmax(
            exact_rows.logits, exact_rows.ids, exact_rows.temperature, **exact_rows.options
        ).logprobs
    # Ratios far from where a clip binds, on both sides of it, so that rounding never decides.
    steps = torch.tensor([0.05, -0.1, 0.5, -0.7, 0.1, -0.05], dtype=torch.float64, device=device)[:num_rows]
    advantages = torch.tensor([1.0, -0.5, 0.8, -1.2, 0.3, -2.0], device=device)[:num_rows]
    fixed = ((logprobs - steps).float(), (logprobs + 0.3).float(), advantages)
    weights = torch.full((num_rows,), 1 / max(1, num_rows), dtype=torch.float64, device=device)
    results = []
    for here in (rows.at(device), exact_rows):
        leaf = here.logits.detach().requires_grad_()
        is_exact = leaf.dtype == torch.float64
        old, ref, gains = (one.to(torch.promote_types(leaf.dtype, torch.float32)) for one in fixed)
        with forced("reference") if is_exact else nullcontext():
            loss, stats = ops.grpo_loss_from_logits(
                leaf.view_as(leaf),
                here.ids,
                here.temperature,
                old,
                ref,
                gains,
                weights,
                **{**here.options, **options},
            )
            results.append((loss.loss.detach(), stats, torch.autograd.grad(loss.loss, leaf)[0]))
    if not num_rows:
        return float(results[0][0].abs()), 0.0
    return _errors_of_rows(*results[0], *results[1], steepness=_inverse(rows.temperature, num_rows, "cpu").to(device))


def _errors_of_rows(
    loss: Tensor, stats: ops.TokenStats, gradient: Tensor, exact_loss: Tensor, exact_stats: ops.TokenStats,
    exact_gradient: Tensor, *, steepness: Tensor,
) -> tuple[float, float]:  # fmt: skip
    size = 1 + exact_stats.logprobs.abs()
    values = [_worst((one - right).abs() / (1 + right.abs())) for one, right in zip(stats, exact_stats, strict=True)]
    values.append(_worst((loss - exact_loss).abs() / (1 + exact_loss.abs()) / size.amax()))
    least = torch.finfo(gradient.dtype).smallest_normal * torch.finfo(gradient.dtype).eps
    error = ((gradient.double() - exact_gradient).abs() - least).clamp(min=0).amax(dim=1)
    largest = torch.maximum(exact_gradient.abs().amax(dim=1), 1e-7 * steepness / len(size))
    return max(values), _worst(error / largest / size)
