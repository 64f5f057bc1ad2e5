"""The word problems of the embedded default task as a dataset."""

from __future__ import annotations

from typing import Annotated, Literal

from grpoforge_plugins.tiny_math import generate


def tiny_math(
    split: Literal["train", "test"],
    *,
    num_train: Annotated[int, "problems to train on"] = 4096,
    num_test: Annotated[int, "held-out problems"] = 512,
    seed: Annotated[int, "draws other problems"] = 0,
) -> list[dict[str, str]]:
    """Generated grade-school word problems with GSM8K's columns; train and test can never share a question."""
    return generate(split, num_train if split == "train" else num_test, seed)
