"""Tiny grade-school word problems and a tiny language model warm-started on them.

* `problems`: a seeded generator of word problems in GSM8K's format, with train and held-out splits that
  cannot overlap. Standard library only.
* `warm_start`: the script that made `model/`, an ordinary Hugging Face folder holding a Qwen2 model of
  under a million parameters that solves about half of the held-out problems.

Importing this package does not import torch.
"""

from pathlib import Path

from .problems import KINDS, Problem, generate, sample_problems, split_of

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"

__all__ = ["KINDS", "MODEL_DIR", "Problem", "generate", "sample_problems", "split_of"]
