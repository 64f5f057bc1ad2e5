"""Softmax policies over a few tokens: every completion enumerated, every derivative a formula, all in float64."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

EOS = 0
"""The token that ends a completion, where completions end by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Every completion that there is, ``N`` of them, and the state (the prefix) that each of its tokens follows."""

    tokens: Tensor
    """``[N, T]`` int64; 0 where masked."""
    states: Tensor
    """``[N, T]`` int64, counted from 0; 0 where masked."""
    mask: Tensor
    """``[N, T]`` bool, True on tokens of the completion."""
    num_states: int
    vocabulary: int

    @property
    def lengths(self) -> Tensor:
        """``[N]`` float64, in tokens."""
        return self.mask.sum(dim=1).double()


def completions(vocabulary: int, length: int, *, can_end: bool = False) -> Space:
    """All completions of ``length`` tokens; with ``can_end`` those too that `EOS` ends before."""
    rows = [
        row
        for size in range(1, length + 1)
        for row in itertools.product(range(vocabulary), repeat=size)
        if _is_whole(row, length, can_end)
    ]
    numbers: dict[tuple[int, ...], int] = {}
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    states, mask = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = True
        for place in range(len(row)):
            states[index, place] = numbers.setdefault(row[:place], len(numbers))
    return Space(tokens=tokens, states=states, mask=mask, num_states=len(numbers), vocabulary=vocabulary)


def _is_whole(row: tuple[int, ...], length: int, can_end: bool) -> bool:
    if not can_end:
        return len(row) == length
    return EOS not in row[:-1] and (len(row) == length or row[-1] == EOS)


@dataclass(frozen=True, kw_only=True)
class SoftmaxPolicy:
    """One softmax per state. Its parameters are the logits, ``D = S * V`` of them.

    What follows from them is computed once: hand out copies.
    """

    space: Space
    logits: Tensor
    """``[S, V]`` float64."""

    @functools.cached_property
    def distributions(self) -> Tensor:
        """Log-probs of every token at every state, ``[S, V]``."""
        return self.logits.log_softmax(dim=1)

    @functools.cached_property
    def logprobs(self) -> Tensor:
        """Log-probs of the tokens of every completion, ``[N, T]``; 0 where masked."""
        chosen = self.distributions[self.space.states, self.space.tokens]
        return torch.where(self.space.mask, chosen, torch.zeros_like(chosen))

    @functools.cached_property
    def probabilities(self) -> Tensor:
        """Probability of every completion, ``[N]``; they sum to 1."""
        return self.logprobs.sum(dim=1).exp()

    @functools.cached_property
    def entropy(self) -> Tensor:
        """Entropy in nats of the distribution that each token came from, ``[N, T]``; 0 where masked."""
        by_state = -(self.distributions.exp() * self.distributions).sum(dim=1)
        return torch.where(self.space.mask, by_state[self.space.states], 0.0)

    @functools.cached_property
    def scores(self) -> Tensor:
        """Derivative of every token's log-prob by the logits, ``[N, T, D]``; 0 where masked."""
        space, at_token = self.space, torch.nn.functional.one_hot(self.space.tokens, self.space.vocabulary)
        slope = at_token - self.distributions.exp()[space.states]
        at_state = torch.nn.functional.one_hot(space.states, space.num_states) * space.mask[:, :, None]
        return (at_state[:, :, :, None] * slope[:, :, None, :]).flatten(2)

    @functools.cached_property
    def sequence_scores(self) -> Tensor:
        """Derivative of every completion's log-prob by the logits, ``[N, D]``."""
        return self.scores.sum(dim=1)

    def slope_of_mean(self, values: Tensor) -> Tensor:
        """The derivative of the expectation of ``values [N]``, constants, by the logits, ``[D]``."""
        # A constant baseline changes nothing but the rounding.
        mean = self.probabilities @ values
        return (self.probabilities * (values - mean)) @ self.sequence_scores

    def moved(self, direction: Tensor, distance: float) -> SoftmaxPolicy:
        """The policy whose logits lie ``distance * direction [S, V]`` from these."""
        return SoftmaxPolicy(space=self.space, logits=self.logits + distance * direction)


def random_policy(space: Space, seed: int, *, spread: float = 1.0) -> SoftmaxPolicy:
    """A policy whose logits are normal with standard deviation ``spread``, fixed by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(space.num_states, space.vocabulary, generator=generator, dtype=torch.float64)
    return SoftmaxPolicy(space=space, logits=spread * logits)
