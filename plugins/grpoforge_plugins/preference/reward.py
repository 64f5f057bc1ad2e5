"""The reward `preference`: an encoder that learns during the run which completions the other rewards prefer."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from grpoforge.errors import ConfigError, ModelError
from grpoforge.types import weighted_total
from grpoforge_plugins.preference import offline
from grpoforge_plugins.preference.buffer import Buffer, Row, as_pair, as_row
from grpoforge_plugins.preference.corruptions import make_pairs
from grpoforge_plugins.preference.encoder import Encoded, Encoder, Precision, new_vocabulary
from grpoforge_plugins.preference.figures import outcomes
from grpoforge_plugins.preference.learning import Lesson, Teacher, encode_pairs
from grpoforge_plugins.preference.loss import preference_probability
from grpoforge_plugins.preference.pairs import pairs_of_rollouts

if TYPE_CHECKING:
    from grpoforge.types import Rollouts, StepReport

__all__ = ["Preference", "win_rates"]

logger = logging.getLogger(__name__)

RATE_OF_NEW, RATE_OF_TRAINED = 5e-4, 5e-5


class Preference:
    """How often a completion would be preferred to its siblings, minus one half; learned from the run's other rewards.

    ``mean_j sigmoid(h_i - h_j) - 1/2`` over the siblings ``j``: from -1/2 to 1/2, and 0 on average in every group, so
    that the mean reward of the run does not jump when the model begins to speak. Of two completions it is
    ``P(i > j) - 1/2``.

    After each step the pairs of its rollouts, labelled by the weighted total of the *other* rewards, go into a replay
    buffer, and every ``every`` steps an encoder takes ``updates`` AdamW steps of the Bradley-Terry loss on pairs from
    it. The reward abstains (None) until the newest ``min_pairs`` pairs, each judged before it was learned from, were
    judged right at a rate of ``min_accuracy``; and always for a completion without siblings or too long to be read.
    Evaluation has an instance of its own, which learns nothing and always abstains.
    """

    learns_from_others = True

    train = staticmethod(offline.train)
    evaluate = staticmethod(offline.evaluate)
    pairs = staticmethod(make_pairs)

    def __init__(
        self,
        *,
        model: Annotated[str | None, "folder or hub id of an encoder; default: a new small BERT"] = None,
        hidden_size: Annotated[int, Field(ge=32, multiple_of=32), "of a new encoder"] = 128,
        num_layers: Annotated[int, Field(ge=1), "of a new encoder"] = 2,
        max_length: Annotated[int, Field(ge=8), "tokens of prompt and completion at most"] = 512,
        preference_threshold: Annotated[float, Field(ge=0), "smallest gap in reward that makes a pair"] = 0.1,
        every: Annotated[int, Field(ge=1), "steps between updates"] = 1,
        updates: Annotated[int, Field(ge=1), "optimizer steps each time"] = 4,
        batch_size: Annotated[int, Field(ge=1), "pairs per optimizer step"] = 16,
        buffer_size: Annotated[int, Field(ge=1), "pairs remembered"] = 2048,
        learning_rate: Annotated[
            float | None, Field(gt=0), f"default: {RATE_OF_NEW:g} for a new encoder, else {RATE_OF_TRAINED:g}"
        ] = None,
        weight_decay: Annotated[float, Field(ge=0), "of its AdamW"] = 0.01,
        center: Annotated[float, Field(ge=0), "coefficient that keeps the scores around 0"] = 0.01,
        margin: Annotated[float, Field(ge=0), "margin in the loss per unit of the gap in reward"] = 0.0,
        min_pairs: Annotated[
            int, Field(ge=1), "recent pairs that its accuracy is taken over; before, it abstains"
        ] = 128,
        min_accuracy: Annotated[float, Field(ge=0, le=1), "below this accuracy it abstains"] = 0.6,
        precision: Annotated[Precision, "fp32, or bf16 autocast"] = "fp32",
        seed: Annotated[int, Field(ge=0), "fixes new weights and what is replayed"] = 0,
    ) -> None:
        if model is not None and model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
            raise ModelError(
                f"reward option `model` is {model}, and there is no such folder",
                "give the folder of an encoder: config.json, model.safetensors and a tokenizer",
            )
        if buffer_size < batch_size:
            raise ConfigError(
                f"reward option `buffer_size` is {buffer_size}, less than the {batch_size} pairs of an update",
                "raise `buffer_size` or lower `batch_size`",
            )
        rate = RATE_OF_NEW if model is None else RATE_OF_TRAINED
        self.source = model
        self.shape: dict[str, int] = {"hidden_size": hidden_size, "num_layers": num_layers}
        self.encoding: dict[str, Any] = {"max_length": max_length, "seed": seed, "precision": precision}
        self.teaching = {"learning_rate": learning_rate or rate, "weight_decay": weight_decay, "center": center}
        self.threshold, self.margin = preference_threshold, margin
        self.every, self.updates, self.batch_size = every, updates, batch_size
        self.min_pairs, self.min_accuracy = min_pairs, min_accuracy
        self.buffer = Buffer(buffer_size, seed)
        self.recent: deque[float] = deque(maxlen=min_pairs)
        """How the newest pairs were judged before they were learned from: 1 right, 0 wrong, one half undecided."""
        self.num_steps = self.num_updates = 0
        self.vocabulary: list[str] | None = None
        """Of a new encoder: read once, from the first pairs."""
        self.teacher: Teacher | None = None
        self.encoder: Encoder | None = None
        """Of a folder or the hub, from `prepare` on."""

    def prepare(self) -> None:
        """Read the encoder that is named before the first step: one that is not there is missed at once.

        Raises:
            ModelError: it cannot be loaded.
        """
        if self.source is not None and self.encoder is None:
            self.encoder = Encoder.load(self.source, **self.encoding)

    def __call__(self, rollouts: Rollouts) -> list[float | None]:
        """One number, or None, for each of the ``B`` completions."""
        if self.teacher is None or not self.is_trusted:
            return [None] * len(rollouts.flat())
        encoder = self.teacher.encoder
        prompts = [prompt.text for prompt in rollouts.flat_prompts()]
        rows = encoder.encode(prompts, [completion.text for completion in rollouts.flat()])
        scores = measured(encoder, rows).reshape(rollouts.num_prompts, rollouts.group_size)
        found: list[float] = win_rates(scores).flatten().tolist()
        return [None if math.isnan(value) else value for value in found]

    @property
    def is_trusted(self) -> bool:
        """True once it judges pairs that it has not learned from well enough."""
        return len(self.recent) == self.min_pairs and self.accuracy >= self.min_accuracy

    @property
    def accuracy(self) -> float:
        """Over the recent pairs; NaN before there is one."""
        return sum(self.recent) / len(self.recent) if self.recent else math.nan

    def lessons(self, report: StepReport, name: str) -> list[Row]:
        """The pairs of this rank's rollouts, labelled by all rewards but this one, which is called ``name``."""
        own = report.scores.names.index(name)
        others = [place for place in range(len(report.scores.names)) if place != own]
        totals = weighted_total(report.scores.rewards[:, :, others], report.scores.weights[others])
        return [as_row(pair) for pair in pairs_of_rollouts(report.rollouts, totals, self.threshold)]

    def learn(self, lessons: Sequence[Row]) -> dict[str, float]:
        """Judge the pairs of all ranks, remember them, and be taught; returns the metrics ``pref/...``."""
        pairs = [as_pair(row) for row in lessons]
        margin = self._judge(encode_pairs(self.teacher.encoder, pairs)) if self.teacher else math.nan
        self.buffer.add(pairs)
        self.num_steps += 1
        if self.teacher is None and len(self.buffer) >= self.batch_size:
            self.teacher = self._hire()
        is_due = self.teacher is not None and self.num_steps % self.every == 0
        losses = [self._update() for _ in range(self.updates)] if is_due else []
        losses = [loss for loss in losses if not math.isnan(loss)]
        return {
            "pref/accuracy": self.accuracy,
            "pref/margin": margin,
            "pref/loss": sum(losses) / len(losses) if losses else math.nan,
            "pref/buffer": float(len(self.buffer)),
            "pref/pairs": float(len(pairs)),
        }

    def _judge(self, encoded: Sequence[Lesson | None]) -> float:
        """Note how pairs it has not learned from are judged; returns their mean difference in score."""
        lessons = [lesson for lesson in encoded if lesson is not None]
        if self.teacher is None or not lessons:
            return math.nan
        chosen, rejected = self.teacher.measure(lessons)
        self.recent.extend(outcomes(chosen, rejected).tolist())
        return float((chosen - rejected).mean())

    def _update(self) -> float:
        """One optimizer step on pairs of the buffer; returns its loss, NaN where the encoder can read none of them."""
        assert self.teacher is not None
        self.num_updates += 1
        drawn = encode_pairs(self.teacher.encoder, self.buffer.draw(self.batch_size, self.num_updates))
        lessons = [lesson for lesson in drawn if lesson is not None]
        return self.teacher.update(lessons, margin_scale=self.margin) if lessons else math.nan

    def _hire(self) -> Teacher:
        """The encoder and its optimizer: read from its folder, or made for the texts of the first pairs."""
        self.prepare()
        if self.encoder is not None:
            return Teacher(self.encoder, **self.teaching)
        if self.vocabulary is None:
            pairs = self.buffer.pairs
            self.vocabulary = new_vocabulary([text for one in pairs for text in (one.prompt, one.chosen, one.rejected)])
        return Teacher(Encoder.make(self.vocabulary, **self.shape, **self.encoding), **self.teaching)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer, buffer and counters: JSON values and tensors."""
        teacher = self.teacher
        return {
            "num_steps": self.num_steps,
            "num_updates": self.num_updates,
            "recent": list(self.recent),
            "buffer": self.buffer.rows(),
            "vocabulary": self.vocabulary,
            "weights": dict(teacher.encoder.model.state_dict()) if teacher else None,
            "optimizer": teacher.optimizer.state_dict() if teacher else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called; settings stay those of this run."""
        self.num_steps, self.num_updates = state["num_steps"], state["num_updates"]
        self.recent.clear()
        self.recent.extend(state["recent"])
        self.buffer.load(state["buffer"])
        self.vocabulary = state["vocabulary"]
        self.teacher = self._hire() if state["weights"] is not None else None
        if self.teacher is not None:
            self.teacher.encoder.model.load_state_dict(state["weights"])
            self.teacher.load_optimizer(state["optimizer"])


def measured(encoder: Encoder, rows: Sequence[Encoded | None]) -> Tensor:
    """The score of each row, ``[n]`` float64; NaN where the completion is too long to be read."""
    places = [place for place, row in enumerate(rows) if row is not None]
    scores = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    if places:
        scores[places] = encoder.measure([row for row in rows if row is not None]).double()
    return scores


def win_rates(scores: Tensor) -> Tensor:
    """``mean_j sigmoid(h_i - h_j) - 1/2`` over the scored siblings ``j`` of each row, ``[P, G]``; NaN without any."""
    won = preference_probability(scores[:, :, None], scores[:, None, :])
    # A row against itself is one half, or NaN like all of its comparisons: leave it out.
    others = ~torch.eye(scores.shape[1], dtype=torch.bool)
    valid = ~won.isnan() & others
    counts = valid.sum(dim=2)
    total = torch.where(valid, won - 0.5, torch.zeros_like(won)).sum(dim=2)
    return torch.where(counts > 0, total / counts.clamp(min=1), torch.full_like(total, torch.nan))
