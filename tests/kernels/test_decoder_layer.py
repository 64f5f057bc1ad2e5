"""A decoder layer: transformers' own layers are the oracle, in float64; the C++ layer against the plain one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model, Qwen3Config, Qwen3Model

from grpoforge_kernels import dispatch
from grpoforge_kernels.cpp import build
from grpoforge_kernels.decoder_layer import LayerShape, LayerWeights, Rotary, decoder_layer, is_fused, rms_norm
from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.reference import decoder_layer as reference
from grpoforge_kernels.tree_attention import Forest

SIZES = {
    "vocab_size": 16, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {"llama": (LlamaModel, LlamaConfig), "qwen2": (Qwen2Model, Qwen2Config), "qwen3": (Qwen3Model, Qwen3Config)}
CHAIN = [0, 1, 2, 3, 4, 5, 6]
TREE = [0, 1, 2, 3, 4, 3, 4, 5, 2, 0, 1, 1, 1]


def layer_of(kind: str) -> tuple[Any, LayerWeights, LayerShape]:
    """A model of one layer, random in all of its parameters, float64; its weights and shape."""
    torch.manual_seed(0)
    model_class, config_class = MODELS[kind]
    model = model_class(config_class(**SIZES)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    attention, mlp = model.layers[0].self_attn, model.layers[0].mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    has_bias = attention.q_proj.bias is not None
    weights = LayerWeights(
        norm=model.layers[0].input_layernorm.weight,
        q=attention.q_proj.weight,
        k=attention.k_proj.weight,
        v=attention.v_proj.weight,
        qkv_bias=torch.cat([one.bias for one in projections]) if has_bias else None,
        q_norm=attention.q_norm.weight if kind == "qwen3" else None,
        k_norm=attention.k_norm.weight if kind == "qwen3" else None,
        out=attention.o_proj.weight,
        mlp_norm=model.layers[0].post_attention_layernorm.weight,
        gate=mlp.gate_proj.weight,
        up=mlp.up_proj.weight,
        down=mlp.down_proj.weight,
    )
    size = attention.head_dim
    return model, weights, LayerShape(heads=4, kv_heads=2, head_size=size, eps=model.config.rms_norm_eps)


def places_of(model: Any, positions: list[int], dtype: torch.dtype) -> tuple[Forest, Rotary]:
    tables = model.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.arange(max(positions) + 1)[None])
    cosine, sine = (table[0].to(dtype).contiguous() for table in tables)
    return Forest.of(torch.tensor(positions)), (cosine, sine)


def narrowed(weights: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    """The same weights as leaves of their own, in ``dtype``."""
    return dataclasses.replace(
        weights,
        **{
            field.name: value.detach().to(dtype).requires_grad_()
            for field in dataclasses.fields(weights)
            if (value := getattr(weights, field.name)) is not None
        },
    )


def run(
    weights: LayerWeights,
    places: tuple[Forest, Rotary],
    shape: LayerShape,
    hidden: Tensor,
    seed: int = 1,
    *,
    recompute: bool = False,
) -> dict[str, Tensor]:
    """Output and all gradients, of a random combination of the output."""
    hidden = hidden.detach().clone().requires_grad_()
    out = decoder_layer(hidden, weights, *places, shape, recompute=recompute)
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (out * direction.to(out)).sum().backward()
    found = {"out": out.detach(), "hidden": hidden.grad}
    for field in dataclasses.fields(weights):
        value = getattr(weights, field.name)
        if value is not None and value.is_leaf:
            found[field.name], value.grad = value.grad, None
    return found


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest number."""
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


def random_hidden(count: int) -> Tensor:
    return torch.randn(count, SIZES["hidden_size"], dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", MODELS)
def test_the_plain_layer_is_the_models(kind: str) -> None:
    model, weights, shape = layer_of(kind)
    hidden = random_hidden(len(CHAIN))
    rotary = model.rotary_emb(hidden, torch.tensor(CHAIN)[None])
    model.config._attn_implementation = "eager"
    mask = torch.full((len(CHAIN), len(CHAIN)), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    expected = model.layers[0](hidden[None], attention_mask=mask, position_embeddings=rotary)[0]
    found = decoder_layer(hidden, weights, *places_of(model, CHAIN, torch.float64), shape)
    assert gap(found.detach(), expected.detach()) < 1e-6  # its norms are computed in float32


@pytest.mark.needs_compiler
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_gives_the_same(compiler: str) -> None:
    model, wide, shape = layer_of("qwen3")
    weights, places = narrowed(wide, torch.float32), places_of(model, TREE, torch.float32)

    def step(hidden: Tensor) -> Tensor:
        out = decoder_layer(2 * hidden, weights, *places, shape)
        return rms_norm(out, weights.norm, shape.eps).square().sum()

    found = []
    for run_once in (step, torch.compile(step, backend=compiler)):
        hidden = random_hidden(len(TREE)).float().requires_grad_()
        leaves = [hidden, weights.norm, weights.q, weights.k_norm, weights.down]
        total = run_once(hidden)
        found.append((total.detach(), *torch.autograd.grad(total, leaves)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("positions", [CHAIN, TREE, [0]], ids=["chain", "tree", "one"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_layer_in_cpp_equals_the_plain_one(kind: str, positions: list[int], recompute: bool) -> None:
    model, weights, shape = layer_of(kind)
    assert is_fused(torch.device("cpu"), torch.float32)
    hidden = random_hidden(len(positions))
    expected = run(narrowed(weights, torch.float64), places_of(model, positions, torch.float64), shape, hidden)
    places = places_of(model, positions, torch.float32)
    found = run(narrowed(weights, torch.float32), places, shape, hidden.float(), recompute=recompute)
    assert found.keys() == expected.keys()
    worst = {name: gap(found[name], expected[name]) for name in found if expected[name].abs().max() > 1e-9}
    assert max(worst.values()) < 3e-6, worst


@given(
    rows=st.integers(1, 70), hidden=st.integers(1, 40), ffn=st.integers(1, 40), heads=st.integers(1, 3),
    half=st.integers(1, 20), bias=st.booleans(), norms=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_shape(rows: int, hidden: int, ffn: int, heads: int, half: int, bias: bool, norms: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    size, width = 2 * half, 4 * heads * half
    weights = LayerWeights(
        norm=some(hidden), q=some(width, hidden), k=some(size, hidden), v=some(size, hidden),
        qkv_bias=some(width + 2 * size) if bias else None, q_norm=some(size) if norms else None,
        k_norm=some(size) if norms else None, out=some(hidden, width) * 0.1, mlp_norm=some(hidden),
        gate=some(ffn, hidden) * 0.3, up=some(ffn, hidden), down=some(hidden, ffn),
    )  # fmt: skip
    shape = LayerShape(heads=2 * heads, kv_heads=1, head_size=size, eps=1e-5)
    positions = torch.arange(rows) % 7
    angles = some(7, size)

    def places(dtype: torch.dtype) -> tuple[Forest, Rotary]:
        return Forest.of(positions), (angles.cos().to(dtype), angles.sin().to(dtype))

    x = some(rows, hidden)
    expected = run(narrowed(weights, torch.float64), places(torch.float64), shape, x)
    plain = run_plain(narrowed(weights, torch.float32), places(torch.float32), shape, x.float())
    found = run(narrowed(weights, torch.float32), places(torch.float32), shape, x.float())
    for name, value in expected.items():
        if value.abs().max() > 1e-9:
            assert gap(found[name], value) <= 4 * gap(plain[name], value) + 3e-6, name


def run_plain(
    weights: LayerWeights, places: tuple[Forest, Rotary], shape: LayerShape, hidden: Tensor
) -> dict[str, Tensor]:
    """`run` by plain torch."""
    dispatch.refuse("cpp", "this test wants plain torch")
    try:
        return run(weights, places, shape, hidden)
    finally:
        dispatch.forget()


def test_rows_that_share_nothing_do_not_change_each_other() -> None:
    model, weights, shape = layer_of("qwen3")
    weights = narrowed(weights, torch.float32)
    hidden = random_hidden(len(TREE)).float()
    whole = decoder_layer(hidden, weights, *places_of(model, TREE, torch.float32), shape)
    other = hidden.clone()
    other[9:] = torch.nan
    part = decoder_layer(other, weights, *places_of(model, TREE, torch.float32), shape)
    assert torch.equal(whole[:9], part[:9]) and bool(part[9:].isnan().all())


@pytest.mark.needs_compiler
def test_threads_and_runs_change_nothing_between_the_products() -> None:
    from grpoforge_kernels.cpp import decoder_layer as cpp

    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(1000, 48, generator=generator) for _ in range(2))
    weight = torch.randn(48, generator=generator)
    found = []
    for threads in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        y, inverse = cpp.normed(x, weight, 1e-5)
        d_x = grad.clone()
        d_weight, again = cpp.norm_back(x, weight, inverse, d_x, add=None, again=True)
        product = grad[:, :24].contiguous()
        found.append([y, inverse, d_x, d_weight, again, cpp.gate_back(x, product), product, cpp.gated(x)])
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("size", [3, 15, 16, 33, 64])
def test_rms_norm_and_its_gradient(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(9, size, dtype=torch.float64, generator=generator)
    weight, direction = torch.randn(size, dtype=torch.float64, generator=generator), torch.randn_like(x)
    results = []
    for dtype in (torch.float64, torch.float32):
        a, b = (one.to(dtype, copy=True).requires_grad_() for one in (x, weight))
        y = rms_norm(a, b, 1e-5)
        (y * direction.to(dtype)).sum().backward()
        results.append((y.detach(), a.grad, b.grad))
    leaves = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: reference.rms_norm(a, b, 1e-5), leaves)
    for expected, found in zip(*results, strict=True):
        assert gap(found, expected) < 2e-6


@pytest.mark.needs_compiler
def test_gates_at_the_ends_of_their_range() -> None:
    from grpoforge_kernels.cpp import decoder_layer as cpp

    gate = torch.tensor([[-1e4, -100.0, -90.0, 0.0, 90.0, 1e4]])
    up = torch.full_like(gate, 2.0)
    product = cpp.gated(torch.cat([gate, up], dim=1))
    assert torch.allclose(product, torch.nn.functional.silu(gate) * up, atol=1e-30)
    grad = torch.ones_like(gate)
    d_gate, d_up = cpp.gate_back(torch.cat([gate, up], dim=1), grad).chunk(2, dim=1)
    leaf = gate.double().requires_grad_()
    (torch.nn.functional.silu(leaf) * 2).sum().backward()
    assert torch.allclose(d_gate.double(), leaf.grad, rtol=1e-6, atol=1e-30) and bool(d_up.isfinite().all())


def test_biases_of_the_mlp_go_the_plain_way() -> None:
    model, weights, shape = layer_of("llama")
    places = places_of(model, TREE, torch.float32)
    plain = narrowed(weights, torch.float32)
    biased = dataclasses.replace(plain, down_bias=torch.ones(SIZES["hidden_size"]))
    hidden = random_hidden(len(TREE)).float()
    assert torch.allclose(
        decoder_layer(hidden, biased, *places, shape), decoder_layer(hidden, plain, *places, shape) + 1, atol=1e-5
    )


@pytest.mark.needs_compiler
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": torch.ones(1)}, "norm of a decoder layer is torch.float32 [1] on cpu, not float32 [24] on the CPU"),
        (
            {"qkv_bias": torch.ones(3)},
            "qkv_bias of a decoder layer is torch.float32 [3] on cpu, not float32 [80]",
        ),
        ({"q_norm": torch.ones(10)}, "a decoder layer has a norm of queries or of keys only"),
        ({"up": torch.ones(40, 24).double()}, "up of a decoder layer is torch.float64 [40, 24] on cpu, not float32"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    model, weights, shape = layer_of("llama")
    weights = dataclasses.replace(narrowed(weights, torch.float32), **change)
    with pytest.raises(KernelError) as failure:
        decoder_layer(random_hidden(3).float(), weights, *places_of(model, [0, 1, 2], torch.float32), shape)
    assert failure.value.message.startswith(message)


@pytest.mark.needs_compiler
def test_tokens_and_tables_that_do_not_fit_are_refused() -> None:
    model, weights, shape = layer_of("llama")
    weights, hidden = narrowed(weights, torch.float32), random_hidden(3).float()
    _, short = places_of(model, [0, 1], torch.float32)
    with pytest.raises(KernelError) as failure:
        decoder_layer(hidden, weights, Forest.of(torch.tensor([0, 1, 2])), short, shape)
    assert failure.value.message == "the forest is 3 tokens deep, and rotary tables have 2 positions"
    with pytest.raises(KernelError) as failure:
        decoder_layer(hidden, weights, Forest.of(torch.tensor([0, 1])), short, shape)
    assert failure.value.message == "the forest has 2 tokens and hidden 3"


def test_no_tokens() -> None:
    model, weights, shape = layer_of("llama")
    for dtype in (torch.float32, torch.float64):
        tables = model.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.arange(1)[None])
        cosine, sine = (table[0].to(dtype) for table in tables)
        nobody = Forest.of(torch.empty(0, dtype=torch.int64))
        out = decoder_layer(random_hidden(0).to(dtype), narrowed(weights, dtype), nobody, (cosine, sine), shape)
        assert out.shape == (0, SIZES["hidden_size"])


@pytest.mark.needs_compiler
@pytest.mark.parametrize("flags", [" ".join(sorted(flags)) for flags in build.LEVELS.values()])
def test_every_generation_passes_the_certificate(flags: str, tmp_path: Path) -> None:
    """Where this machine can run it: instructions of a generation that it lacks would kill the process."""
    if not set(flags.split()) <= set(build._cpu_flags().split()):
        pytest.skip(f"this processor has not all of {flags}")
    code = f"""
from grpoforge_kernels.cpp import build
build._cpu_flags = lambda: {flags!r}
from grpoforge_kernels import dispatch
from grpoforge_kernels.bench.accuracy import BOUNDS
from grpoforge_kernels.bench.adversarial_layers import layer_checks
import torch
assert dispatch.backend_name("decoder_layer", torch.device("cpu"), torch.float32) == "cpp"
for op, name, run in layer_checks():
    value, gradient = run()
    bound = BOUNDS[op, "fp32"]
    assert value <= bound.value and gradient <= bound.gradient, (op, name, value, gradient)
from grpoforge_kernels.cpp import decode
a, gate = torch.ones(1, 1), torch.tensor([[-1e4], [-177.0], [-90.0], [90.0]]).repeat(4, 1)
out = torch.empty(1, 16)
decode.multiply(a, decode.pack(decode.interleaved(gate, torch.ones(16, 1))), None, out, "gated")
assert torch.allclose(out[0], torch.nn.functional.silu(gate[:, 0]), atol=1e-30), out
"""
    environment = os.environ | {"GRPOFORGE_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
