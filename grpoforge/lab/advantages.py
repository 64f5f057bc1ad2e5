"""Advantages: is the expected policy gradient the gradient of the expected reward, and which prompts does it favor?

A batch of two prompts, one hard and one easy, each with its own small policy and known rewards. Every batch of
completions is enumerated as long as there are few; for larger groups batches are sampled. Then the weight of a prompt
by its difficulty: rewards of 0 and 1, a prompt whose completions are right with probability ``p``, beside two others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpoforge.binding import bind
from grpoforge.contracts import advantages_of
from grpoforge.declarations import declared
from grpoforge.lab.moments import Estimate, compare
from grpoforge.lab.policies import SoftmaxPolicy, completions
from grpoforge.registry import Component
from grpoforge.testing.kit import Broken, foreign

EXACT_GROUPS = (2, 4)
"""Group sizes whose batches are enumerated."""
SAMPLED_GROUPS = (8,)
"""Group sizes whose batches are sampled."""
LOGITS = (((0.2, -0.2), (-0.3, 0.3), (0.8, -0.8)), ((-0.4, 0.4), (0.5, -0.5), (-0.1, 0.1)))
"""Of each prompt's policy: to end or to go on, before each of up to three tokens."""
REWARDS = ((0.0, 0.0, 1.0, 0.1), (0.9, 1.0, 0.7, 1.0))
"""Of each prompt: for its completions of one token, two tokens, three that end and three that are cut."""

DIFFICULTIES = tuple(tenths / 10 for tenths in range(1, 10))
"""Probabilities ``p`` that a completion is right."""
NEIGHBORS = (0.2, 0.8)
"""Probabilities ``p`` of the other prompts of the batch."""
CURVE_GROUP = 8
"""Completions per prompt there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageRow:
    """What is known of one advantage."""

    id: str
    name: str
    groups: Mapping[int, Estimate | None]
    """By completions per prompt: the policy gradient against that of the expected reward; None: it needs more."""
    weight_by_difficulty: tuple[float, ...]
    """The expected gradient of a prompt over its true gradient, at each of `DIFFICULTIES`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt of the laboratory: its policy and what its completions are worth."""

    policy: SoftmaxPolicy
    rewards: Tensor
    """``[N]`` float64."""


def prompts() -> tuple[Prompt, ...]:
    """The prompts that are measured on: completions of one to three tokens."""
    space = completions(2, 3, can_end=True)
    return tuple(
        Prompt(policy=SoftmaxPolicy(space=space, logits=_double(logits)), rewards=_double(rewards))
        for logits, rewards in zip(LOGITS, REWARDS, strict=True)
    )


def measure_advantage(component: Component, options: Mapping[str, Any], *, samples: int, seed: int) -> AdvantageRow:
    """What the advantage ``component`` is worth with ``options``; sampled where groups are large.

    Raises:
        Broken: it raised, returned what cannot be used, or depends on the order of the rows.
    """
    batch = prompts()
    with foreign():
        built = component.build(options)
    block = block_of(component)
    min_group = max(declared(built, "min_group", 2), block)
    groups: dict[int, Estimate | None] = {}
    for size in (*EXACT_GROUPS, *SAMPLED_GROUPS):
        if size < min_group or size % block:
            groups[size] = None
        elif size in EXACT_GROUPS:
            groups[size] = exactly(component, options, batch, size)
        else:
            groups[size] = by_samples(component, options, batch, size, samples=samples, seed=seed)
    curve = weight_by_difficulty(component, options)
    return AdvantageRow(id=component.id, name=component.name, groups=groups, weight_by_difficulty=curve)


def exactly(component: Component, options: Mapping[str, Any], batch: Sequence[Prompt], size: int) -> Estimate:
    """The gradient over all batches of groups of ``size``, each group as a multiset of blocks of completions."""
    drawn, weights = every_batch([one.policy.probabilities for one in batch], size, block_of(component))
    advantages = _ask(component, options, batch, drawn)
    _check_order(component, options, batch, drawn, advantages)
    return compare(weights, _gradients(batch, drawn, advantages), _true(batch), num_rows=len(batch) * size)


def by_samples(
    component: Component, options: Mapping[str, Any], batch: Sequence[Prompt], size: int, *, samples: int, seed: int
) -> Estimate:
    """The gradient over ``samples`` batches of groups of ``size``, drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    columns = [
        torch.multinomial(one.policy.probabilities, samples * size, replacement=True, generator=generator)
        for one in batch
    ]
    drawn = torch.stack([column.reshape(samples, size) for column in columns], dim=1)
    gradients = _gradients(batch, drawn, _ask(component, options, batch, drawn))
    weights = torch.full((samples,), 1 / samples, dtype=torch.float64)
    return compare(weights, gradients, _true(batch), num_rows=len(batch) * size, num_samples=samples)


def weight_by_difficulty(component: Component, options: Mapping[str, Any]) -> tuple[float, ...]:
    """For each of `DIFFICULTIES` the expected gradient of such a prompt over its true gradient ``p (1 - p)``, exactly.

    Groups of `CURVE_GROUP`, one token each. The gradient is that by the log-odds of being right.
    """
    space = completions(2, 1)
    coin = Prompt(policy=SoftmaxPolicy(space=space, logits=torch.zeros(1, 2).double()), rewards=_double((0.0, 1.0)))
    batch = (coin,) * (1 + len(NEIGHBORS))
    block = block_of(component)
    drawn, _ = every_batch([_coin(0.5)] * len(batch), CURVE_GROUP, block)
    advantages = _ask(component, options, batch, drawn)[:, 0]
    curve = []
    for p in DIFFICULTIES:
        _, weights = every_batch([_coin(p), *map(_coin, NEIGHBORS)], CURVE_GROUP, block)
        expected = weights @ (advantages * (drawn[:, 0].double() - p)).mean(dim=1)
        curve.append(float(expected) / (p * (1 - p)))
    return tuple(curve)


def block_of(component: Component) -> int:
    """Rows of a group that the advantage compares with one another: those of a pair, or single rows."""
    block: int = declared(component.factory, "block", 1)
    return block


def every_batch(probabilities: Sequence[Tensor], size: int, block: int = 1) -> tuple[Tensor, Tensor]:
    """Every batch of one group of ``size`` completions per prompt, ``[M, P, size]``, and its probability ``[M]``.

    A group is a multiset of blocks, a block a multiset of ``block`` completions.
    """
    blocks = _multisets(len(probabilities[0]), block)
    groups = _multisets(len(blocks), size // block)
    chances = [_chances(_chances(one, blocks), groups) for one in probabilities]
    chosen = torch.tensor(list(itertools.product(range(len(groups)), repeat=len(probabilities))))
    weights = torch.stack([one[chosen[:, index]] for index, one in enumerate(chances)]).prod(dim=0)
    return blocks[groups].reshape(len(groups), size)[chosen], weights


def _multisets(count: int, size: int) -> Tensor:
    """Every multiset of ``size`` of the numbers below ``count``, one a row."""
    return torch.combinations(torch.arange(count), r=size, with_replacement=True)


def _chances(probabilities: Tensor, multisets: Tensor) -> Tensor:
    """The probability of each row of ``multisets``, in whatever order it is drawn."""
    counts = torch.nn.functional.one_hot(multisets, len(probabilities)).sum(dim=1)
    orders = math.factorial(multisets.shape[1]) / torch.exp(torch.lgamma(counts.double() + 1).sum(dim=1))
    return orders.round() * probabilities[multisets].prod(dim=1)


def _ask(component: Component, options: Mapping[str, Any], batch: Sequence[Prompt], drawn: Tensor) -> Tensor:
    """The advantages of each batch of ``drawn [M, P, G]``; each is the first one of an instance with a state."""
    rewards = torch.stack([one.rewards[drawn[:, index]] for index, one in enumerate(batch)], dim=1)
    lengths = torch.stack([one.policy.space.lengths[drawn[:, index]] for index, one in enumerate(batch)], dim=1)
    one, temperatures = torch.ones(1, dtype=torch.float64), torch.ones_like(rewards[0])
    found = []
    with foreign():
        bound = bind("advantage", component.build(options))
        for number in range(len(drawn)):
            data = {"rewards": rewards[number, :, :, None], "weights": one, "lengths": lengths[number]}
            if hasattr(bound.function, "state_dict"):
                bound = bind("advantage", component.build(options))
            found.append(advantages_of(bound, {**data, "temperatures": temperatures})[0].double())
    return torch.stack(found)


def _check_order(
    component: Component, options: Mapping[str, Any], batch: Sequence[Prompt], drawn: Tensor, advantages: Tensor
) -> None:
    some = slice(0, len(drawn), max(len(drawn) // 10, 1))
    turned = _ask(component, options, batch, drawn[some].flip(2)).flip(2)
    if bool(((turned - advantages[some]).abs() > 1e-9 * (1 + advantages[some].abs())).any()):
        raise Broken("its values depend on the order of the rows, so groups cannot be enumerated")


def _gradients(batch: Sequence[Prompt], drawn: Tensor, advantages: Tensor) -> Tensor:
    """``mean over rows of A grad log pi`` of each batch, by the logits of all prompts, ``[M, P * D]``."""
    parts = [
        torch.einsum("mg,mgd->md", advantages[:, index], one.policy.sequence_scores[drawn[:, index]])
        for index, one in enumerate(batch)
    ]
    return torch.cat(parts, dim=1) / (drawn.shape[1] * drawn.shape[2])


def _true(batch: Sequence[Prompt]) -> Tensor:
    """The gradient of the mean expected reward by the logits of all prompts, ``[P * D]``."""
    return torch.cat([one.policy.slope_of_mean(one.rewards) for one in batch]) / len(batch)


def _coin(p: float) -> Tensor:
    return _double((1 - p, p))


def _double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
