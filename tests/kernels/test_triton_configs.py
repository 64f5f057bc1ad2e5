"""Which configuration a Triton kernel is launched with: defaults, winners in the user's cache, deterministic mode."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from grpoforge_kernels.triton import configs

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's cache of this test's own."""
    monkeypatch.setenv("GRPOFORGE_CACHE", str(tmp_path))
    monkeypatch.delenv(configs.DETERMINISTIC, raising=False)
    configs._winners.cache_clear()
    yield tmp_path
    configs._winners.cache_clear()


def test_default_is_128_lanes_of_8_logits_4_times() -> None:
    config = configs.row_stats_candidates(BF16, 151_936, "sm_90").default
    assert (config.lanes, config.vector, config.unroll, config.num_warps, config.block) == (128, 8, 4, 4, 4096)
    assert configs.row_stats_candidates(BF16, 151_936, "gfx942").default.lanes == 256
    assert configs.row_stats_candidates(torch.float32, 151_936, "sm_90").default.vector == 4


def test_keys_tell_dtype_size_and_architecture_apart() -> None:
    keys = {
        configs.row_stats_candidates(dtype, size, arch).key
        for dtype in (BF16, torch.float32)
        for size in (4096, 8192, 8193, 151_936)
        for arch in ("sm_80", "sm_90")
    }
    assert len(keys) == 8
    assert configs.row_stats_candidates(BF16, 8192, "sm_90").key == "bfloat16/small/sm_90"


def test_every_architecture_has_a_tile() -> None:
    for arch in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100", "interpreter"):
        for dtype in (BF16, torch.float32):
            for plain in (True, False):
                assert configs.linear_config(dtype, arch, plain=plain).rows >= 32
    assert configs.linear_config(BF16, "sm_90", plain=True).columns == 256
    assert configs.linear_config(BF16, "sm_90", plain=False).columns == 128


def test_winner_is_kept_for_this_process_and_the_next(folder: Path) -> None:
    candidates = configs.row_stats_candidates(BF16, 151_936, "sm_90")
    assert configs.select(candidates) == candidates.default
    configs.remember(candidates, "u8w4")
    assert configs.select(candidates) == candidates.options["u8w4"] != candidates.default
    configs._winners.cache_clear()
    assert configs.select(candidates) == candidates.options["u8w4"]
    assert json.loads((folder / "triton-configs.json").read_text()) == {"row_stats/bfloat16/large/sm_90": "u8w4"}
    assert configs.select(configs.row_stats_candidates(BF16, 151_936, "sm_80")).unroll == 4, "another GPU, no winner"


def test_deterministic_mode_takes_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = configs.row_stats_candidates(BF16, 151_936, "sm_90")
    configs.remember(candidates, "u8w4")
    monkeypatch.setenv(configs.DETERMINISTIC, "1")
    assert configs.select(candidates) == candidates.default


def test_torch_asks_for_deterministic_mode_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert configs.is_deterministic()


@pytest.mark.parametrize("content", ["no json", "[]", '{"row_stats/bfloat16/large/sm_90": "no candidate"}'])
def test_damaged_cache_means_the_default(folder: Path, content: str) -> None:
    (folder / "triton-configs.json").write_text(content)
    candidates = configs.row_stats_candidates(BF16, 151_936, "sm_90")
    assert configs.select(candidates) == candidates.default


def test_cache_that_cannot_be_written_is_said_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("GRPOFORGE_CACHE", str(folder / "file"))
    candidates = configs.row_stats_candidates(BF16, 151_936, "sm_90")
    configs.remember(candidates, "u8w4")
    assert "the tuned configuration of row_stats is not kept" in caplog.text
    assert configs.select(candidates) == candidates.options["u8w4"]


def test_tune_keeps_the_fastest_median(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = configs.row_gradient_candidates(BF16, 151_936, "sm_90")
    fast = candidates.options["e16p2w4"]
    monkeypatch.setattr(configs, "_milliseconds", lambda run, config: 1.0 if config == fast else 2.0)
    runs = []
    medians = configs.tune(candidates, runs.append)
    assert runs == list(candidates.options.values()), "each is compiled before any is timed"
    assert medians == {"e16p4w4": 2.0, "e16p8w4": 2.0, "e16p2w4": 1.0, "e16p4w8": 2.0}
    assert configs.select(candidates) == fast


@dataclass(frozen=True)
class Launched:
    """What Triton gives back of a launch, as far as it is looked at."""

    n_spills: int


@pytest.mark.parametrize(("spills", "kept"), [(("e16p2w4",), "e16p8w4"), (("e16p2w4", "e16p8w4"), "e16p4w4")])
def test_tune_keeps_nothing_that_spills(
    folder: Path, monkeypatch: pytest.MonkeyPatch, spills: tuple[str, ...], kept: str
) -> None:
    candidates = configs.row_gradient_candidates(BF16, 151_936, "sm_90")
    names = {config: name for name, config in candidates.options.items()}
    # The more it spills, the faster it would be.
    speed = {"e16p2w4": 1.0, "e16p8w4": 2.0, "e16p4w4": 3.0, "e16p4w8": 4.0}
    monkeypatch.setattr(configs, "_milliseconds", lambda run, config: speed[names[config]])
    medians = configs.tune(candidates, lambda config: Launched(2 * (names[config] in spills)))
    assert not set(spills) & set(medians)
    assert configs.select(candidates) == candidates.options[kept]


def test_where_everything_spills_tune_keeps_nothing(folder: Path) -> None:
    candidates = configs.row_gradient_candidates(BF16, 151_936, "sm_90")
    assert configs.tune(candidates, lambda config: Launched(1)) == {}
    assert configs.select(candidates) == candidates.default
    assert not (folder / "triton-configs.json").exists()


def test_vectors_fit_length_and_stride() -> None:
    assert configs.row_vector(BF16, 151_936, 151_936) == 8
    assert configs.row_vector(BF16, 50_257, 50_257) == 1
    assert configs.row_vector(BF16, 1500, 1504) == 4
    assert configs.row_vector(torch.float32, 1500, 1500) == 4
