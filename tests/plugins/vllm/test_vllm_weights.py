"""The folder that vLLM reloads, and what it is sent where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpoforge.config import ModelConfig
from grpoforge.policy import Policy
from grpoforge.precision import Precision
from grpoforge_plugins import load_policy
from grpoforge_plugins.samplers.vllm_weights import checkpoint_weights, original_weights, save_weights

IDS = torch.tensor([[5, 9, 3, 7, 21, 4]])


def test_a_head_that_shares_the_embedding_is_named_too(tmp_path: Path) -> None:
    """vLLM on a CPU keeps a copy of the head, and a reload that does not name it leaves the old one in place."""
    policy = load_policy(ModelConfig(name="tiny-math", precision="fp32"))
    assert policy.model.config.tie_word_embeddings
    save_weights(policy, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["lm_head.weight"], policy.model.get_input_embeddings().weight)
    assert torch.equal(saved["model.embed_tokens.weight"], saved["lm_head.weight"])
    sent = original_weights(policy)
    assert sorted(sent) == sorted(saved)
    assert len({tensor.data_ptr() for tensor in sent.values()}) == len(sent)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_adapters_are_added_to_the_matrices_they_stand_on(
    targets: str | list[str], tmp_path: Path, tiny_policy: Callable[..., Policy]
) -> None:
    torch.manual_seed(0)
    plain = tiny_policy(dtype=torch.float32)
    names = sorted(plain.model.state_dict())
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    policy = Policy(get_peft_model(plain.model, lora), plain.tokenizer, Precision(torch.float32))
    weights = checkpoint_weights(policy)
    assert sorted(weights) == names
    inner = policy.model.get_base_model().model.layers[1].self_attn.q_proj
    delta = 2.0 * inner.lora_B["default"].weight @ inner.lora_A["default"].weight  # alpha / r = 2
    expected = inner.base_layer.weight + delta
    assert torch.allclose(weights["model.layers.1.self_attn.q_proj.weight"], expected, atol=1e-6)

    with torch.no_grad():
        save_weights(policy, tmp_path)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.allclose(merged(IDS).logits, policy.model(IDS).logits, atol=1e-4)
        with policy.model.disable_adapter():
            assert not torch.allclose(merged(IDS).logits, policy.model(IDS).logits, atol=1e-1)


def test_the_experts_of_a_mixture_are_sent_one_by_one(tiny_mixture: Policy, tmp_path: Path) -> None:
    sent = original_weights(tiny_mixture)
    save_weights(tiny_mixture, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in sent
    assert sorted(sent) == sorted(saved)
    assert all(torch.equal(sent[name], saved[name]) for name in saved)


@pytest.fixture
def tiny_mixture(tiny_policy: Callable[..., Policy]) -> Policy:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return Policy(Qwen3MoeForCausalLM(config), tiny_policy().tokenizer, Precision(torch.float32))
