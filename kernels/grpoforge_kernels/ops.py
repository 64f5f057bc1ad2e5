"""The vocabulary: what the engine may call. Shapes and equations stand in `grpoforge_kernels.reference`."""

from __future__ import annotations

from grpoforge_kernels.reference import selective_log_softmax

__all__ = ["selective_log_softmax"]
