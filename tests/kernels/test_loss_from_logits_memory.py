"""What `grpo_loss_from_logits` holds beyond logits [N, V]: its gradient, and a few numbers for each row."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MEASURE = """
import gc, sys, torch
from grpoforge_kernels.ops import grpo_loss_from_logits

torch.set_num_threads(1)

def status(key):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

def step(dtype, num_rows, num_tokens, overwrite):
    leaf = torch.empty(num_rows, num_tokens, dtype=dtype).uniform_(-9, 9).requires_grad_()
    ids, old, advantages = torch.arange(num_rows), torch.full((num_rows,), -9.0), torch.ones(num_rows)
    weights = torch.full((num_rows,), 1 / num_rows, dtype=torch.float64)
    gc.collect()
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    # A leaf is never overwritten, so the operation gets a view.
    result, stats = grpo_loss_from_logits(
        leaf.view_as(leaf), ids, 0.9, old, old, advantages, weights,
        epsilon_low=0.2, epsilon_high=0.2, kl="k3", beta=0.04, overwrite_logits=overwrite,
    )
    (gradient,) = torch.autograd.grad(result.loss, leaf)
    peak = status("VmHWM") - before
    assert bool(gradient.any(dim=1).all()) and bool(stats.entropy.gt(0).all())
    assert (gradient.data_ptr() == leaf.data_ptr()) == overwrite
    return peak

for dtype in (torch.float32, torch.bfloat16):
    for overwrite in (True, False):
        step(dtype, 64, 1000, overwrite)  # the library, threads and their buffers
        print(step(dtype, 256, 65_536, overwrite))
"""
STATISTICS = 64 * 256 + 4 * 2**20
"""Bytes of 256 rows (seven numbers, a mask and what is made of them), and room for stacks and pages."""


@pytest.mark.needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_gradient_at_most() -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, env=environment)
    wide_in, wide_out, half_in, half_out = (int(line) for line in done.stdout.split())
    gradient = 256 * 65_536 * 4
    assert max(wide_in, half_in) <= STATISTICS, (wide_in, half_in)
    assert wide_out <= gradient + STATISTICS and half_out <= gradient // 2 + STATISTICS, (wide_out, half_out)
