"""On a GPU: time the candidates of the row kernels on the shape at hand; the winners are kept for later processes."""

from __future__ import annotations

import torch

from grpoforge_kernels.bench.problems import RowsProblem
from grpoforge_kernels.rows import RowStats


def tune(problem: RowsProblem) -> None:
    """Choose the cuts of forward and backward for the format, vocabulary and architecture of ``problem``."""
    from grpoforge_kernels.triton import configs
    from grpoforge_kernels.triton.selective_log_softmax import launch_row_gradient, launch_row_stats

    logits, ids = problem.work.detach(), problem.ids
    num_rows, vocabulary = logits.shape
    ones, zeros = torch.ones_like(problem.upstream), torch.zeros_like(problem.upstream)
    partial = torch.empty((4, num_rows), device=logits.device)
    arch = configs.architecture(logits.device)

    def forward(config: configs.RowStats) -> object:
        return launch_row_stats(config, logits, ids, ones, None, partial, 1, vocabulary, 0, True, None, 1.0)

    def backward(config: configs.RowGradient) -> object:
        upstream = (problem.upstream, zeros, zeros)
        return launch_row_gradient(config, logits, ids, ones, RowStats(*partial), upstream, None, None, 1.0, 0, out)

    out = torch.empty_like(logits)
    configs.tune(configs.row_stats_candidates(logits.dtype, vocabulary, arch), forward)
    configs.tune(configs.row_gradient_candidates(logits.dtype, vocabulary, arch), backward)
