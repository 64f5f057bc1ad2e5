"""Training and measuring a preference model on files of pairs: what `grpoforge preference` calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from grpoforge.errors import DataError
from grpoforge_plugins.preference.encoder import Encoder, Precision, new_vocabulary
from grpoforge_plugins.preference.figures import assess
from grpoforge_plugins.preference.learning import Lesson, Teacher, encode_pairs
from grpoforge_plugins.preference.pairs import Pair, read_pairs

__all__ = ["evaluate", "train"]

logger = logging.getLogger(__name__)

BUCKET = 16
"""Batches whose pairs are sorted by length together: little padding, and still a random order."""

Progress = Callable[[int, int, float], None]
"""Told the update just made, the number of all, and its loss."""


def train(
    pairs: Path,
    output: Path,
    progress: Progress,
    *,
    model: Annotated[str | None, "folder or hub id of an encoder; default: a new small BERT"] = None,
    hidden_size: Annotated[int, Field(ge=32, multiple_of=32), "of a new encoder"] = 128,
    num_layers: Annotated[int, Field(ge=1), "of a new encoder"] = 2,
    epochs: Annotated[int, Field(ge=1), "passes over the pairs"] = 1,
    batch_size: Annotated[int, Field(ge=1), "pairs per update"] = 16,
    learning_rate: Annotated[float, Field(gt=0), "peak; warms up over a tenth of the updates, then falls to 0"] = 5e-5,
    weight_decay: Annotated[float, Field(ge=0), "of AdamW"] = 0.01,
    center: Annotated[float, Field(ge=0), "coefficient that keeps the scores around 0"] = 0.01,
    preference_threshold: Annotated[float, Field(ge=0), "leave out pairs whose margin column is below"] = 0.0,
    max_length: Annotated[int, Field(ge=8), "tokens of prompt and completion at most"] = 512,
    long_completions: Annotated[Literal["stop", "drop"], "stop at pairs that are too long, or leave them out"] = "stop",
    precision: Annotated[Precision, "fp32, or bf16 autocast"] = "fp32",
    seed: Annotated[int, Field(ge=0), "fixes new weights and the order of the pairs"] = 0,
) -> dict[str, Any]:
    """Teach an encoder the pairs of a file and write it to the folder ``output``; returns what happened.

    Raises:
        DataError: the file cannot be used, or no pair is left.
        ModelError: the encoder cannot be used.
    """
    given = read_pairs(pairs)
    kept = [pair for pair in given if pair.margin >= preference_threshold]
    if not kept:
        raise DataError(
            f"none of the {len(given)} pairs of {pairs} has a margin of at least {preference_threshold:g}",
            "lower `preference_threshold`",
        )
    if model is None:
        texts = [text for pair in kept for text in (pair.prompt, pair.chosen, pair.rejected)]
        shape: dict[str, Any] = {"hidden_size": hidden_size, "num_layers": num_layers}
        encoder = Encoder.make(new_vocabulary(texts), **shape, max_length=max_length, seed=seed, precision=precision)
    else:
        encoder = Encoder.load(model, max_length=max_length, seed=seed, precision=precision)
    lessons = readable(encoder, kept, long_completions)
    teacher = Teacher(encoder, learning_rate=learning_rate, weight_decay=weight_decay, center=center)
    started = time.perf_counter()
    losses = run_through(teacher, lessons, Course(epochs, batch_size, learning_rate, seed), progress)
    output.mkdir(parents=True, exist_ok=True)
    encoder.save(output)
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        "pairs": len(lessons),
        "left_out": len(given) - len(lessons),
        "updates": len(losses),
        "loss_first": losses[0],
        "loss_last_tenth": sum(tail) / len(tail),
        "seconds": time.perf_counter() - started,
        "num_parameters": sum(parameter.numel() for parameter in encoder.model.parameters()),
        "output": str(output),
    }


@dataclass(frozen=True, slots=True)
class Course:
    """How pairs are gone through."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int


def run_through(teacher: Teacher, lessons: Sequence[Lesson], course: Course, progress: Progress) -> list[float]:
    """Every update of the course, in an order drawn from its seed; returns their losses."""
    batches = [batch for epoch in range(course.epochs) for batch in _batches(lessons, course, epoch)]
    losses = []
    for number, batch in enumerate(batches):
        rate = course.learning_rate * _schedule(number, len(batches))
        losses.append(teacher.update([lessons[place] for place in batch], rate=rate))
        progress(number + 1, len(batches), losses[-1])
    return losses


def _batches(lessons: Sequence[Lesson], course: Course, epoch: int) -> Iterator[list[int]]:
    """The lessons in a random order, those of like length together."""
    generator = torch.Generator().manual_seed(course.seed + epoch)
    order: list[int] = torch.randperm(len(lessons), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), BUCKET * course.batch_size):
        part = sorted(order[start : start + BUCKET * course.batch_size], key=lambda place: -_length(lessons[place]))
        batches += [part[first : first + course.batch_size] for first in range(0, len(part), course.batch_size)]
    yield from (batches[place] for place in torch.randperm(len(batches), generator=generator).tolist())


def _length(lesson: Lesson) -> int:
    return max(len(lesson[0]), len(lesson[1]))


def _schedule(number: int, total: int) -> float:
    """The share of the peak rate at update ``number``: linear up over a tenth of all, then linear down to 0."""
    warmup = max(1, total // 10)
    return min((number + 1) / warmup, (total - number) / max(1, total - warmup))


def readable(encoder: Encoder, pairs: Sequence[Pair], long_completions: Literal["stop", "drop"]) -> list[Lesson]:
    """``pairs`` as the encoder reads them.

    Raises:
        DataError: a completion is too long for the encoder and is not to be left out; every one is.
    """
    encoded = encode_pairs(encoder, pairs)
    long = [pair for pair, lesson in zip(pairs, encoded, strict=True) if lesson is None]
    if long and (long_completions == "stop" or len(long) == len(pairs)):
        raise DataError(
            f"{long[0].origin}: a completion does not fit into the {encoder.max_length} tokens of the encoder"
            + (f" (nor do those of {len(long) - 1} more of {len(pairs)} pairs)" if len(long) > 1 else ""),
            "shorten it, raise `max_length` if the encoder allows, or leave such pairs out with "
            "`--set long_completions=drop`",
        )
    if long:
        logger.warning("left out %d of %d pairs with a completion of more than %d tokens; the first is %s",
                       len(long), len(pairs), encoder.max_length, long[0].origin)  # fmt: skip
    return [lesson for lesson in encoded if lesson is not None]


def evaluate(
    model: str,
    pairs: Path,
    *,
    max_length: Annotated[int, Field(ge=8), "tokens of prompt and completion at most"] = 512,
    long_completions: Annotated[Literal["stop", "drop"], "stop at pairs that are too long, or leave them out"] = "stop",
    batch_size: Annotated[int, Field(ge=1), "completions per forward pass"] = 64,
    precision: Annotated[Precision, "fp32, or bf16 autocast"] = "fp32",
) -> dict[str, Any]:
    """Accuracy, calibration and length bias of the preference model in the folder ``model`` on the pairs of a file.

    Raises:
        DataError: the file cannot be used.
        ModelError: there is no preference model in the folder.
    """
    given = read_pairs(pairs)
    encoder = Encoder.load(model, max_length=max_length, seed=0, trained=True, precision=precision)
    if long_completions == "drop":
        readable(encoder, given, long_completions)
        given = [pair for pair, lesson in zip(given, encode_pairs(encoder, given), strict=True) if lesson is not None]
    lessons = readable(encoder, given, "stop")
    chosen = encoder.measure([better for better, *_ in lessons], batch_size)
    # By itself and among other rows, as another caller would ask: the two orders must still agree.
    rejected = encoder.measure([worse for _, worse, _ in lessons], batch_size)
    swapped = encoder.measure([row for better, worse, _ in reversed(lessons) for row in (worse, better)], batch_size)
    return assess(
        chosen.double(),
        rejected.double(),
        again=(swapped[1::2].flip(0).double(), swapped[0::2].flip(0).double()),
        lengths=[(len(pair.chosen), len(pair.rejected)) for pair in given],
        kinds=[pair.kind for pair in given],
    )
