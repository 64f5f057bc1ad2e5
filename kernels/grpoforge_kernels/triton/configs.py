"""How the Triton kernels are cut: a table by dtype, size of the vocabulary and architecture, and `tune` to improve it.

Nothing is timed when a kernel is first called. The table's first candidate is the default. No candidate spills
registers in the cases of `grpoforge_kernels.aot_cases`, on any target there. On a GPU, ``grpoforge bench`` calls
`tune`, which times the candidates, leaves out what spills on that GPU and keeps the winner in the user's cache.
``GRPOFORGE_DETERMINISTIC=1``, or ``torch.use_deterministic_algorithms(True)``, takes the defaults and never splits a
row of logits, so results depend neither on the cache nor on the size of a batch.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Generic, TypeVar

import torch

DETERMINISTIC = "GRPOFORGE_DETERMINISTIC"
VECTOR_BYTES = 16
"""The widest load of one thread."""
MERGE_ROWS = 32
MERGE_WARPS = 4
TOKEN_BLOCK = 512
TOKEN_WARPS = 8
MAX_PARTS = 64
DETERMINISTIC_PARTS = 16
"""Slices of a head in deterministic mode, whatever the number of rows."""
MIN_BLOCKS_PER_PART = 4
"""A part that is shorter than this many turns of the loop costs more to start and to merge than it saves."""
TUNING_ROUNDS = 20

Tile = tuple[int, int, int, int, int]
"""Rows, columns, depth, warps and stages."""
LINEAR_TILES: Mapping[str, Tile] = {
    "sm_90": (128, 256, 64, 8, 3),
    "sm_10": (64, 128, 64, 4, 3),
    "sm_12": (64, 128, 64, 4, 3),
    "gfx": (128, 128, 32, 8, 2),
    "": (128, 128, 64, 8, 3),
}
"""By the start of an architecture's name: where nothing but the product fills registers."""
LINEAR_TILES_SPARING: Mapping[str, Tile] = {
    "sm_90": (128, 128, 32, 8, 3),
    "sm_10": (64, 64, 32, 8, 2),
    "sm_12": (64, 64, 32, 8, 2),
    "gfx": (128, 128, 32, 8, 2),
    "": (64, 128, 32, 8, 2),
}
"""Where masks, biases, softcaps or narrow loads want registers too: the largest tiles without spills."""
LINEAR_TILES_FLOAT32: Mapping[str, Tile] = {
    "sm_10": (32, 64, 32, 4, 2),
    "sm_12": (32, 64, 32, 4, 2),
    "gfx": (32, 64, 32, 8, 2),
    "": (64, 64, 16, 8, 2),
}
"""Full float32 products leave the tensor cores: small tiles fit the registers."""

_log = logging.getLogger("grpoforge_kernels")


@dataclass(frozen=True)
class RowStats:
    """``lanes`` threads take ``unroll`` vectors each at a time."""

    lanes: int
    unroll: int
    num_warps: int
    vector: int

    @property
    def block(self) -> int:
        """Logits that a program takes at a time."""
        return self.lanes * self.unroll * self.vector


@dataclass(frozen=True)
class RowGradient:
    """A program takes ``block`` logits of one row, ``pieces`` times."""

    block: int
    pieces: int
    num_warps: int


@dataclass(frozen=True)
class Linear:
    """Tiles of a product: ``rows`` by ``columns``, summed over ``depth`` hidden units at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


Config = TypeVar("Config", RowStats, RowGradient)


@dataclass(frozen=True)
class Candidates(Generic[Config]):
    """What `tune` chooses from, by name; the first is the default."""

    kernel: str
    key: str
    options: Mapping[str, Config]

    @property
    def default(self) -> Config:
        """The one that is taken unless `tune` found a better one."""
        return next(iter(self.options.values()))


def vector(dtype: torch.dtype) -> int:
    """Numbers in the widest load of one thread."""
    return VECTOR_BYTES // dtype.itemsize


def row_vector(dtype: torch.dtype, vocab_size: int, row_stride: int) -> int:
    """Numbers that one thread can load at once wherever it is in a row of that length and stride."""
    return math.gcd(vector(dtype), vocab_size, row_stride)


def row_stats_candidates(dtype: torch.dtype, vocab_size: int, arch: str) -> Candidates[RowStats]:
    """Cuts of `row_stats`: 4 vectors of 16 bytes are in flight for each thread, so 11 programs cover HBM's latency."""
    warp, wide = _warp_size(arch), vector(dtype)
    shapes = {"small": ((2, 4), (2, 2), (4, 2)), "large": ((4, 4), (8, 4), (4, 8), (2, 8))}[_bucket(vocab_size)]
    options = {
        f"u{unroll}w{num_warps}": RowStats(warp * num_warps, unroll, num_warps, wide) for unroll, num_warps in shapes
    }
    return Candidates("row_stats", _key(dtype, vocab_size, arch), options)


def row_gradient_candidates(dtype: torch.dtype, vocab_size: int, arch: str) -> Candidates[RowGradient]:
    """Cuts of `row_gradient`: 16 logits in flight for each thread; 32 spill where rows have unlike strides."""
    cuts = {"small": ((16, 4, 2), (16, 2, 4), (16, 1, 4)), "large": ((16, 4, 4), (16, 8, 4), (16, 2, 4), (16, 4, 8))}
    options = {
        f"e{each}p{pieces}w{num_warps}": RowGradient(_warp_size(arch) * each * num_warps, pieces, num_warps)
        for each, pieces, num_warps in cuts[_bucket(vocab_size)]
    }
    return Candidates("row_gradient", _key(dtype, vocab_size, arch), options)


def row_stats_config(dtype: torch.dtype, vocab_size: int, device: torch.device) -> RowStats:
    """The cut of `row_stats` for this device."""
    return select(row_stats_candidates(dtype, vocab_size, architecture(device)))


def row_gradient_config(dtype: torch.dtype, vocab_size: int, device: torch.device) -> RowGradient:
    """The cut of `row_gradient` for this device."""
    return select(row_gradient_candidates(dtype, vocab_size, architecture(device)))


def linear_config(dtype: torch.dtype, arch: str, *, plain: bool) -> Linear:
    """The tile of `linear_stats`; ``plain`` where it is a product of aligned operands and nothing more.

    Nothing tunes it: see there.
    """
    halves = LINEAR_TILES if plain else LINEAR_TILES_SPARING
    tiles = LINEAR_TILES_FLOAT32 if dtype == torch.float32 else halves
    return Linear(*next(tile for prefix, tile in tiles.items() if arch.startswith(prefix)))


def select(candidates: Candidates[Config]) -> Config:
    """The winner of an earlier `tune`, unless there was none or the mode is deterministic."""
    if is_deterministic():
        return candidates.default
    winner = _winners().get(f"{candidates.kernel}/{candidates.key}", "")
    return candidates.options.get(winner, candidates.default)


def is_deterministic() -> bool:
    """Whether results may depend on nothing but the inputs of a row."""
    return os.environ.get(DETERMINISTIC) == "1" or torch.are_deterministic_algorithms_enabled()


def split(num_rows: int, vocab_size: int, block: int, device: torch.device) -> tuple[int, int]:
    """How many programs share a row, and the columns of each, a multiple of ``block``.

    1 unless there are fewer rows than two for each multiprocessor; then enough parts to occupy them all.
    """
    num_processors = multiprocessors(device)
    if is_deterministic() or num_rows >= 2 * num_processors:
        return 1, vocab_size
    wanted = min(-(-4 * num_processors // num_rows), vocab_size // (MIN_BLOCKS_PER_PART * block), MAX_PARTS)
    if wanted <= 1:
        return 1, vocab_size
    blocks = -(-vocab_size // (wanted * block))
    return -(-vocab_size // (blocks * block)), blocks * block


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (compute units) of a GPU; 0 of the interpreter, which gains nothing from more programs."""
    return 0 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def architecture(device: torch.device) -> str:
    """``sm_90``, ``gfx942``, ...; ``interpreter`` for CPU tensors."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def tune(candidates: Candidates[Config], run: Callable[[Config], object]) -> dict[str, float]:
    """Median milliseconds of ``run`` with each candidate on the current GPU; the winner is kept in the user's cache.

    ``run`` returns the kernel that it launched. A candidate whose kernel spills registers on this GPU is left out; when
    all of them do, nothing is kept and the default stays. Candidates take turns, so a clock that drifts meets all.
    """
    fitting = {name: config for name, config in candidates.options.items() if not _num_spills(run(config))}
    times: dict[str, list[float]] = {name: [] for name in fitting}
    for _ in range(TUNING_ROUNDS):
        for name, config in fitting.items():
            times[name].append(_milliseconds(run, config))
    medians = {name: statistics.median(values) for name, values in times.items()}
    if medians:
        remember(candidates, min(medians, key=medians.__getitem__))
    return medians


def _num_spills(kernel: object) -> int:
    """Of a kernel that was launched; the interpreter has none to show, and no registers."""
    return int(getattr(kernel, "n_spills", 0))


def _milliseconds(run: Callable[[Config], object], config: Config) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run(config)
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


def remember(candidates: Candidates[Config], name: str) -> None:
    """Use the candidate ``name`` from now on, in this process and in later ones. A cache that cannot be written is
    no error: then this process only."""
    winners = {**_winners(), f"{candidates.kernel}/{candidates.key}": name}
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump(winners, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        _log.warning("the tuned configuration of %s is not kept: %s", candidates.kernel, error)
    _winners().update(winners)


def cache_file() -> Path:
    """``triton-configs.json`` in ``$GRPOFORGE_CACHE``, or in ``grpoforge`` in the user's cache."""
    own = os.environ.get("GRPOFORGE_CACHE")
    if own:
        return Path(own).expanduser() / "triton-configs.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "grpoforge" / "triton-configs.json"


@cache
def _winners() -> dict[str, str]:
    try:
        stored = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in stored.items()} if isinstance(stored, dict) else {}


def _warp_size(arch: str) -> int:
    return 64 if arch.startswith("gfx9") else 32


def _bucket(vocab_size: int) -> str:
    return "small" if vocab_size <= 8192 else "large"


def _key(dtype: torch.dtype, vocab_size: int, arch: str) -> str:
    return f"{str(dtype).removeprefix('torch.')}/{_bucket(vocab_size)}/{arch}"
