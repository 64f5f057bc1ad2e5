"""A decoder layer on the CPU in float32: products by torch, everything between them in C++.

No number of the result depends on the number of threads, beyond what torch's products do.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from grpoforge_kernels.cpp import loader, tree_attention
from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.forest import Forest

if TYPE_CHECKING:
    from grpoforge_kernels.decoder_layer import LayerShape, LayerWeights, Rotary

__all__ = ["decoder_layer", "rms_norm"]


class _Norm(Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("x", "weight", "add", "y", "inverse", "grad")),
        *((name, c_int64) for name in ("num_rows", "n")),
        ("eps", c_float),
    ]


class _Gate(Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("gate_up", "product", "d_gate_up")),
        *((name, c_int64) for name in ("num_rows", "n")),
    ]


class _Rotation(Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("qkv", "rotated", "bias", "q_norm", "k_norm", "cosine", "sine", "positions")),
        *((name, c_int64) for name in ("num_rows", "heads", "kv_heads", "head_size")),
        ("eps", c_float),
    ]


_library = loader.library("layers")
_norm, _norm_back = _library.grpoforge_norm, _library.grpoforge_norm_back
_gate, _gate_back = _library.grpoforge_gate, _library.grpoforge_gate_back
_rotate, _rotate_back = _library.grpoforge_rotate, _library.grpoforge_rotate_back
for _one in (_norm, _gate, _gate_back, _rotate):
    _one.argtypes, _one.restype = (c_void_p, c_int32), None
for _one in (_norm_back, _rotate_back):
    _one.argtypes, _one.restype = (c_void_p, c_void_p, c_void_p, c_int32), None
_library.grpoforge_layer_chunk.restype = c_int64
CHUNK: int = _library.grpoforge_layer_chunk()
"""Rows whose sums are added up before those of others."""


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _parts(num_rows: int, width: int) -> Tensor:
    """Room for the sums of every chunk of rows."""
    return torch.empty(-(-num_rows // CHUNK), width, dtype=torch.float32, device="cpu")


def normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of each row of ``x [N, n]``, and 1 over each row's root mean square, ``[N]``."""
    y, inverse = torch.empty_like(x), x.new_empty(len(x))
    _norm(byref(_Norm(x.data_ptr(), weight.data_ptr(), None, y.data_ptr(), inverse.data_ptr(), None, *x.shape, eps)),
          torch.get_num_threads())  # fmt: skip
    return y, inverse


def norm_back(
    x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor, *, add: Tensor | None, again: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient of `normed` by ``x``, plus ``add``, in the place of ``grad``; that by the weight, and ``y``."""
    y, d_weight = torch.empty_like(x) if again else None, torch.empty_like(weight)
    task = _Norm(
        x.data_ptr(), weight.data_ptr(), _address(add), _address(y), inverse.data_ptr(), grad.data_ptr(), *x.shape
    )
    parts = _parts(*x.shape)
    _norm_back(byref(task), parts.data_ptr(), d_weight.data_ptr(), torch.get_num_threads())
    return d_weight, y


def gated(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, ``[N, n]``, of ``[gate, up] [N, 2 n]``."""
    product = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _gate(byref(_Gate(gate_up.data_ptr(), product.data_ptr(), None, *product.shape)), torch.get_num_threads())
    return product


def gate_back(gate_up: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `gated` by ``gate_up``; ``grad`` becomes `gated` again."""
    d_gate_up = torch.empty_like(gate_up)
    task = _Gate(gate_up.data_ptr(), grad.data_ptr(), d_gate_up.data_ptr(), *grad.shape)
    _gate_back(byref(task), torch.get_num_threads())
    return d_gate_up


def _rotation(
    qkv: Tensor, rotated: Tensor, weights: _Weights, forest: Forest, rotary: Rotary, shape: LayerShape
) -> _Rotation:
    return _Rotation(
        qkv.data_ptr(), rotated.data_ptr(), _address(weights.qkv_bias), _address(weights.q_norm),
        _address(weights.k_norm), *(table.data_ptr() for table in rotary), forest.positions.data_ptr(),
        len(qkv), shape.heads, shape.kv_heads, shape.head_size, shape.eps,
    )  # fmt: skip


def rotated(qkv: Tensor, weights: _Weights, forest: Forest, rotary: Rotary, shape: LayerShape) -> Tensor:
    """Queries, keys and values of ``qkv [N, (h + 2 k) d]`` with bias, norms and positions.

    In the place of ``qkv``, to which the bias is added, unless there are norms, whose gradient needs what they are of.
    """
    result = qkv if weights.q_norm is None else torch.empty_like(qkv)
    _rotate(byref(_rotation(qkv, result, weights, forest, rotary, shape)), torch.get_num_threads())
    return result


def rotate_back(
    qkv: Tensor, grad: Tensor, weights: _Weights, forest: Forest, rotary: Rotary, shape: LayerShape
) -> list[Tensor]:
    """The gradient of `rotated` by ``qkv``, in the place of ``grad``; returns those by bias and norms."""
    width, head = qkv.shape[1], shape.head_size
    sums, parts = grad.new_empty(width + 2 * head), _parts(len(qkv), width + 2 * head)
    task = _rotation(qkv, grad, weights, forest, rotary, shape)
    _rotate_back(byref(task), parts.data_ptr(), sums.data_ptr(), torch.get_num_threads())
    return [sums[:width], sums[width : width + head], sums[width + head :]]


@dataclass(frozen=True, slots=True)
class _Weights:
    """Those of a layer, in the order in which autograd sees them."""

    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


_Kept = tuple[Tensor, ...]
"""inverse [N], qkv, rotated [N, (h + 2 k) d], attended [N, h, d], logsumexp, middle [N, H], inverse [N], gate_up."""


def _heads(qkv: Tensor, shape: LayerShape) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[N, h or k, d]``, views."""
    first, last = shape.heads, shape.heads + shape.kv_heads
    heads = qkv.view(len(qkv), last + shape.kv_heads, shape.head_size)
    return heads[:, :first], heads[:, first:last], heads[:, last:]


def _forward(x: Tensor, w: _Weights, forest: Forest, rotary: Rotary, shape: LayerShape) -> tuple[Tensor, _Kept]:
    first, inverse = normed(x, w.norm, shape.eps)
    qkv = first @ w.qkv.t()
    turned = rotated(qkv, w, forest, rotary, shape)
    attended, logsumexp = tree_attention.forward(*_heads(turned, shape), forest, shape.scale)
    middle = torch.addmm(x, attended.flatten(1), w.out.t())
    second, mlp_inverse = normed(middle, w.mlp_norm, shape.eps)
    width = len(w.gate)
    gate_up = x.new_empty(len(x), 2 * width)
    torch.mm(second, w.gate.t(), out=gate_up[:, :width])
    torch.mm(second, w.up.t(), out=gate_up[:, width:])
    out = torch.addmm(middle, gated(gate_up), w.down.t())
    return out, (inverse, qkv, turned, attended, logsumexp, middle, mlp_inverse, gate_up)


def _backward_mlp(
    grad: Tensor, w: _Weights, middle: Tensor, inverse: Tensor, gate_up: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The gradient by what goes into the MLP (and past it), and those by its norm, gate, up and down."""
    product = grad @ w.down
    d_gate_up = gate_back(gate_up, product)
    d_down = grad.t() @ product
    d_gate, d_up = d_gate_up.chunk(2, dim=1)
    d_middle = (d_gate @ w.gate).addmm_(d_up, w.up)
    d_norm, second = norm_back(middle, w.mlp_norm, inverse, d_middle, add=grad, again=True)
    assert second is not None
    return d_middle, [d_norm, d_gate.t() @ second, d_up.t() @ second, d_down]


def _backward(
    grad: Tensor, x: Tensor, w: _Weights, kept: _Kept, forest: Forest, rotary: Rotary, shape: LayerShape
) -> tuple[Tensor, list[Tensor]]:
    inverse, qkv, turned, attended, logsumexp, middle, mlp_inverse, gate_up = kept
    d_middle, by_mlp = _backward_mlp(grad, w, middle, mlp_inverse, gate_up)
    d_attended = (d_middle @ w.out).view(attended.shape)
    d_out = d_middle.t() @ attended.flatten(1)
    d_qkv = torch.empty_like(turned)
    tree_attention.backward(
        d_attended, *_heads(turned, shape), attended, logsumexp, forest, shape.scale, *_heads(d_qkv, shape)
    )
    by_rotation = rotate_back(qkv, d_qkv, w, forest, rotary, shape)
    d_x = d_qkv @ w.qkv
    d_norm, first = norm_back(x, w.norm, inverse, d_x, add=d_middle, again=True)
    assert first is not None
    return d_x, [d_norm, d_qkv.t() @ first, *by_rotation, d_out, *by_mlp]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forest: Forest, rotary: Rotary, shape: LayerShape, recompute: bool, *weights: Tensor | None
    ) -> Tensor:
        out, kept = _forward(x, _Weights(*weights), forest, rotary, shape)  # type: ignore[arg-type]
        ctx.save_for_backward(x, *weights, *(() if recompute else kept))
        ctx.layer = forest, rotary, shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        count = len(_Weights.__slots__)
        weights, kept = _Weights(*saved[:count]), tuple(saved[count:])
        if not kept:
            _, kept = _forward(x, weights, *ctx.layer)
        d_x, by_weight = _backward(grad.contiguous(), x, weights, kept, *ctx.layer)
        absent = [weight is None for weight in saved[:count]]
        return (
            d_x,
            None,
            None,
            None,
            None,
            *(None if gone else one for gone, one in zip(absent, by_weight, strict=True)),
        )


@_disable_dynamo  # As in `grpoforge_kernels.linear_loss`: C++ is given addresses.
def decoder_layer(
    hidden: Tensor, weights: LayerWeights, forest: Forest, rotary: Rotary, shape: LayerShape, *, recompute: bool
) -> Tensor:
    """As `grpoforge_kernels.decoder_layer.decoder_layer`."""
    w = weights
    flat = (
        w.norm, torch.cat([w.q, w.k, w.v]), w.qkv_bias, w.q_norm, w.k_norm, w.out, w.mlp_norm, w.gate, w.up, w.down,
    )  # fmt: skip
    _check(hidden, _Weights(*flat), forest, rotary, shape)
    plain = [None if one is None else one.contiguous() for one in flat]
    result: Tensor = _Layer.apply(hidden.contiguous(), forest, rotary, shape, recompute, *plain)  # type: ignore[no-untyped-call]
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        d_x = grad.clone(memory_format=torch.contiguous_format)
        d_weight, _ = norm_back(x, weight, inverse, d_x, add=None, again=False)
        return d_x, d_weight, None


@_disable_dynamo
def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `grpoforge_kernels.decoder_layer.rms_norm`."""
    result: Tensor = _RMSNorm.apply(hidden.contiguous(), weight.contiguous(), eps)  # type: ignore[no-untyped-call]
    return result


def _check(hidden: Tensor, weights: _Weights, forest: Forest, rotary: Rotary, shape: LayerShape) -> None:
    """What C++ reads by address must be exactly what it takes it for.

    Raises:
        KernelError: a shape or a dtype is another.
    """
    width, inner = hidden.shape[1], shape.heads * shape.head_size
    columns, ffn = inner + 2 * shape.kv_heads * shape.head_size, len(weights.gate)
    expected = {
        "norm": (width,), "qkv": (columns, width), "qkv_bias": (columns,), "q_norm": (shape.head_size,),
        "k_norm": (shape.head_size,), "out": (width, inner), "mlp_norm": (width,), "gate": (ffn, width),
        "up": (ffn, width), "down": (width, ffn),
    }  # fmt: skip
    given = {name: (getattr(weights, name), size) for name, size in expected.items()}
    cosine, sine = rotary
    tables = (len(cosine), shape.head_size)
    given |= {"cosine": (cosine, tables), "sine": (sine, tables), "hidden": (hidden, hidden.shape)}
    for name, (tensor, size) in given.items():
        if tensor is None:
            continue
        if tensor.shape != size or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            said = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise KernelError(f"{name} of a decoder layer is {said}, not float32 {list(size)} on the CPU")
    if (weights.q_norm is None) != (weights.k_norm is None):
        raise KernelError("a decoder layer has a norm of queries or of keys only, not of both or of none")
    if len(forest) != len(hidden):
        raise KernelError(f"the forest has {len(forest)} tokens and hidden {len(hidden)}")
    if forest.derived("depth", _depth) > len(cosine):
        raise KernelError(f"the forest is {_depth(forest)} tokens deep, and rotary tables have {len(cosine)} positions")
    if not (cosine.is_contiguous() and sine.is_contiguous()):
        raise KernelError("rotary tables of a decoder layer are not contiguous", "call contiguous() once")


def _depth(forest: Forest) -> int:
    return int(forest.positions.max()) + 1 if len(forest) else 0


def _check_arithmetic() -> None:
    """Reject a library that does not compute what it should."""
    x = torch.arange(3 * 37, dtype=torch.float32).mul_(0.7).sin_().view(3, 37)
    y, _ = normed(x, torch.full((37,), 2.0), 0.0)
    wide = x.double()
    expected = 2 * wide / wide.square().mean(dim=1, keepdim=True).sqrt()
    gate = 200 * x  # Far below -90 as well, where exp(-x) is more than a float32 can be.
    product = gated(torch.cat([gate, x], dim=1))
    through = 200 * wide.square() * (200 * wide).sigmoid()
    if not torch.allclose(y.double(), expected, rtol=1e-5) or not torch.allclose(
        product.double(), through, rtol=1e-4, atol=1e-6
    ):
        hint = "set CXX to a compiler without -ffast-math and its like"
        raise loader.reject("layers", KernelError("the C++ decoder layer does not compute what it should", hint))


_check_arithmetic()
