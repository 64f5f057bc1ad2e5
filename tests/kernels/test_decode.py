"""The arithmetic of the C++ decoder by itself: products against float64, and that a row does not see the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.needs_compiler


def matrices(rows: int, depth: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rows * 7919 + depth * 31 + columns)
    return tuple(torch.randn(shape, generator=draw) for shape in ((rows, depth), (columns, depth), (columns,)))  # type: ignore[return-value]


@given(rows=st.integers(1, 30), depth=st.sampled_from([1, 8, 33, 1100]), columns=st.sampled_from([1, 31, 32, 200]))
def test_products(rows: int, depth: int, columns: int) -> None:
    """A chain of fused multiply-adds is wrong by `depth` roundings of the sum of absolute products at most."""
    from grpoforge_kernels.cpp import decode

    a, b, bias = matrices(rows, depth, columns)
    packed = decode.pack(b)
    padded = torch.cat([bias, torch.zeros(-columns % decode.STRIP)])
    exact = a.double() @ b.double().t()
    bound = (a.double().abs() @ b.double().abs().t() + 2) * (depth + 2) * 2.0**-24
    out = torch.empty(rows, columns)
    decode.multiply(a, packed, padded, out, "store")
    assert ((out.double() - exact - bias.double()).abs() <= bound + bias.abs().double() * 2.0**-23).all()
    out = torch.ones(rows, columns)
    decode.multiply(a, packed, None, out, "add")
    assert ((out.double() - exact - 1).abs() <= bound).all()


@pytest.mark.parametrize("half", [16, 44, 100])
def test_the_gated_product(half: int) -> None:
    from grpoforge_kernels.cpp import decode

    a, b, bias = matrices(9, 24, 2 * half)
    gate, up, gate_bias, up_bias = b[:half], b[half:], bias[:half], bias[half:]
    out = torch.empty(9, -(-half // 16) * 16)
    packed = decode.pack(decode.interleaved(gate, up))
    both = decode.interleaved(gate_bias, up_bias)
    decode.multiply(a, packed, torch.cat([both, torch.zeros(-len(both) % decode.STRIP)]), out, "gated")
    opened = torch.nn.functional.silu(a.double() @ gate.double().t() + gate_bias)
    exact = opened * (a.double() @ up.double().t() + up_bias)
    torch.testing.assert_close(out[:, :half].double(), exact, rtol=1e-5, atol=1e-5)
    assert not out[:, half:].any(), "columns that fill up the strip are 0"


@given(rows=st.integers(2, 40), row=st.integers(0, 39))
def test_a_row_is_the_same_alone(rows: int, row: int) -> None:
    """To the last bit: what is sampled would otherwise depend on the batch."""
    from grpoforge_kernels.cpp import decode

    row %= rows
    a, b, _ = matrices(rows, 1500, 100)
    packed, together, alone = decode.pack(b), torch.empty(rows, 100), torch.empty(1, 100)
    decode.multiply(a, packed, None, together, "store")
    decode.multiply(a[row : row + 1].contiguous(), packed, None, alone, "store")
    assert torch.equal(together[row], alone[0])


def test_packed_strips() -> None:
    from grpoforge_kernels.cpp import decode

    b = torch.arange(40 * 19, dtype=torch.float32).view(40, 19)
    packed = decode.pack(b)
    assert packed.shape == (2, 19, 32)
    assert torch.equal(packed[0], b[:32].t()) and torch.equal(packed[1, :, :8], b[32:].t())
    assert not packed[1, :, 8:].any()


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    from grpoforge_kernels.cpp import decode
    from grpoforge_kernels.decode import Limits, Prompts
    from grpoforge_kernels.errors import KernelError

    prompts = Prompts(
        tokens=torch.tensor([3, 24]), ends=torch.tensor([2]), prompt_of=torch.tensor([0]),
        streams=torch.tensor([0]), temperatures=torch.ones(1, dtype=torch.float64),
    )  # fmt: skip
    limits = Limits(max_tokens=1, slots=1, eos=(), do_sample=False)
    with pytest.raises(KernelError) as failure:
        decode._check(prompts, limits, torch.zeros(4, 8), 24)
    assert failure.value.message == "token id 24 of a prompt is outside the vocabulary of 24 tokens"


@pytest.mark.parametrize(("forced", "why"), [("", None), ("cpp", None), ("reference", "GRPOFORGE_KERNELS=reference")])
def test_where_it_can_run(forced: str, why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpoforge_kernels.decode import obstacle

    monkeypatch.setenv("GRPOFORGE_KERNELS", forced)
    assert obstacle() == why
