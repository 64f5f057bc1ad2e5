"""Attention over packed trees of tokens in C++, on the CPU, for float32; bfloat16 and float16 are widened and rounded.

Work is shared out by tree and head of keys among ``torch.get_num_threads()`` threads: results do not depend on how many
there are.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from grpoforge_kernels.cpp import loader
from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.forest import Forest
from grpoforge_kernels.reference import tree_attention as reference

__all__ = ["backward", "forward"]

SMALL = 2**18
"""Work (of a plan, times heads of keys and their size) below which a second thread costs more than it saves."""

_library = loader.library("layers")
_make_plan = _library.grpoforge_tree_plan
_make_plan.argtypes, _make_plan.restype = (c_void_p,), None
_room = _library.grpoforge_tree_room
_room.argtypes, _room.restype = (c_void_p, c_int64), c_int64
_forward = _library.grpoforge_tree_forward
_backward = _library.grpoforge_tree_backward
for _function in (_forward, _backward):
    _function.argtypes, _function.restype = (c_void_p, c_void_p, c_void_p, c_int32), None


class _Trees(Structure):
    """``Trees`` of ``tree_attention.h``."""

    _fields_ = (
        *((name, c_int64) for name in ("num_tokens", "group")),
        *((name, c_void_p) for name in ("positions", "parents", "ends", "blocks", "order")),
        *((name, c_int64) for name in ("num_trees", "work", "slots", "queries")),
    )


_HEADS = ("query", "key", "value", "out"), ("grad", "d_query", "d_key", "d_value")


class _Attention(Structure):
    """``Attention`` of ``tree_attention.h``: of each tensor its address and what lies between its tokens."""

    _fields_ = (
        ("kv_heads", c_int64),
        ("d", c_int64),
        ("scale", c_float),
        *((f"{name}_{what}", kind) for name in _HEADS[0] for what, kind in (("data", c_void_p), ("row", c_int64))),
        ("logsumexp", c_void_p),
        *((f"{name}_{what}", kind) for name in _HEADS[1] for what, kind in (("data", c_void_p), ("row", c_int64))),
    )


class _Plan:
    """Which tokens are computed together, where ``group`` query heads share a head of keys."""

    def __init__(self, forest: Forest, group: int) -> None:
        n = len(forest)
        self._kept = forest.positions, torch.empty(5, n + 1, dtype=torch.int64, device="cpu")
        # The order of the trees has two entries for each, in the last two rows.
        parents, ends, blocks, order = (self._kept[1][row].data_ptr() for row in range(4))
        self.trees = _Trees(n, group, forest.positions.data_ptr(), parents, ends, blocks, order)
        self.address = byref(self.trees)
        _make_plan(self.address)
        self._rooms: dict[int, int] = {}

    def room(self, d: int) -> int:
        """Floats that a thread needs for heads of this size."""
        if d not in self._rooms:
            self._rooms[d] = _room(self.address, d)
        return self._rooms[d]


def forward(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> tuple[Tensor, Tensor]:
    """As `grpoforge_kernels.reference.tree_attention.forward`. Tokens may lie apart, a token's heads must not."""
    num_tokens, heads, d = query.shape
    q, k, v = (_dense(one) for one in (query, key, value))
    out, logsumexp = q.new_empty(query.shape), q.new_empty(num_tokens, heads)
    attention = _Attention(
        key.shape[1], d, scale, *_address(q), *_address(k), *_address(v), *_address(out), logsumexp.data_ptr()
    )
    _run(_forward, forest, q, attention)
    return out.to(query.dtype), logsumexp


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    forest: Forest,
    scale: float,
    d_query: Tensor | None = None,
    d_key: Tensor | None = None,
    d_value: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `grpoforge_kernels.reference.tree_attention.backward`, with the output and logsumexp of `forward`."""
    g, q, k, v, o = (_dense(one) for one in (grad, query, key, value, out))
    assert logsumexp.dtype == torch.float32 and logsumexp.is_contiguous()
    given = (d_query, d_key, d_value)
    into = [_fitting(to, one) for one, to in zip((q, k, v), given, strict=True)]
    attention = _Attention(
        key.shape[1], query.shape[2], scale, *_address(q), *_address(k), *_address(v), *_address(o),
        logsumexp.data_ptr(), *_address(g), *(number for one in into for number in _address(one)),
    )  # fmt: skip
    _run(_backward, forest, q, attention)
    dq, dk, dv = (
        made.to(query.dtype) if to is None else _copied(made, to) for made, to in zip(into, given, strict=True)
    )
    return dq, dk, dv


def _run(function: object, forest: Forest, query: Tensor, attention: _Attention) -> None:
    """Both have to stay alive until C++ is done, and so has the memory it computes in."""
    num_tokens, heads, d = query.shape
    group = heads // attention.kv_heads
    assert len(forest) == num_tokens and group * attention.kv_heads == heads
    plan = forest.derived(("cpp", group), lambda forest: _Plan(forest, group))
    threads = torch.get_num_threads() if plan.trees.work * attention.kv_heads * d >= SMALL else 1
    memory = query.new_empty(threads * plan.room(d))
    function(plan.address, byref(attention), memory.data_ptr(), threads)  # type: ignore[operator]


def _dense(heads: Tensor) -> Tensor:
    """``[N, h, d]`` float32 on the CPU with the heads of a token side by side."""
    assert heads.device.type == "cpu" and heads.ndim == 3
    if heads.dtype != torch.float32:
        return heads.float().contiguous()
    return heads if _is_dense(heads) else heads.contiguous()


def _is_dense(heads: Tensor) -> bool:
    _, num_heads, d = heads.shape
    _, by_head, by_number = heads.stride()
    return (by_number == 1 or d == 1) and (by_head == d or num_heads == 1)


def _fitting(into: Tensor | None, like: Tensor) -> Tensor:
    """``into`` where C++ can write it, else a new tensor."""
    can_write = into is not None and into.dtype == torch.float32 and _is_dense(into)
    return into if into is not None and can_write else like.new_empty(like.shape)


def _copied(made: Tensor, to: Tensor) -> Tensor:
    return to if made is to else to.copy_(made)


def _address(heads: Tensor) -> tuple[int, int]:
    return heads.data_ptr(), heads.stride(0)


def _check() -> None:
    """Reject a library (built with ``-ffast-math``, say) without the attention of two small trees."""
    forest = Forest.of(torch.tensor([0, 1, 2, 2, 1, 2, 3, 0, 1]))
    query, grad = ((torch.arange(9 * 2 * 5) * by).sin().view(9, 2, 5) * 3 for by in (0.7, 0.4))
    key, value = ((torch.arange(9 * 5) * by).cos().view(9, 1, 5) for by in (0.3, 0.9))
    out, logsumexp = forward(query, key, value, forest, 2.0)
    ours = out, logsumexp, *backward(grad, query, key, value, out, logsumexp, forest, 2.0)
    q, k, v, g = (one.double() for one in (query, key, value, grad))
    exact = reference.forward(q, k, v, forest, 2.0)
    gradients = reference.backward(g, q, k, v, *exact, forest, 2.0)
    pairs = zip(ours, (*exact, *gradients), strict=True)
    if not all(torch.allclose(mine.double(), true, rtol=1e-5, atol=1e-5) for mine, true in pairs):
        hint = "set CXX to a compiler without -ffast-math and its like"
        raise loader.reject("layers", KernelError("the C++ kernels do not compute what they should", hint))


_check()
