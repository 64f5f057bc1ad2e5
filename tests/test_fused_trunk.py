"""Layers through the kernels: which models take this way, and that checkpointing changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from grpoforge import fused_trunk, llama_kind
from grpoforge.collate import collate
from grpoforge.logprobs import CausalForward
from grpoforge.precision import Precision
from grpoforge.trie import Trie
from grpoforge.types import Rollouts

FLOAT32 = Precision(torch.float32)
SIZES: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **changes))


def obstacle(model: Any, precision: Precision = FLOAT32) -> str | None:
    return fused_trunk.obstacle(model.get_decoder(), precision)


def test_models_of_llamas_kind_have_none() -> None:
    assert obstacle(llama()) is None
    assert obstacle(llama(attention_bias=False, head_dim=6)) is None
    assert obstacle(Qwen2ForCausalLM(Qwen2Config(**SIZES))) is None
    assert obstacle(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))) is None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: llama(hidden_act="gelu"), "its activation is gelu"),
        (lambda: llama(mlp_bias=True), "it has biases beside those of queries, keys and values"),
        (lambda: llama(attention_bias=True), "it has biases beside those of queries, keys and values"),
        (lambda: llama().to(torch.bfloat16), "it has other weights than float32"),
        (
            lambda: llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "its rotary embedding is dynamic",
        ),
        (
            lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
            "it attends to a sliding window",
        ),
    ],
)
def test_what_the_kernels_do_not_compute(make: Callable[[], Any], reason: str) -> None:
    assert obstacle(make()) == reason


def test_other_precisions_adapters_and_hooks_take_the_models_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert obstacle(llama(), Precision(torch.float32, torch.bfloat16)) == "it is not computed in float32"
    adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert obstacle(adapted.get_base_model()) == "its linear layers are not plain"
    watched = llama()
    watched.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert obstacle(watched) == "`layers.1.mlp` has hooks"
    scaled = llama()
    scaled.model.layers[0].self_attn.scaling = 1.0
    assert obstacle(scaled) == "its scores are scaled in another way"
    monkeypatch.setenv("GRPOFORGE_KERNELS", "reference")
    assert obstacle(llama()) == "no kernel is faster"


def test_checkpointing_gives_the_same_gradients(make_rollouts: Callable[..., Rollouts]) -> None:
    completions = [[[5, 6, 7], [5, 6, 8], [9]], [[4, 4], [4, 4], [3, 2, 5, 6]]]
    packed = Trie.of(collate(make_rollouts([[2, 3], [2, 9, 4]], completions), pad_token_id=0))
    found = []
    for checkpointing in (False, True):
        model = llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        hidden = fused_trunk.hidden_states(model.get_decoder(), packed)
        (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
        found.append([hidden.detach(), *(parameter.grad for parameter in model.get_decoder().parameters())])
    assert all(one is not None and torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_weights_are_named_by_what_they_do() -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES)).get_decoder()
    weights = llama_kind.layer_weights(model.layers[0], lambda linear: linear.weight)
    attention = model.layers[0].self_attn
    assert weights.k is attention.k_proj.weight and weights.mlp_norm is model.layers[0].post_attention_layernorm.weight
    assert weights.qkv_bias is not None and weights.q_norm is None
    assert torch.equal(
        weights.qkv_bias, torch.cat([attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias])
    )
    assert llama_kind.head_size(model.config) == 8


def test_a_model_goes_this_way_by_itself() -> None:
    prefix = CausalForward(llama(), FLOAT32).prefix
    assert prefix.obstacle() == ""
    assert prefix.way is not None and prefix.way.run is fused_trunk.hidden_states


def test_a_model_whose_layers_compute_something_else_goes_through_them() -> None:
    """A norm of another kind keeps its parameters' names: only asking tells."""
    model = llama()
    model.model.layers[0].input_layernorm = Shifted(model.model.layers[0].input_layernorm)
    assert obstacle(model) is None
    prefix = CausalForward(model, FLOAT32).prefix
    assert prefix.obstacle() == ""
    assert prefix.way is not None and prefix.way.packing is Trie and prefix.way.run is not fused_trunk.hidden_states


@pytest.mark.parametrize("change", ["hook", "adapter"])
def test_what_is_put_on_a_model_later_is_not_passed_over(change: str, make_rollouts: Callable[..., Rollouts]) -> None:
    batch = collate(make_rollouts([[2, 3, 4]], [[[5, 6], [7, 8]]]), pad_token_id=0)
    model = llama()
    on, off = (CausalForward(model, FLOAT32, mode) for mode in ("on", "off"))  # type: ignore[arg-type]
    with torch.no_grad():
        before = on.logprobs(batch).logprobs
        if change == "hook":
            model.model.layers[0].mlp.register_forward_hook(lambda module, given, output: 3 * output)
        else:
            get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
        found, expected = on.logprobs(batch).logprobs, off.logprobs(batch).logprobs
    assert float((found - before).abs().max()) > 1e-4
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_model_with_other_names_inside_goes_its_own_way() -> None:
    model = llama()
    del model.model.layers[0].self_attn.scaling
    assert str(obstacle(model)).startswith("its parts have other names (")


def test_a_projection_without_a_bias_has_zeros() -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    attention = model.model.layers[0].self_attn
    attention.v_proj.bias = None
    joined = llama_kind.layer_weights(model.model.layers[0], lambda linear: linear.weight).qkv_bias
    assert joined is not None and joined.shape == (64,) and not joined[48:].any()


class Shifted(torch.nn.Module):
    """A norm and a half."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm, self.weight = norm, norm.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shifted: torch.Tensor = self.norm(hidden) + 0.5
        return shifted
