"""Gradients against finite differences, with stop-gradients held fixed.

The gradient of ``x.detach() * y`` is not the slope of its value, on purpose. So the differences are taken of the
function in which every stop-gradient returns what it returned at the point itself: of that function autograd must give
the slope, whatever is detached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from grpoforge.testing.kit import Broken

STEP = 1e-6
TOLERANCE = 1e-6
"""Relative to ``1 + |slope|``: central differences in float64 are good to about 1e-9."""

CONSTANTS = ("_like", "new_")
"""In the names of functions that take a tensor for its shape alone."""

Function = Callable[[Tensor], Tensor]


class StopGradients(TorchFunctionMode):
    """Inside, everything that drops a gradient is recorded, or replaced by what was recorded before."""

    def __init__(self, recorded: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.recorded = recorded
        self.seen: list[Tensor] = []
        self.num_deliberate = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not _drops_gradient(result, (*args, *kwargs.values())):
            return result
        if self.recorded is not None and len(self.seen) < len(self.recorded):
            result = self.recorded[len(self.seen)].clone()
        self.seen.append(result.clone())
        self.num_deliberate += not any(part in getattr(func, "__name__", "") for part in CONSTANTS)
        return result


def _drops_gradient(result: Any, arguments: Sequence[Any]) -> bool:
    if not isinstance(result, Tensor) or not result.is_floating_point() or result.requires_grad:
        return False
    flat = [one for value in arguments for one in (value if isinstance(value, list | tuple) else (value,))]
    return any(isinstance(one, Tensor) and one.requires_grad for one in flat)


@dataclass(frozen=True, slots=True)
class Slope:
    """The largest disagreement that was found, and how many stop-gradients were held fixed."""

    gap: float
    num_elements: int
    num_stops: int

    def __str__(self) -> str:
        stops = f"; {self.num_stops} stop-gradients held fixed" if self.num_stops else ""
        return f"largest difference {self.gap:.1e} at {self.num_elements} places{stops}"


def gradient(function: Function, at: Tensor) -> Tensor:
    """The gradient of ``function``, a scalar, at the point ``at``.

    Raises:
        Broken: nothing of the point reaches the value.
    """
    point = at.detach().clone().requires_grad_()
    value = function(point)
    if not value.requires_grad:
        raise Broken("it has no gradient at all: something detaches the log-probs, or runs under `no_grad`")
    found = torch.autograd.grad(value, point, allow_unused=True)[0]
    return torch.zeros_like(at) if found is None else found


def compare_slopes(function: Function, at: Tensor, where: Tensor) -> Slope:
    """Compare autograd with central differences at the elements of ``at`` where ``where`` is True.

    A kink (the slopes of the two sides differ) is passed over.

    Raises:
        Broken: they differ.
    """
    with StopGradients() as stops:
        found = gradient(function, at)
    center = float(_held(function, at, stops.seen))
    worst, num_elements = 0.0, 0
    for index in where.nonzero().tolist():
        place = tuple(index)
        above, below = (float(_held(function, _moved(at, place, step), stops.seen)) for step in (STEP, -STEP))
        right, left = (above - center) / STEP, (center - below) / STEP
        slope = (above - below) / (2 * STEP)
        if abs(right - left) > 1e-3 * (1 + abs(slope)):
            continue
        gap = abs(float(found[place]) - slope) / (1 + abs(slope))
        if not gap <= TOLERANCE:
            raise Broken(f"at {list(place)} autograd gives {float(found[place]):.6g}, finite differences {slope:.6g}")
        worst, num_elements = max(worst, gap), num_elements + 1
    return Slope(worst, num_elements, stops.num_deliberate)


def _moved(at: Tensor, place: tuple[int, ...], step: float) -> Tensor:
    moved = at.clone()
    moved[place] += step
    return moved


def _held(function: Function, at: Tensor, recorded: Sequence[Tensor]) -> Tensor:
    """The value at ``at`` with every stop-gradient as it was recorded."""
    with StopGradients(recorded):
        return function(at.detach().clone().requires_grad_()).detach()
