"""Teaching an encoder: one optimizer, one update from a few pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpoforge_plugins.preference.encoder import Encoded, Encoder
from grpoforge_plugins.preference.loss import bradley_terry
from grpoforge_plugins.preference.pairs import Pair

__all__ = ["Lesson", "Teacher", "encode_pairs"]

MAX_GRAD_NORM = 1.0

Lesson = tuple[Encoded, Encoded, float]
"""The chosen and the rejected completion of a pair, and its margin."""


def encode_pairs(encoder: Encoder, pairs: Sequence[Pair]) -> list[Lesson | None]:
    """What the encoder reads of each pair; None where one of the completions is too long for it."""
    prompts = [pair.prompt for pair in pairs]
    chosen = encoder.encode(prompts, [pair.chosen for pair in pairs])
    rejected = encoder.encode(prompts, [pair.rejected for pair in pairs])
    return [
        None if better is None or worse is None else (better, worse, pair.margin)
        for better, worse, pair in zip(chosen, rejected, pairs, strict=True)
    ]


class Teacher:
    """An encoder and the AdamW that moves it."""

    def __init__(self, encoder: Encoder, *, learning_rate: float, weight_decay: float, center: float) -> None:
        self.encoder = encoder
        self.center = center
        self.optimizer = torch.optim.AdamW(
            encoder.model.parameters(), lr=learning_rate, weight_decay=weight_decay, foreach=False
        )

    def update(self, lessons: Sequence[Lesson], margin_scale: float = 1.0, rate: float | None = None) -> float:
        """One optimizer step on ``lessons``; returns their Bradley-Terry loss before it.

        Args:
            margin_scale: what the margins are multiplied by.
            rate: the learning rate of this step, when it is not the optimizer's.
        """
        if rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        margins = margin_scale * torch.tensor([margin for *_, margin in lessons], device=self.encoder.device)
        # A reward is called in a thread of its own and grad mode belongs to a thread; say what is meant.
        with torch.enable_grad():
            scores = self.encoder.scores([better for better, *_ in lessons] + [worse for _, worse, _ in lessons])
            chosen, rejected = scores[: len(lessons)], scores[len(lessons) :]
            loss = bradley_terry(chosen, rejected, margins, center=self.center)
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.encoder.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def measure(self, lessons: Sequence[Lesson]) -> tuple[Tensor, Tensor]:
        """Scores of the chosen and of the rejected completions, ``[n]`` float32 each, on the CPU."""
        scores = self.encoder.measure([row for better, worse, _ in lessons for row in (better, worse)])
        return scores[0::2], scores[1::2]

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Take the moments of ``state``; settings such as the learning rate stay those of this run."""
        settings = [{key: group[key] for key in group if key != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, ours in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(ours)
