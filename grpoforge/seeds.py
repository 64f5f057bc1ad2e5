"""Randomness from numbers: every draw of a run is a function of its seed and of where in the run it happens."""

from __future__ import annotations

import random

import torch


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers; neighbors give unrelated seeds (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def seed_everything(seed: int) -> None:
    """Seed the global generators, for plugins that use them; the engine draws from seeds of its own."""
    import numpy

    random.seed(seed)
    numpy.random.seed(mix(seed, 3) % 2**32)
    torch.manual_seed(seed)
