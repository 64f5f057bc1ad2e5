"""Decoding in C++: weights packed in the order in which they are read, and a loop without Python in it.

Results are bitwise the same for any number of slots, rows and threads: every number of a row is computed in an order
that depends on the row alone (decode_kernels.h).
"""

from __future__ import annotations

from ctypes import Structure, byref, c_double, c_float, c_int32, c_int64, c_void_p
from typing import ClassVar

import torch
from torch import Tensor

from grpoforge_kernels.cpp import loader
from grpoforge_kernels.decode import LayerWeights, Limits, Look, ModelWeights, Prompts
from grpoforge_kernels.errors import KernelError

__all__ = ["Packed", "multiply", "pack"]

STRIP = 32
"""Columns of a matrix that are packed side by side, as in decode.h."""
ALONE = 2**25
"""Bytes of weights up to which each thread has a batch of its own: they stay in its cache."""

_library = loader.library("decode")
_pack = _library.grpoforge_pack
_pack.argtypes, _pack.restype = (c_void_p, c_int64, c_int64, c_void_p, c_int32), None
_product = _library.grpoforge_decode_product
_product.argtypes, _product.restype = (*(c_void_p,) * 3, *(c_int64,) * 3, c_void_p, c_int64, c_int64), None
_begin = _library.grpoforge_decode_begin
_begin.argtypes, _begin.restype = (c_void_p, c_float, c_void_p, c_void_p, c_int64, c_int64), c_void_p
_run = _library.grpoforge_decode_run
_run.argtypes, _run.restype = (c_void_p, c_int64), c_int32
_stop = _library.grpoforge_decode_stop
_stop.argtypes, _stop.restype = (c_void_p, c_int64), None
_end = _library.grpoforge_decode_end
_end.argtypes, _end.restype = (c_void_p,), None

MODES = {"store": 0, "add": 1, "gated": 2}


class _Request(Structure):
    _fields_: ClassVar = [
        *((name, c_int64) for name in ("num_prompts", "num_rows", "max_tokens", "slots", "num_eos")),
        *((name, c_void_p) for name in ("prompt_tokens", "prompt_ends", "prompt_of", "eos", "streams", "temperatures")),
        *((name, c_int64) for name in ("do_sample", "top_k")),
        *((name, c_double) for name in ("top_p", "min_p")),
        *((name, c_void_p) for name in ("tokens", "logprobs", "lengths")),
    ]


def pack(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``weight [N, K]`` as ``[strips, K, STRIP]``, zeros behind the last column; into ``out`` if given."""
    weight = weight.contiguous()
    assert weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.ndim == 2
    num_columns, depth = weight.shape
    shape = (-(-num_columns // STRIP), depth, STRIP)
    out = torch.empty(shape) if out is None else out
    assert out.shape == shape and out.is_contiguous()
    _pack(weight.data_ptr(), num_columns, depth, out.data_ptr(), torch.get_num_threads())
    return out


def multiply(a: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor, mode: str) -> None:
    """``out = a b + bias``, ``out += a b + bias`` or ``out = silu(gate) * up``, as the decoder computes it."""
    assert a.is_contiguous() and packed.is_contiguous() and out.stride(1) == 1 and a.shape[1] == packed.shape[1]
    num_columns = out.shape[1] * (2 if mode == "gated" else 1)
    assert packed.shape[0] == -(-num_columns // STRIP)
    _product(
        a.data_ptr(), packed.data_ptr(), _address(bias), a.shape[0], a.shape[1], num_columns, out.data_ptr(),
        out.stride(0), MODES[mode],
    )  # fmt: skip


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of both by halves of strips, ``[2 * F', ...]``, with zeros up to the next half strip."""
    half, count = STRIP // 2, gate.shape[0]
    parts = []
    for matrix in (gate, up):
        rest = matrix.new_zeros((-count % half, *matrix.shape[1:]))
        parts.append(torch.cat([matrix, rest]).view(-1, half, *matrix.shape[1:]))
    return torch.stack(parts, dim=1).flatten(0, 2)


class Packed:
    """The packed weights of one model and what else C++ needs to know of it."""

    def __init__(self) -> None:
        self._matrices: list[Tensor] = []
        self._tensors: list[Tensor | None] = []
        self._weights: ModelWeights | None = None
        self._sizes: list[int] = []

    def fill(self, weights: ModelWeights) -> None:
        """Take the weights."""
        self._matrices, old = [], iter(self._matrices)
        self._tensors = []
        layers = ffn = 0
        for layer in weights.layers:
            ffn = layer.gate.shape[0]
            layers += 1
            self._tensors += self._layer(layer, old)
        assert weights.embedding.is_contiguous() and weights.embedding.dtype == torch.float32
        head = self._matrix(weights.head, old)
        self._tensors += [
            weights.embedding,
            _plain(weights.norm),
            head,
            _padded(weights.head_bias, weights.head.shape[0]),
        ]
        vocabulary, hidden = weights.embedding.shape
        self._sizes = [layers, hidden, weights.heads, weights.kv_heads, weights.head_size, ffn, vocabulary]
        self._weights = weights

    def _layer(self, layer: LayerWeights, old: object) -> list[Tensor | None]:
        gate_bias = None
        if layer.gate_bias is not None and layer.up_bias is not None:
            gate_bias = interleaved(layer.gate_bias, layer.up_bias)
        qkv = torch.cat([layer.q, layer.k, layer.v])
        gated = interleaved(layer.gate, layer.up)
        return [
            _plain(layer.norm), self._matrix(qkv, old), _padded(layer.qkv_bias, qkv.shape[0]),
            _plain(layer.q_norm), _plain(layer.k_norm),
            self._matrix(layer.out, old), _padded(layer.out_bias, layer.out.shape[0]),
            _plain(layer.mlp_norm), self._matrix(gated, old), _padded(gate_bias, gated.shape[0]),
            self._matrix(layer.down, old), _padded(layer.down_bias, layer.down.shape[0]),
        ]  # fmt: skip

    def _matrix(self, weight: Tensor, old: object) -> Tensor:
        self._matrices.append(pack(weight, next(old, None)))  # type: ignore[call-overload]
        return self._matrices[-1]

    @property
    def num_bytes(self) -> int:
        """Of packed weights."""
        return sum(4 * matrix.numel() for matrix in self._matrices)

    def decode(
        self, cosine: Tensor, sine: Tensor, prompts: Prompts, limits: Limits, look: Look | None, patience: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `grpoforge_kernels.decode.PackedModel.decode`."""
        num_rows, vocabulary = len(prompts.prompt_of), self._sizes[-1]
        _check(prompts, limits, cosine, vocabulary)
        assert cosine.shape == sine.shape == (len(cosine), self._sizes[4]), "rotary tables are [positions, head_size]"
        tokens = torch.zeros((num_rows, limits.max_tokens), dtype=torch.int64)
        logprobs = torch.zeros((num_rows, limits.max_tokens))
        lengths = torch.zeros(num_rows, dtype=torch.int64)
        held = [cosine.contiguous(), sine.contiguous(), torch.tensor(limits.eos, dtype=torch.int64)]
        request = _Request(
            len(prompts.ends), num_rows, limits.max_tokens, limits.slots, len(limits.eos),
            prompts.tokens.data_ptr(), prompts.ends.data_ptr(), prompts.prompt_of.data_ptr(), held[2].data_ptr(),
            prompts.streams.data_ptr(), prompts.temperatures.data_ptr(), limits.do_sample, limits.top_k,
            limits.top_p, limits.min_p, tokens.data_ptr(), logprobs.data_ptr(), lengths.data_ptr(),
        )  # fmt: skip
        addresses = torch.tensor([_address(one) or 0 for one in (*self._tensors, *held[:2])], dtype=torch.int64)
        sizes = torch.tensor(self._sizes, dtype=torch.int64)
        assert self._weights is not None
        is_shared = self.num_bytes > ALONE
        decoding = _begin(
            sizes.data_ptr(),
            self._weights.eps,
            addresses.data_ptr(),
            byref(request),
            torch.get_num_threads(),
            is_shared,
        )
        try:
            while _run(decoding, patience):
                for row in look(tokens, lengths) if look else ():
                    _stop(decoding, row)
        finally:
            _end(decoding)
        return tokens, logprobs, lengths


def _check(prompts: Prompts, limits: Limits, cosine: Tensor, vocabulary: int) -> None:
    """What C++ reads by address must be exactly what it takes it for."""
    whole = (prompts.tokens, prompts.ends, prompts.prompt_of, prompts.streams)
    assert all(one.dtype == torch.int64 and one.is_contiguous() for one in whole)
    assert prompts.temperatures.dtype == torch.float64 and prompts.temperatures.is_contiguous()
    lengths = prompts.ends.diff(prepend=prompts.ends.new_zeros(1))
    assert int(lengths.min()) >= 1 and int(prompts.ends[-1]) == len(prompts.tokens)
    assert int(prompts.prompt_of[0]) >= 0 and int(prompts.prompt_of[-1]) < len(prompts.ends)
    assert bool((prompts.prompt_of.diff() >= 0).all()) and len(prompts.streams) == len(prompts.prompt_of)
    assert int(lengths.max()) + limits.max_tokens - 1 <= len(cosine)
    assert limits.max_tokens >= 1 and limits.slots >= 1
    lowest, highest = (int(end) for end in torch.aminmax(prompts.tokens))
    if lowest < 0 or highest >= vocabulary:
        bad = lowest if lowest < 0 else highest
        raise KernelError(f"token id {bad} of a prompt is outside the vocabulary of {vocabulary} tokens")


def _plain(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().float().contiguous().clone()


def _padded(values: Tensor | None, count: int) -> Tensor | None:
    """A bias with zeros up to a whole strip."""
    return None if values is None else torch.cat([values.detach().float(), torch.zeros(-count % STRIP)])


def _address(values: Tensor | None) -> int | None:
    return None if values is None else values.data_ptr()


def _check_products() -> None:
    """Reject a library whose products are not those of torch."""
    a = torch.arange(13 * 35, dtype=torch.float32).mul_(0.7).sin_().view(13, 35)
    b = torch.arange(50 * 35, dtype=torch.float32).mul_(0.3).cos_().view(50, 35)
    out = torch.ones(13, 50)
    multiply(a, pack(b), None, out, "add")
    if not torch.allclose(out.double(), a.double() @ b.double().t() + 1, rtol=1e-5, atol=1e-5):
        hint = "set CXX to a compiler without -ffast-math and its like"
        raise loader.reject("decode", KernelError("the C++ decoder does not compute what it should", hint))


_check_products()
