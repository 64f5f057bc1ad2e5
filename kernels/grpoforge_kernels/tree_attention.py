"""Exact causal attention over packed trees of tokens: completions that share a prompt or a beginning share its tokens.

A token attends to itself and its ancestors; `grpoforge_kernels.reference.tree_attention` has the equation. The tokens
of each tree stand in depth-first preorder, so their depths alone say who they are: a chain is a plain causal row,
several completions behind a prompt compute it once, and a trie computes every shared beginning once.

In eager mode an ``autograd.Function`` calls the backend; under ``torch.compile`` the same code is reached through the
operators ``grpoforge::tree_attention`` and ``grpoforge::tree_attention_backward``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpoforge_kernels import dispatch
from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.forest import Forest
from grpoforge_kernels.rows import statistics_dtype

__all__ = ["Forest", "tree_attention"]

OP = "tree_attention"


def tree_attention(query: Tensor, key: Tensor, value: Tensor, forest: Tensor | Forest, *, scale: float) -> Tensor:
    """Attention of ``N`` tokens to themselves and their ancestors, with exact gradients for all three.

    On a CPU this is C++ in float32 (half precision is widened, and the results rounded once), and gives the same bits
    for any number of threads. Elsewhere it is the reference, which holds the scores of one tree at a time.

    Args:
        query: ``[N, h, d]``, float32, bfloat16, float16 or float64.
        key: ``[N, k, d]`` in that dtype; every ``h / k`` heads of the queries share one. Tokens may lie apart in
            memory: slices of one ``[N, h + 2 k, d]`` are not copied.
        value: ``[N, k, d]``.
        forest: ``[N]`` int64, the depth of each token, 0 at the root of a tree; or the `Forest` of that, which saves
            working it out in every layer.
        scale: factor on the scores.

    Returns:
        ``[N, h, d]``.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit, or depths that are no preorder.
    """
    check_inputs(query, key, value)
    if torch.compiler.is_compiling():
        positions = forest if isinstance(forest, Tensor) else forest.positions
        output: Tensor = torch.ops.grpoforge.tree_attention(query, key, value, positions, scale)[0]
        return output
    forest = Forest.of(forest) if isinstance(forest, Tensor) else forest
    _check_forest(query, forest)
    output = _TreeAttention.apply(query, key, value, forest, scale)  # type: ignore[no-untyped-call]
    return output


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Stop unless these fit together: ``[N, h, d]`` and two of ``[N, k, d]``, of one dtype and device.

    Raises:
        KernelError: they do not.
    """
    if query.ndim != 3 or not query.is_floating_point() or 0 in query.shape[1:]:
        raise KernelError(f"query is {query.dtype} {list(query.shape)}, not floats [N, h, d]")
    num_tokens, heads, d = query.shape
    fits = key.ndim == 3 and key.shape[0] == num_tokens and key.shape[2] == d and key.shape[1] > 0
    if not fits or heads % key.shape[1]:
        raise KernelError(
            f"key has shape {list(key.shape)}, not [{num_tokens}, k, {d}] with k a divisor of {heads}",
            "every h / k heads of the queries share one head of keys and values",
        )
    if value.shape != key.shape:
        raise KernelError(f"value has shape {list(value.shape)}, not that of key, {list(key.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise KernelError(f"{name} is {tensor.dtype} on {tensor.device}, not {query.dtype} on {query.device}")


def _check_forest(query: Tensor, forest: Forest) -> None:
    if len(forest) != len(query):
        raise KernelError(f"the forest has {len(forest)} tokens and query {len(query)}")
    if forest.positions.device != query.device:
        raise KernelError(f"positions are on {forest.positions.device}, not on {query.device}")


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> Tensor:
        module = dispatch.backend(OP, query.device, query.dtype)
        out: Tensor
        out, logsumexp = module.forward(query, key, value, forest, scale)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.forest, ctx.scale = forest, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # Once: under checkpointing they can be had no second time.
        module = dispatch.backend(OP, saved[0].device, saved[0].dtype)
        return (*module.backward(grad, *saved, ctx.forest, ctx.scale), None, None)


_SCHEMA = "Tensor query, Tensor key, Tensor value"


@torch.library.custom_op(
    f"grpoforge::{OP}", mutates_args=(), schema=f"({_SCHEMA}, Tensor positions, float scale) -> (Tensor, Tensor)"
)
def _op(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and logsumexp."""
    forest = Forest.of(positions)
    _check_forest(query, forest)
    module = dispatch.backend(OP, query.device, query.dtype)
    results: tuple[Tensor, Tensor] = module.forward(query, key, value, forest, scale)
    return results


@torch.library.custom_op(
    f"grpoforge::{OP}_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_SCHEMA}, Tensor out, Tensor logsumexp, Tensor positions, float scale) "
    "-> (Tensor, Tensor, Tensor)",
)
def _op_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    positions: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    module = dispatch.backend(OP, query.device, query.dtype)
    forest = Forest.of(positions)
    gradients: tuple[Tensor, Tensor, Tensor] = module.backward(grad, query, key, value, out, logsumexp, forest, scale)
    return gradients


@_op.register_fake
def _op_fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=statistics_dtype(query.dtype))


@_op_backward.register_fake
def _op_backward_fake(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(one.new_empty(one.shape) for one in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, positions, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, positions)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.grpoforge.tree_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return (*gradients, None, None)


_op.register_autograd(_differentiate, setup_context=_save)
